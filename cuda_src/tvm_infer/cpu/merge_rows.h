// (O, LSE) of one row from several (section 2.2 of arXiv 2501.01005). -inf is the identity and its O is not read.
#pragma once

#include "tvm_infer/cpu/kernels.h"
#include "tvm_infer/cpu/tile_variant.h"
#include "tvm_infer/cpu/vec_partial.h"

namespace tvm_infer::cpu::TVM_INFER_ISA {

// Adds up in the order of the states; may write over its inputs.
template <typename In, typename Out>
void MergeRow(const MergeRowJob& job) {
  constexpr int kMaxPaddedDim = 256;
  alignas(64) float o[kMaxPaddedDim];
  for (int d = 0; d < job.head_dim; d += kWidth) Store(o + d, Zero());
  const float kNothing = -__builtin_inff();
  float max = kNothing;
  for (int i = 0; i < job.num_states; ++i) max = max > job.lse_in[i] ? max : job.lse_in[i];
  float sum = 0.f;
  for (int i = 0; i < job.num_states; ++i) {
    if (job.lse_in[i] == kNothing) continue;
    const Vec weight = Exp2(Set1((job.lse_in[i] - max) * 0x1.715476p+0f));
    float lanes[kWidth];
    Store(lanes, weight);
    sum += lanes[0];
    const In* in = static_cast<const In*>(job.o_in[i]);
    for (int d = 0; d < job.head_dim; d += kWidth) {
      Store(o + d, Fma(weight, LoadUpTo(in + d, job.head_dim - d), Load(o + d)));
    }
  }
  if (!job.has_softmax && sum != 0.f) sum = 1.f;
  const float lse = sum == 0.f ? kNothing : max + __builtin_logf(sum);
  Vec factor = Set1(sum == 0.f ? 0.f : 1.f / sum);
  if (job.variant != nullptr) {
    for (int d = 0; d < job.head_dim; d += kWidth) Store(o + d, Mul(Load(o + d), factor));
    ApplyOutput(*job.variant, /*kv_head=*/0, /*r=*/0, lse, job.head_dim, o);
    factor = Set1(1.f);
  }
  Out* out = static_cast<Out*>(job.o);
  for (int d = 0; d < job.head_dim; d += kWidth) StoreUpTo(out + d, Mul(Load(o + d), factor), job.head_dim - d);
  if (job.lse != nullptr) *job.lse = lse;
}

}  // namespace tvm_infer::cpu::TVM_INFER_ISA
