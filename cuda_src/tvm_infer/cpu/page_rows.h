// A page's bounds, channel by channel, and what they say of its logits (Quest, arXiv 2406.10774, section 3.3).
#pragma once

#include "tvm_infer/cpu/kernels.h"
#include "tvm_infer/cpu/vec_partial.h"

namespace tvm_infer::cpu::TVM_INFER_ISA {

// Keys of T, bounds of B, which holds every value of T.
template <typename T, typename B>
void BoundPage(const PageBoundsJob& job) {
  alignas(64) float least[kMaxHeadDim], greatest[kMaxHeadDim], x[kMaxHeadDim];
  for (int d = 0; d < kMaxHeadDim; ++d) {
    least[d] = __builtin_inff();
    greatest[d] = -__builtin_inff();
  }
  const char* key = static_cast<const char*>(job.keys);
  for (int32_t i = 0; i < job.num_keys; ++i, key += job.key_stride) {
    const T* const row = reinterpret_cast<const T*>(key);
    for (int d = 0; d < job.head_dim; d += kWidth) Store(x + d, LoadUpTo(row + d, job.head_dim - d));
    for (int d = 0; d < job.head_dim; ++d) {
      least[d] = x[d] < least[d] || x[d] != x[d] ? x[d] : least[d];
      greatest[d] = x[d] > greatest[d] || x[d] != x[d] ? x[d] : greatest[d];
    }
  }
  for (int d = 0; d < job.head_dim; d += kWidth) {
    StoreUpTo(static_cast<B*>(job.least) + d, Load(least + d), job.head_dim - d);
    StoreUpTo(static_cast<B*>(job.greatest) + d, Load(greatest + d), job.head_dim - d);
  }
}

template <typename T>
void SplitQuery(const SplitQueryJob& job) {
  for (int d = 0; d < job.head_dim; d += kWidth) {
    Store(job.above + d, LoadUpTo(static_cast<const T*>(job.query) + d, job.head_dim - d));
  }
  for (int d = job.head_dim; d < kMaxHeadDim; ++d) job.above[d] = job.below[d] = 0.f;
  for (int d = 0; d < job.head_dim; ++d) {
    const float q = job.above[d];  // NaN is in both
    job.above[d] = q < 0.f ? 0.f : q;
    job.below[d] = q > 0.f ? 0.f : q;
  }
}

template <typename B>
float ScorePage(const PageScoreJob& job) {
  const B *const least = static_cast<const B*>(job.least), *const greatest = static_cast<const B*>(job.greatest);
  float score = job.is_sum ? 0.f : -__builtin_inff();
  for (int32_t h = 0; h < job.num_heads; ++h) {
    const float* const query = job.queries + h * 2 * kMaxHeadDim;
    Vec sum = Zero();
    for (int d = 0; d < job.head_dim; d += kWidth) {
      sum = Fma(Load(query + d), LoadUpTo(greatest + d, job.head_dim - d), sum);
      sum = Fma(Load(query + kMaxHeadDim + d), LoadUpTo(least + d, job.head_dim - d), sum);
    }
    const float of_head = ReduceAdd(sum);
    if (job.is_sum) {
      score += of_head;
    } else if (of_head > score || of_head != of_head) {
      score = of_head;
    }
  }
  return score;
}

}  // namespace tvm_infer::cpu::TVM_INFER_ISA
