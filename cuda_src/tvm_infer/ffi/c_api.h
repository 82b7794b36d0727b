// Plain C symbols of the static object, for T.call_extern in TIR: pointers and numbers, dense layouts, the CPU executor.
// Each returns 0, or 1 after an error whose text tvm_infer_last_error() gives (per thread).
//
//   dtype      0 float32, 1 float16, 2 bfloat16
//   kv_pages   [num_pages, 2, num_kv_heads, page_size, head_dim]
//   q, o       [num_tokens, num_qo_heads, head_dim];  k, v [num_tokens, num_kv_heads, head_dim];  lse float32 [num_tokens, num_qo_heads]
//   plan       from tvm_infer_plan, or from the packed function
#pragma once

#include <cstdint>

extern "C" {

const char* tvm_infer_last_error();

// plan_words: int32 words that `plan` holds. max_partial_rows: rows of partial results that the workspace will hold.
int32_t tvm_infer_plan(const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests, int32_t num_qo_heads, int32_t num_kv_heads,
                       int32_t head_dim, int32_t dtype, int32_t causal, int32_t num_ctas, int32_t* plan, int32_t plan_words,
                       int32_t max_partial_rows);

// workspace: float32, max_partial_rows * (head_dim + 1). lse may be null.
int32_t tvm_infer_paged_attention(const int32_t* plan, int32_t dtype, int32_t head_dim, const void* q, const void* kv_pages,
                                  int32_t page_size, const int32_t* kv_page_indptr, const int32_t* kv_page_indices, float sm_scale,
                                  float* workspace, void* o, float* lse);

int32_t tvm_infer_append(const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests, int32_t dtype, int32_t num_kv_heads,
                         int32_t head_dim, const void* k, const void* v, void* kv_pages, int32_t page_size, const int32_t* kv_page_indptr,
                         const int32_t* kv_page_indices);

int32_t tvm_infer_merge(int32_t dtype, int32_t num_rows, int32_t num_heads, int32_t head_dim, const void* o_a, const float* lse_a,
                        const void* o_b, const float* lse_b, void* o, float* lse);

}  // extern "C"
