// Packed functions of page selection: a KV head reads, of each request, the pages whose keys its query may score best (Quest, arXiv
// 2406.10774; LServe, arXiv 2502.14866). Host or device, as the tensors lie; no device memory is allocated and nothing synchronises.
//
// Shapes
//   page_bounds      [num_pages, 2, num_kv_heads, head_dim], any strides but the last: the least and the greatest element of each
//                    channel of a page's keys. Of the cache's type; beside a cache of 8 bits float32, float16 or bfloat16, elements
//                    without their scale
//   kv_len           int32 [num_requests]: keys of each request
//   kv_page_indptr, kv_page_indices, k_cache, v_cache, kv_layout: as in attention.h
//   scores           float32 [num_requests, num_kv_heads, max_pages]
//   page_lists       int32 [num_requests * num_kv_heads * num_pages]: list r * num_kv_heads + h begins at entry num_pages times that
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/optional.h>

#include <cstdint>

#include "tvm_infer/ffi/attention.h"

#define TVM_INFER_PAGE_SELECTION_FUNCTIONS(V)       \
  V(check_page_bounds, CheckPageBounds)             \
  V(update_page_bounds, UpdatePageBounds)           \
  V(update_page_bounds_by_plan, UpdateBoundsByPlan) \
  V(page_scores, PageScores)                        \
  V(select_pages, SelectPages)

namespace tvm_infer::ffi_api {

// Whether bounds can be kept beside this cache: a typed error if not, before an append writes anything.
void CheckPageBounds(tvm::ffi::TensorView page_bounds, tvm::ffi::TensorView k_cache, OptionalTensor v_cache, int64_t kv_layout);

// Bounds of the pages that hold new tokens (as AppendPaged places them), anew from all keys of the page. Call it after the append.
void UpdatePageBounds(tvm::ffi::TensorView page_bounds, tvm::ffi::TensorView qo_indptr, tvm::ffi::TensorView kv_len,
                      tvm::ffi::TensorView k_cache, OptionalTensor v_cache, int64_t kv_layout, tvm::ffi::TensorView kv_page_indptr,
                      tvm::ffi::TensorView kv_page_indices);

// The same with the plan's lengths.
void UpdateBoundsByPlan(tvm::ffi::TensorView page_bounds, tvm::ffi::TensorView plan, int64_t num_qo_heads, tvm::ffi::TensorView k_cache,
                        OptionalTensor v_cache, int64_t kv_layout, tvm::ffi::TensorView kv_page_indptr,
                        tvm::ffi::TensorView kv_page_indices);

// scores[r, h, i] = the most that q * k can be for a key of page i of request r: sum over channels of max(q * least, q * greatest), of the
// query heads of KV head h the greatest (is_sum 0) or the sum (1). NaN where q or the bounds have one. Entries behind a request's pages
// stay as they are.
//   q          [num_requests, num_qo_heads, head_dim]: one token a request. Of the bounds' type; on CUDA float16 or bfloat16
//   min_pages  requests with no more pages are left out: 0 for none
void PageScores(tvm::ffi::TensorView q, tvm::ffi::TensorView page_bounds, tvm::ffi::TensorView kv_len, tvm::ffi::TensorView kv_page_indptr,
                tvm::ffi::TensorView kv_page_indices, int64_t page_size, int64_t is_sum, int64_t min_pages, tvm::ffi::TensorView scores);

// For each request and KV head a list of at most num_pages pages in ascending order of their keys: the first num_sink, the last num_recent
// and between them those of the best scores, the first of equal ones. NaN is above all scores. A request with no more pages
// has all. And in `plan` the works of `planned`, ended where the lists end, and the lists' kv_len.
//   num_sink >= 0, num_recent >= 1, both together at most num_pages
//   planned    plan of MakeHeadListsPlan for kv_len num_pages * page_size of each list
//   plan       a copy of it, which attention then is called with, and page_lists as its kv_page_indices
void SelectPages(tvm::ffi::TensorView scores, tvm::ffi::TensorView kv_len, tvm::ffi::TensorView kv_page_indptr,
                 tvm::ffi::TensorView kv_page_indices, int64_t page_size, int64_t num_pages, int64_t num_sink, int64_t num_recent,
                 tvm::ffi::TensorView planned, tvm::ffi::TensorView plan, tvm::ffi::TensorView page_lists);

}  // namespace tvm_infer::ffi_api
