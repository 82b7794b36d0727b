// What an attention kernel is given besides its plan.
#pragma once

#include <cstdint>

#include "tvm_infer/ptx/tma.cuh"

namespace tvm_infer::attention {

struct AttentionParams {
  const void* plan;                // PlanHeader and its arrays, device memory
  const int32_t* kv_page_indptr;   // [num_kv_lists + 1], entries of kv_page_indices
  const int32_t* kv_page_indices;  // pages of each list in order
  const void* q;                   // [num_tokens, num_qo_heads, head_dim], head_dim contiguous
  int64_t q_stride_token;          // elements
  int64_t q_stride_head;
  void* o;  // as q
  int64_t o_stride_token;
  int64_t o_stride_head;
  float* lse;           // [num_tokens, num_qo_heads], natural logarithm; may be null
  float* partial_o;     // [num_partial_rows, head_dim]
  float* partial_lse;   // [num_partial_rows], natural logarithm
  int32_t* arrivals;    // [num_merges] or more, zero before the first launch; every launch leaves zeros behind
  float sm_scale_log2;  // sm_scale * log2(e), > 0
  int32_t reserved;
};

// Views of K and of V for the copy engine, five axes, innermost first: 64 elements, token in page, panel of 64 elements, KV head, page.
// Any strides will do (HND or NHD, K and V in one tensor or two).
struct KvTensorMaps {
  ptx::TensorMap k_pages;   // box: one page of one head (64, page_size, head_dim / 64, 1, 1)
  ptx::TensorMap v_pages;   // the same of V
  ptx::TensorMap k_panels;  // box: one panel of a page (64, page_size, 1, 1, 1)
};

}  // namespace tvm_infer::attention
