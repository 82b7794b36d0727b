// Page selection (page_selection.h) on a CUDA device; arguments are checked, their values are not read but with debug checks on.
#pragma once

#include <cstdint>

#include "tvm_infer/ffi/attention_checks.h"
#include "tvm_infer/ffi/common.h"
#include "tvm_infer/schedule/page_budget.h"

namespace tvm_infer::ffi_api::on_cuda {

// Where new tokens belong: lengths, or a plan and the query heads that it is for.
struct NewTokens {
  const TensorView *qo_indptr, *kv_len;
  const TensorView* plan = nullptr;
  int64_t num_qo_heads = 0;
};

void CheckPageBounds(const TensorView& page_bounds, const TensorView& k_cache);
void UpdatePageBounds(const Place& place, const TensorView& page_bounds, const NewTokens& tokens, const TensorView& k_cache,
                      const CacheShape& shape, const cpu::KVSource& cache, const TensorView& kv_page_indptr,
                      const TensorView& kv_page_indices);

// What a cache that selects pages keeps at fixed addresses for the layer under way; values are never read on the host.
struct OwnSelection {
  TensorView page_bounds;             // of the layer
  TensorView kv_len, kv_page_indptr;  // [n], [n + 1] requests, as of page_scores; entries may count from anywhere
  TensorView scores, page_lists;      // [n, num_kv_heads, max_pages], [n * num_kv_heads * budget.num_pages]
  TensorView list_indptr;             // int32 [at least n * num_kv_heads + 1]: lists in what attention takes for kv_page_indices
  TensorView planned, plan;
  PageBudget budget;
  bool is_sum;
};
// The layer's lists and their plan for queries `q`, whose first n rows are those of requests. `tokens`: the step's plan, whose new tokens
// are in the cache.
void SelectOwnPages(const Place& place, const OwnSelection& own, const TensorView& tokens, const TensorView& q, const TensorView& k_cache,
                    const CacheShape& shape, const cpu::KVSource& cache, const TensorView& kv_page_indptr,
                    const TensorView& kv_page_indices);
// UpdatePageBounds of a cache's own pages.
void UpdateOwnBounds(const Place& place, const TensorView& page_bounds, const NewTokens& tokens, const TensorView& k_cache,
                     const OptionalTensor& v_cache, const TensorView& kv_page_indptr, const TensorView& kv_page_indices);

void PageScores(const Place& place, const TensorView& q, const TensorView& page_bounds, const TensorView& kv_len,
                const TensorView& kv_page_indptr, const TensorView& kv_page_indices, int64_t page_size, bool is_sum, int64_t min_pages,
                const TensorView& scores, bool is_own = false);

void SelectPages(const Place& place, const TensorView& scores, const TensorView& kv_len, const TensorView& kv_page_indptr,
                 const TensorView& kv_page_indices, const PageBudget& budget, const TensorView& planned, const TensorView& plan,
                 const TensorView& page_lists, bool is_own = false);

}  // namespace tvm_infer::ffi_api::on_cuda
