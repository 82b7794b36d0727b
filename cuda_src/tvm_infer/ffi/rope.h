// The packed function between a model's QKV projection and its attention.
#pragma once

#include <cstdint>

#include "tvm_infer/ffi/attention.h"

#define TVM_INFER_ROPE_FUNCTIONS(V)     \
  V(rope_append_paged, RopeAppendPaged) \
  V(scaled_rope_append, ScaledRopeAppend)

namespace tvm_infer::ffi_api {

// Rotates q and k by their positions (RoPE), q to q_out, k and v to their pages: append (attention.h) of the rotated k.
//   q, q_out     [num_tokens, num_qo_heads, head_dim]; k, v [num_tokens, num_kv_heads, head_dim]; all of the cache's dtype. Strided: slices
//                of one tensor [num_tokens, num_qo_heads + 2 * num_kv_heads, head_dim] will do. q_out is q itself, or overlaps no other.
//   inv_freq     float32 [rotary_dim / 2], contiguous: radians a token (RopeConfig.inv_freq in tvm_infer/rope.py). The first rotary_dim
//                elements of a head turn, the others pass; empty: nothing turns
//   interleaved  1: pairs are elements (2i, 2i + 1); 0: (i, i + rotary_dim / 2)
//   magnitude    factor on cosine and sine, finite
//   plan, or qo_indptr and kv_len: where the tokens belong; the others are None
// Token t of request r has position kv_len[r] - (qo_indptr[r + 1] - t). Tokens behind qo_indptr[num_requests] are padding: they go to no
// page, and their rows of q_out become 0. On CUDA a plan that does not fit makes all tokens padding.
// float32 until the one rounding of each result; angles are exact to 3e-7 while |position * inv_freq| < 2^23 radians.
// On CUDA: float16 or bfloat16, head_dim and rotary_dim multiples of 16, rows and inv_freq on 16-byte boundaries.
void RopeAppendPaged(tvm::ffi::TensorView q, tvm::ffi::TensorView k, tvm::ffi::TensorView v, tvm::ffi::TensorView inv_freq,
                     int64_t interleaved, double magnitude, OptionalTensor plan, OptionalTensor qo_indptr, OptionalTensor kv_len,
                     tvm::ffi::TensorView k_cache, OptionalTensor v_cache, int64_t kv_layout, tvm::ffi::TensorView kv_page_indptr,
                     tvm::ffi::TensorView kv_page_indices, tvm::ffi::TensorView q_out);
// The same for a cache of scaled elements, beside q, k and v of one other type; scales as of scaled_append (attention.h). A rotated key is
// rounded once, from float32.
void ScaledRopeAppend(tvm::ffi::TensorView q, tvm::ffi::TensorView k, tvm::ffi::TensorView v, tvm::ffi::TensorView inv_freq,
                      int64_t interleaved, double magnitude, OptionalTensor plan, OptionalTensor qo_indptr, OptionalTensor kv_len,
                      tvm::ffi::TensorView k_cache, OptionalTensor v_cache, int64_t kv_layout, tvm::ffi::TensorView kv_page_indptr,
                      tvm::ffi::TensorView kv_page_indices, tvm::ffi::TensorView q_out, double k_scale, double v_scale,
                      OptionalTensor k_scales, OptionalTensor v_scales);

}  // namespace tvm_infer::ffi_api
