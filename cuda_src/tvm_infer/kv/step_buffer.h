// What executors and models read in a step, in one block of memory, so that a device gets all of it by one copy:
//
//     lists | … logit rows | input ids | position ids | page_indptr | list_kv_len | list_indptr | plans | page indices | page copies
//                                                     ^ Layout::page_indptr, fixed; so are what follows, and each plan
//
// Captured graphs keep addresses, so whatever they read stands at a fixed place: page_indptr and the plans always (one for each band that
// layers have; mostly there is one), and the arrays left of them for a given number of rows, since they end at a fixed place. The page
// indices stand wherever the last plan ends: entries of page_indptr count from the block's first word, not from the first page index. Only
// the bytes in use are copied, with the room between plans. Of a cache whose layers select pages (schedule/page_budget.h) the lists, which
// the executor itself writes in each layer, stand in front, where no copy goes: attention finds pages of lists and pages of whole
// requests from one address.
#pragma once

#include <cstdint>
#include <cstring>

#include "tvm_infer/kv/cache_manager.h"

namespace tvm_infer::kv {

inline constexpr int64_t kStepAlignment = 128;  // bytes: every array begins on a line of the cache, as kernels of a compiler may assume

struct StepLimits {
  int32_t max_batch;   // sequences in one step
  int32_t max_rows;    // rows of a step, padding included
  int64_t plan_bytes;  // of the largest plan
  int64_t max_page_entries;
  int32_t num_plans = 1;
  int32_t num_lists = 0;   // of pages that layers select: max_batch * num_kv_heads; 0: they select none
  int32_t list_pages = 0;  // room of a list
};

// Offsets in bytes from the block's beginning.
class StepLayout {
 public:
  explicit StepLayout(const StepLimits& limits);

  int64_t position_ids(int64_t num_rows) const { return page_indptr_ - Bytes(num_rows); }   // int64 [num_rows]
  int64_t input_ids(int64_t num_rows) const { return page_indptr_ - 2 * Bytes(num_rows); }  // int64 [num_rows]
  int64_t logit_rows(int64_t num_rows, int64_t num_logits) const {                          // int64 [num_logits]
    return input_ids(num_rows) - Bytes(num_logits);
  }
  int64_t page_indptr() const { return page_indptr_; }                                                  // int32 [max_batch + 1]
  int64_t lists() const { return 0; }                                                                   // int32 [num_lists * list_pages]
  int64_t list_kv_len() const { return page_indptr_ + Aligned(4 * (int64_t{limits_.max_batch} + 1)); }  // int32 [max_batch]
  int64_t list_indptr() const { return list_kv_len() + ListBytes(limits_.max_batch); }                  // int32 [num_lists + 1]
  int64_t plan(int32_t index = 0) const { return plan_ + index * Aligned(limits_.plan_bytes); }
  // Where the last plan has `plan_bytes`, as below.
  int64_t page_indices(int64_t plan_bytes) const { return plan(limits_.num_plans - 1) + Aligned(plan_bytes); }  // int32
  int64_t copies(int64_t plan_bytes, int64_t num_entries) const { return page_indices(plan_bytes) + Aligned(4 * num_entries); }
  int64_t bytes() const { return bytes_; }
  const StepLimits& limits() const { return limits_; }

 private:
  static int64_t Aligned(int64_t bytes) { return (bytes + kStepAlignment - 1) / kStepAlignment * kStepAlignment; }
  static int64_t Bytes(int64_t num_values) { return Aligned(num_values * static_cast<int64_t>(sizeof(int64_t))); }

  int64_t ListBytes(int64_t num_words) const { return limits_.num_lists == 0 ? 0 : Aligned(4 * num_words); }

  StepLimits limits_;
  int64_t page_indptr_, plan_, bytes_;
};

// The part of the block that a step uses.
struct StepRange {
  int64_t begin, end;
};

// What the caller of a step adds to the manager's lengths and pages.
struct StepInputs {
  int64_t num_rows;           // of the step's tensors; rows behind the step's tokens are padding
  const int64_t* token_ids;   // [num_tokens], or null
  const int64_t* logit_rows;  // [num_logits], or null
  int64_t num_logits;
};

// Writes everything but the plans, which stand in the block already (the last in `plan_bytes`). Throws Error("WorkspaceError") where the
// step's page tables have more than max_page_entries.
StepRange FillStep(const StepLayout& layout, const Step& step, const StepInputs& inputs, int64_t plan_bytes, void* block);

// Behind it, of a layout with lists: list_kv_len and list_indptr. A step that selects has its requests' lengths in list_kv_len, and lists
// for max_batch of them in list_indptr; one that does not has lengths of 0, for which nothing is selected, and the requests' own tables, so
// that the same launches serve both. Entries behind the step's requests are empty, in page_indptr too.
void FillLists(const StepLayout& layout, const Step& step, bool selects, void* block);

}  // namespace tvm_infer::kv
