// Page selection on host threads: bounds of pages, scores of their keys, lists of the best. Definitions: schedule/page_budget.h.
#pragma once

#include <cstdint>

#include "tvm_infer/cpu/attention.h"
#include "tvm_infer/schedule/page_budget.h"

namespace tvm_infer::cpu {

// Of each page and KV head the least and the greatest element of each channel: bounds[page, 0 (least) or 1, head, channel], of `dtype`.
// Strides in elements.
struct PageBounds {
  DType dtype;
  void* data;
  int64_t page_stride, side_stride, head_stride;
};

struct UpdatePageBoundsArgs {
  int32_t num_requests, num_kv_heads, head_dim;
  const int32_t* qo_indptr;  // [num_requests + 1]: new tokens of each request
  const int32_t* kv_len;     // [num_requests]: keys of each request, new tokens included
  KVSource cache;            // of which the keys are read
  PageBounds bounds;
};

// Bounds of the pages that hold new tokens, anew from all their keys; slots behind kv_len are not read. A cache of 8 bits has those of its
// elements, without their scale.
void UpdatePageBounds(const UpdatePageBoundsArgs& args, int num_threads);

struct PageScoresArgs {
  int32_t num_requests, num_qo_heads, num_kv_heads, head_dim, page_size;
  bool is_sum;            // over the query heads of a KV head; else the greatest of theirs
  const int32_t* kv_len;  // [num_requests]
  DType dtype;            // of q and the bounds
  const void* q;          // [num_requests, num_qo_heads, head_dim]
  int64_t q_token_stride, q_head_stride;
  const int32_t *page_indptr, *page_indices;  // pages of each request
  PageBounds bounds;
  float* scores;  // [num_requests, num_kv_heads, max_pages]
  int64_t score_request_stride, score_head_stride;
  int32_t min_pages;  // requests of no more pages are left out
};

// scores[r, h, i]: the most that q * k can be for a key of page i of request r; entries behind its pages stay as they are.
void PageScores(const PageScoresArgs& args, int num_threads);

struct SelectPagesArgs {
  int32_t num_requests, num_kv_heads;
  PageBudget budget;
  const int32_t* kv_len;  // [num_requests]
  const int32_t *page_indptr, *page_indices;
  const float* scores;  // as of PageScores
  int64_t score_request_stride, score_head_stride;
  int32_t* lists;       // [num_requests, num_kv_heads, budget.num_pages]; entries behind a list stay as they are
  const void* planned;  // a plan for lists of budget.num_pages pages each
  void* plan;           // the same for the lists that there are
};

// The lists, pages in ascending order of their keys, and the plan that goes with them.
void SelectPages(const SelectPagesArgs& args, int num_threads);

}  // namespace tvm_infer::cpu
