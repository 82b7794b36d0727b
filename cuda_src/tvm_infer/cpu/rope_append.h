// Rotary embedding of new tokens on their way to the cache: Q to its output, K and V to their pages.
#pragma once

#include <cstdint>

#include "tvm_infer/cpu/attention.h"

namespace tvm_infer::cpu {

inline constexpr int32_t kMaxRotaryDim = 256;

struct RopeAppendArgs {
  AppendArgs append;   // k before its rotation
  int32_t num_tokens;  // rows of q and q_out; those behind qo_indptr[num_requests] get zeros in q_out
  int32_t num_qo_heads;
  const void* q;  // [num_tokens, num_qo_heads, head_dim], strides in elements
  int64_t q_token_stride, q_head_stride;
  void* q_out;  // as q; may be q
  int64_t q_out_token_stride, q_out_head_stride;
  const float* inv_freq;  // [rotary_dim / 2], radians a token
  int32_t rotary_dim;     // even, at most head_dim and kMaxRotaryDim
  bool is_interleaved;    // pairs are (2i, 2i + 1) rather than (i, i + rotary_dim / 2)
  float magnitude;        // factor on cosine and sine
};

// num_threads <= 0: DefaultNumThreads().
void RopeAppend(const RopeAppendArgs& args, int num_threads);

}  // namespace tvm_infer::cpu
