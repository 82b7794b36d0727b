// What the bindings of page selection (page_selection.h) check, on both executors: shapes, types and places; and of what lies on the host,
// values. Each throws a typed Error that names the argument.
#pragma once

#include <cstdint>

#include "tvm_infer/ffi/attention_checks.h"
#include "tvm_infer/ffi/common.h"
#include "tvm_infer/schedule/page_budget.h"
#include "tvm_infer/schedule/plan.h"

namespace tvm_infer::ffi_api {

// Bounds of the cache's pages, heads and type.
void CheckBoundsFitCache(const TensorView& page_bounds, const CacheShape& shape, const Place& place);

// The tensors of scores; returns the number of KV heads.
int32_t CheckScores(const TensorView& q, const TensorView& page_bounds, const TensorView& kv_len, const TensorView& kv_page_indptr,
                    const TensorView& kv_page_indices, int64_t page_size, int64_t is_sum, const TensorView& scores, const Place& place);

// The tensors of a selection; returns what it is to take.
PageBudget CheckSelection(const TensorView& scores, const TensorView& kv_len, const TensorView& kv_page_indptr,
                          const TensorView& kv_page_indices, int64_t page_size, int64_t num_pages, int64_t num_sink, int64_t num_recent,
                          const TensorView& plan, const TensorView& page_lists, const Place& place);

// ArgumentError for numbers that are no budget.
PageBudget CheckBudget(int64_t page_size, int64_t num_pages, int64_t num_sink, int64_t num_recent);

// No length is negative.
void CheckLengths(const int32_t* kv_len, int32_t num_requests);
// Scores have an entry for each page of the requests that have more than min_pages.
void CheckRoom(const int32_t* kv_len, int32_t num_requests, int64_t page_size, int64_t min_pages, int64_t max_pages);
// `planned` is for full lists of these requests and heads, `plan` of the same structure. In host memory.
void CheckSelectionPlans(const PlanHeader& planned, const PlanHeader& plan, const PageBudget& budget, int64_t num_requests,
                         int64_t num_kv_heads);

}  // namespace tvm_infer::ffi_api
