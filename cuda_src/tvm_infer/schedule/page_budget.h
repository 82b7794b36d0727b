// Page selection: a KV head reads some pages of its request only, the first, the last, and those between that its query scores best.
//
// How long the lists are follows from lengths alone, so that a plan for such lists has one structure, that of full lists, and a step
// changes only where they end (docs/plan.md): the device does that, in the kernel that writes the lists.
#pragma once

#include <cstdint>

#include "tvm_infer/schedule/plan.h"

namespace tvm_infer {

// PlanHeader::magic in place of a plan for lists, in a step that selects nothing.
inline constexpr int32_t kNothingPlanned = 0;

// What a list takes of a request's pages. A request with no more than num_pages is taken whole.
struct PageBudget {
  int32_t page_size;   // tokens
  int32_t num_pages;   // of a list, at most; >= num_sink + num_recent
  int32_t num_sink;    // first pages, always taken; >= 0
  int32_t num_recent;  // last pages, always taken; >= 1, so that the page that is not full is the last of its list

  TVM_INFER_HD int32_t PagesOf(int32_t kv_len) const { return kv_len <= 0 ? 0 : (kv_len - 1) / page_size + 1; }
  TVM_INFER_HD bool TakesAll(int32_t kv_len) const { return PagesOf(kv_len) <= num_pages; }
  // Pages that are taken for their scores, where not all are.
  TVM_INFER_HD int32_t num_best() const { return num_pages - num_sink - num_recent; }
  // Keys in a list of a request with kv_len: the pages that are left out are full.
  TVM_INFER_HD int32_t ListLen(int32_t kv_len) const {
    const int32_t left_out = PagesOf(kv_len) - num_pages;
    return left_out > 0 ? kv_len - left_out * page_size : kv_len < 0 ? 0 : kv_len;
  }
};

// A work of a plan whose list has `kv_len` keys instead of `planned_len` >= kv_len. It may be left without any, and then gives O = 0 and
// LSE = -inf, as a work without keys does.
TVM_INFER_HD inline Work WithListLen(Work work, int32_t kv_len, int32_t planned_len) {
  if (work.kv_end > kv_len) work.kv_end = work.kv_begin > kv_len ? work.kv_begin : kv_len;
  work.qo_pos_base -= planned_len - kv_len;
  return work;
}

// Scores in the order of unsigned integers: of two pages the one with the greater goes first, of equal ones the one that comes first. NaN
// is above all, of either sign: keys that are not finite are read, and seen. -0 is 0.
TVM_INFER_HD inline uint32_t ScoreOrder(float score) {
  if (score != score) return 0xffffffffu;
  score += 0.f;
  uint32_t bits;
  __builtin_memcpy(&bits, &score, sizeof(bits));
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

}  // namespace tvm_infer
