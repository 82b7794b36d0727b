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

void PageScores(const Place& place, const TensorView& q, const TensorView& page_bounds, const TensorView& kv_len,
                const TensorView& kv_page_indptr, const TensorView& kv_page_indices, int64_t page_size, bool is_sum, int64_t min_pages,
                const TensorView& scores);

void SelectPages(const Place& place, const TensorView& scores, const TensorView& kv_len, const TensorView& kv_page_indptr,
                 const TensorView& kv_page_indices, const PageBudget& budget, const TensorView& planned, const TensorView& plan,
                 const TensorView& page_lists);

}  // namespace tvm_infer::ffi_api::on_cuda
