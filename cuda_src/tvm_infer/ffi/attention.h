// Packed functions of the executors: attention over paged and ragged keys, append, append + attend, merge.
//
// Shapes (head_dim is contiguous everywhere; all other strides and byte_offset are honoured)
//   plan             int32, from MakePlan
//   q, o             [num_tokens, num_qo_heads, head_dim], float32 / float16 / bfloat16
//   lse              float32 [num_tokens, num_qo_heads] or None: natural logarithm of the sum of exponentials; -inf where nothing is
//   visible k, v             [num_tokens, num_kv_heads, head_dim] k_cache, v_cache [num_pages, num_kv_heads, page_size, head_dim]
//   (kv_layout 0, "HND") or
//                    [num_pages, page_size, num_kv_heads, head_dim] (kv_layout 1, "NHD"); or k_cache alone with v_cache None:
//                    [num_pages, 2, …], keys and values in one tensor
//   kv_page_indptr   int32 [num_requests + 1] into kv_page_indices; request r owns pages kv_page_indices[indptr[r] … indptr[r + 1])
//   workspace        float32, contiguous, at least plan partial rows * (head_dim + 1)
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/optional.h>

#include <cstdint>

#include "tvm_infer/ffi/variant.h"

#define TVM_INFER_ATTENTION_FUNCTIONS(V)              \
  V(paged_attention, PagedAttention)                  \
  V(ragged_attention, RaggedAttention)                \
  V(append, AppendPaged)                              \
  V(append_paged_attention, AppendPagedAttention)     \
  V(variant_paged_attention, VariantPagedAttention)   \
  V(variant_ragged_attention, VariantRaggedAttention) \
  V(variant_append_attention, VariantAppendAttention) \
  V(scaled_paged_attention, ScaledPagedAttention)     \
  V(scaled_ragged_attention, ScaledRaggedAttention)   \
  V(scaled_append, ScaledAppend)                      \
  V(scaled_append_attention, ScaledAppendAttention)   \
  V(contiguous_attention, ContiguousAttention)        \
  V(contiguous_stride, ContiguousStride)              \
  V(merge, MergeStates)                               \
  V(set_debug_checks, SetDebugChecks)

