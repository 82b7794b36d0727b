// Rotary embedding of one head: in float, rounded once.
#pragma once

#include "tvm_infer/cpu/kernels.h"
#include "tvm_infer/cpu/vec_partial.h"

namespace tvm_infer::cpu::TVM_INFER_ISA {

template <typename T, typename Out>
void TurnRow(const TurnRowJob& job) {
  constexpr int kMaxHeadDim = 256;
  alignas(64) float in[kMaxHeadDim], out[kMaxHeadDim];
  const T* const from = static_cast<const T*>(job.in);
  Out* const to = static_cast<Out*>(job.out);
  for (int d = 0; d < job.head_dim; d += kWidth) {
    const Vec x = LoadUpTo(from + d, job.head_dim - d);
    Store(in + d, x);
    Store(out + d, x);
  }
  const int num_pairs = job.rotary_dim / 2;
  // Plain loops, which the compiler turns into vectors of this instruction set.
  if (job.is_interleaved) {
    for (int i = 0; i < num_pairs; ++i) {
      const float x = in[2 * i], y = in[2 * i + 1], cos = job.cos[i], sin = job.sin[i];
      out[2 * i] = x * cos - y * sin;
      out[2 * i + 1] = y * cos + x * sin;
    }
  } else {
    for (int i = 0; i < num_pairs; ++i) {
      const float x = in[i], y = in[num_pairs + i], cos = job.cos[i], sin = job.sin[i];
      out[i] = x * cos - y * sin;
      out[num_pairs + i] = y * cos + x * sin;
    }
  }
  for (int d = 0; d < job.head_dim; d += kWidth) StoreUpTo(to + d, Load(out + d), job.head_dim - d);
}

}  // namespace tvm_infer::cpu::TVM_INFER_ISA