namespace tvm_infer::ffi_api {

using OptionalTensor = tvm::ffi::Optional<tvm::ffi::TensorView>;

void PagedAttention(tvm::ffi::TensorView plan, tvm::ffi::TensorView q, tvm::ffi::TensorView k_cache, OptionalTensor v_cache,
                    int64_t kv_layout, tvm::ffi::TensorView kv_page_indptr, tvm::ffi::TensorView kv_page_indices, double sm_scale,
                    tvm::ffi::TensorView workspace, tvm::ffi::TensorView o, OptionalTensor lse);

// Keys and values without pages: request r owns rows kv_indptr[r] … kv_indptr[r + 1] of k and v.
void RaggedAttention(tvm::ffi::TensorView plan, tvm::ffi::TensorView q, tvm::ffi::TensorView k, tvm::ffi::TensorView v,
                     tvm::ffi::TensorView kv_indptr, double sm_scale, tvm::ffi::TensorView workspace, tvm::ffi::TensorView o,
                     OptionalTensor lse);

// Writes the new tokens' keys and values at the end of each request: token t of request r at position
// kv_len[r] - (qo_indptr[r + 1] - t), where kv_len counts the new tokens.
void AppendPaged(tvm::ffi::TensorView k, tvm::ffi::TensorView v, tvm::ffi::TensorView qo_indptr, tvm::ffi::TensorView kv_len,
                 tvm::ffi::TensorView k_cache, OptionalTensor v_cache, int64_t kv_layout, tvm::ffi::TensorView kv_page_indptr,
                 tvm::ffi::TensorView kv_page_indices);

// AppendPaged with the plan's lengths, then PagedAttention.
void AppendPagedAttention(tvm::ffi::TensorView plan, tvm::ffi::TensorView q, tvm::ffi::TensorView k, tvm::ffi::TensorView v,
                          tvm::ffi::TensorView k_cache, OptionalTensor v_cache, int64_t kv_layout, tvm::ffi::TensorView kv_page_indptr,
                          tvm::ffi::TensorView kv_page_indices, double sm_scale, tvm::ffi::TensorView workspace, tvm::ffi::TensorView o,
                          OptionalTensor lse);

// The three above with a variant's logits, mask and output. lse is that of the variant's logits, before its output. The plan's band hides
// keys beside the mask, which never sees them: plan with the variant's. ArgumentError where the variant is not for q's device.
void VariantPagedAttention(tvm::ffi::TensorView plan, tvm::ffi::TensorView q, tvm::ffi::TensorView k_cache, OptionalTensor v_cache,
                           int64_t kv_layout, tvm::ffi::TensorView kv_page_indptr, tvm::ffi::TensorView kv_page_indices, double sm_scale,
                           tvm::ffi::TensorView workspace, tvm::ffi::TensorView o, OptionalTensor lse, VariantCall variant);
void VariantRaggedAttention(tvm::ffi::TensorView plan, tvm::ffi::TensorView q, tvm::ffi::TensorView k, tvm::ffi::TensorView v,
                            tvm::ffi::TensorView kv_indptr, double sm_scale, tvm::ffi::TensorView workspace, tvm::ffi::TensorView o,
                            OptionalTensor lse, VariantCall variant);
void VariantAppendAttention(tvm::ffi::TensorView plan, tvm::ffi::TensorView q, tvm::ffi::TensorView k, tvm::ffi::TensorView v,
                            tvm::ffi::TensorView k_cache, OptionalTensor v_cache, int64_t kv_layout, tvm::ffi::TensorView kv_page_indptr,
                            tvm::ffi::TensorView kv_page_indices, double sm_scale, tvm::ffi::TensorView workspace, tvm::ffi::TensorView o,
                            OptionalTensor lse, VariantCall variant);

// The four above for keys and values that are scaled, value = element * scale: k_cache, v_cache (ragged: k, v) of float8_e4m3fn or
// float8_e5m2 beside queries and new tokens of any type. New ones are stored as x / scale, in float32, rounded to nearest even, saturating.
//   k_scale, v_scale    of all KV heads: finite, above 0
//   k_scales, v_scales  float32 [num_kv_heads], contiguous, where the cache is, instead; or None
void ScaledPagedAttention(tvm::ffi::TensorView plan, tvm::ffi::TensorView q, tvm::ffi::TensorView k_cache, OptionalTensor v_cache,
                          int64_t kv_layout, tvm::ffi::TensorView kv_page_indptr, tvm::ffi::TensorView kv_page_indices, double sm_scale,
                          tvm::ffi::TensorView workspace, tvm::ffi::TensorView o, OptionalTensor lse, double k_scale, double v_scale,
                          OptionalTensor k_scales, OptionalTensor v_scales, tvm::ffi::Optional<VariantCall> variant);
void ScaledRaggedAttention(tvm::ffi::TensorView plan, tvm::ffi::TensorView q, tvm::ffi::TensorView k, tvm::ffi::TensorView v,
                           tvm::ffi::TensorView kv_indptr, double sm_scale, tvm::ffi::TensorView workspace, tvm::ffi::TensorView o,
                           OptionalTensor lse, double k_scale, double v_scale, OptionalTensor k_scales, OptionalTensor v_scales,
                           tvm::ffi::Optional<VariantCall> variant);
void ScaledAppend(tvm::ffi::TensorView k, tvm::ffi::TensorView v, tvm::ffi::TensorView qo_indptr, tvm::ffi::TensorView kv_len,
                  tvm::ffi::TensorView k_cache, OptionalTensor v_cache, int64_t kv_layout, tvm::ffi::TensorView kv_page_indptr,
                  tvm::ffi::TensorView kv_page_indices, double k_scale, double v_scale, OptionalTensor k_scales, OptionalTensor v_scales);
void ScaledAppendAttention(tvm::ffi::TensorView plan, tvm::ffi::TensorView q, tvm::ffi::TensorView k, tvm::ffi::TensorView v,
                           tvm::ffi::TensorView k_cache, OptionalTensor v_cache, int64_t kv_layout, tvm::ffi::TensorView kv_page_indptr,
                           tvm::ffi::TensorView kv_page_indices, double sm_scale, tvm::ffi::TensorView workspace, tvm::ffi::TensorView o,
                           OptionalTensor lse, double k_scale, double v_scale, OptionalTensor k_scales, OptionalTensor v_scales,
                           tvm::ffi::Optional<VariantCall> variant);

// ScaledRaggedAttention for keys that begin anywhere: list l has rows kv_start[l] … kv_start[l] + kv_len of k and v, kv_len the plan's.
// Requests may stand in any order, with gaps of anything between them, and may share rows.
//   k, v      [num_rows, num_kv_heads, head_dim]; or [num_buffers, max_len, num_kv_heads, head_dim], whose row b * stride + j, of
//             ContiguousStride, is [b, j]
//   kv_start  int32 [num_requests], on the device of q
void ContiguousAttention(tvm::ffi::TensorView plan, tvm::ffi::TensorView q, tvm::ffi::TensorView k, tvm::ffi::TensorView v,
                         tvm::ffi::TensorView kv_start, double sm_scale, tvm::ffi::TensorView workspace, tvm::ffi::TensorView o,
                         OptionalTensor lse, double k_scale, double v_scale, OptionalTensor k_scales, OptionalTensor v_scales,
                         tvm::ffi::Optional<VariantCall> variant);
// Rows from one buffer of k and v to the next. ArgumentError where that is no whole number of them, or not the same of both.
int64_t ContiguousStride(tvm::ffi::TensorView k, tvm::ffi::TensorView v);

// (o, lse) = (o_a, lse_a) (+) (o_b, lse_b): the attention over the union of two disjoint sets of keys.
void MergeStates(tvm::ffi::TensorView o_a, tvm::ffi::TensorView lse_a, tvm::ffi::TensorView o_b, tvm::ffi::TensorView lse_b,
                 tvm::ffi::TensorView o, OptionalTensor lse);

// Turns the checks that read every page index on or off (default: on where TVM_INFER_DEBUG_CHECKS=1). Returns the former setting.
bool SetDebugChecks(bool enabled);

}  // namespace tvm_infer::ffi_api
