#include "tvm_infer/ffi/page_selection_checks.h"

#include <limits>

#include "tvm_infer/ffi/kv_dtype.h"

namespace tvm_infer::ffi_api {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr const char* kBoundsDims = "[num_pages, 2, num_kv_heads, head_dim]";

void CheckBounds(const TensorView& page_bounds, const Place& place) {
  CheckPlace(page_bounds, "page_bounds", place);
  CheckFloat(page_bounds, "page_bounds");
  CheckRank(page_bounds, "page_bounds", 4, kBoundsDims);
  CheckDim(page_bounds, "page_bounds", 1, 2, "the least and the greatest");
  CheckLastDimContiguous(page_bounds, "page_bounds");
}

void CheckTable(const TensorView& kv_len, const TensorView& kv_page_indptr, const TensorView& kv_page_indices, const Place& place) {
  CheckIndex(kv_len, "kv_len", place);
  CheckIndex(kv_page_indptr, "kv_page_indptr", place);
  CheckIndex(kv_page_indices, "kv_page_indices", place);
  CheckDim(kv_page_indptr, "kv_page_indptr", 0, kv_len.size(0) + 1, "one more than kv_len has entries");
}

void CheckScoreTensor(const TensorView& scores, int64_t num_requests, const Place& place) {
  CheckPlace(scores, "scores", place);
  CheckRank(scores, "scores", 3, "[num_requests, num_kv_heads, max_pages]");
  CheckDType(scores, "scores", DLDataType{kDLFloat, 32, 1}, "scores are float32");
  CheckLastDimContiguous(scores, "scores");
  CheckDim(scores, "scores", 0, num_requests, "entries of kv_len");
}

void CheckPageSize(int64_t page_size) {
  if (page_size >= 1 && page_size <= kMaxInt32) return;
  TVM_INFER_THROW(ArgumentError) << "argument `page_size` is " << page_size << "; it must be the cache's, at least 1";
}

}  // namespace

void CheckBoundsFitCache(const TensorView& page_bounds, const CacheShape& shape, const Place& place) {
  CheckBounds(page_bounds, place);
  CheckDim(page_bounds, "page_bounds", 0, shape.num_pages, "pages of the cache");
  CheckDim(page_bounds, "page_bounds", 2, shape.num_kv_heads, "KV heads of the cache");
  CheckDim(page_bounds, "page_bounds", 3, shape.head_dim, "head_dim of the cache");
  CheckDTypePair(CheckFloat(page_bounds, "page_bounds"), "page_bounds", shape.dtype, "k_cache");
}

int32_t CheckScores(const TensorView& q, const TensorView& page_bounds, const TensorView& kv_len, const TensorView& kv_page_indptr,
                    const TensorView& kv_page_indices, int64_t page_size, int64_t is_sum, const TensorView& scores, const Place& place) {
  CheckFloat(q, "q");
  CheckRank(q, "q", 3, "[num_requests, num_qo_heads, head_dim]");
  CheckLastDimContiguous(q, "q");
  CheckBounds(page_bounds, place);
  CheckDType(page_bounds, "page_bounds", q.dtype(), "as q");
  CheckDim(page_bounds, "page_bounds", 3, q.size(2), "head_dim of q");
  CheckTable(kv_len, kv_page_indptr, kv_page_indices, place);
  CheckDim(q, "q", 0, kv_len.size(0), "entries of kv_len: one query token a request");
  CheckScoreTensor(scores, kv_len.size(0), place);
  const int64_t num_kv_heads = page_bounds.size(2);
  CheckDim(scores, "scores", 1, num_kv_heads, "KV heads of page_bounds");
  if (num_kv_heads < 1 || q.size(1) < 1 || q.size(1) % num_kv_heads != 0) {
    TVM_INFER_THROW(ArgumentError) << "argument `q` has " << q.size(1) << " heads, shape " << ShapeString(q) << ", `page_bounds` has "
                                   << num_kv_heads << "; query heads must be a multiple of KV heads";
  }
  if (q.size(2) < 8 || q.size(2) > 256 || q.size(2) % 8 != 0) {
    TVM_INFER_THROW(ArgumentError) << "argument `q` has head_dim " << q.size(2) << "; it must be a multiple of 8, from 8 to 256";
  }
  CheckPageSize(page_size);
  if (is_sum != 0 && is_sum != 1) {
    TVM_INFER_THROW(ArgumentError) << "argument `is_sum` is " << is_sum << "; it must be 0 (the greatest of a KV head's query heads) or 1";
  }
  return static_cast<int32_t>(num_kv_heads);
}

PageBudget CheckSelection(const TensorView& scores, const TensorView& kv_len, const TensorView& kv_page_indptr,
                          const TensorView& kv_page_indices, int64_t page_size, int64_t num_pages, int64_t num_sink, int64_t num_recent,
                          const TensorView& plan, const TensorView& page_lists, const Place& place) {
  CheckTable(kv_len, kv_page_indptr, kv_page_indices, place);
  CheckScoreTensor(scores, kv_len.size(0), place);
  CheckPageSize(page_size);
  CheckIndex(page_lists, "page_lists", place);
  CheckPlace(plan, "plan", place);
  const PageBudget budget = CheckBudget(page_size, num_pages, num_sink, num_recent);
  CheckDim(page_lists, "page_lists", 0, kv_len.size(0) * scores.size(1) * num_pages, "num_pages for each request and KV head");
  return budget;
}

PageBudget CheckBudget(int64_t page_size, int64_t num_pages, int64_t num_sink, int64_t num_recent) {
  if (num_sink < 0 || num_recent < 1 || num_sink > num_pages || num_recent > num_pages - num_sink) {
    TVM_INFER_THROW(ArgumentError) << "arguments `num_sink` and `num_recent` are " << num_sink << " and " << num_recent << " of lists of "
                                   << num_pages
                                   << " pages; the first must be at least 0, the second at least 1 (the page that is being filled), and "
                                      "both together at most the pages of a list";
  }
  if (num_pages > kMaxInt32 / page_size) {
    TVM_INFER_THROW(ArgumentError) << "argument `num_pages` is " << num_pages << " pages of " << page_size << " tokens; a list may have "
                                   << kMaxInt32 << " tokens";
  }
  return {static_cast<int32_t>(page_size), static_cast<int32_t>(num_pages), static_cast<int32_t>(num_sink),
          static_cast<int32_t>(num_recent)};
}

void CheckLengths(const int32_t* kv_len, int32_t num_requests) {
  for (int32_t r = 0; r < num_requests; ++r) {
    if (kv_len[r] < 0)
      TVM_INFER_THROW(ArgumentError) << "argument `kv_len` is " << kv_len[r] << " for request " << r << "; it must not be negative";
  }
}

void CheckRoom(const int32_t* kv_len, int32_t num_requests, int64_t page_size, int64_t min_pages, int64_t max_pages) {
  for (int32_t r = 0; r < num_requests; ++r) {
    const int64_t num_pages = (kv_len[r] + page_size - 1) / page_size;
    if (num_pages > min_pages && num_pages > max_pages) {
      TVM_INFER_THROW(ArgumentError) << "argument `scores` has room for " << max_pages << " pages of a request; request " << r
                                     << " has kv_len " << kv_len[r] << ", " << num_pages << " pages of " << page_size << " tokens";
    }
  }
}

void CheckSelectionPlans(const PlanHeader& planned, const PlanHeader& plan, const PageBudget& budget, int64_t num_requests,
                         int64_t num_kv_heads) {
  const PlanView of(&planned);
  bool is_full = planned.num_requests == num_requests && planned.num_kv_heads == num_kv_heads &&
                 planned.num_kv_lists == num_requests * num_kv_heads && planned.num_tokens == num_requests;
  for (int32_t l = 0; is_full && l < planned.num_kv_lists; ++l) is_full = of.kv_len()[l] == budget.num_pages * budget.page_size;
  if (!is_full) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `planned` is not a plan of " << num_requests << " requests of one query token and "
                                       << num_kv_heads << " KV heads, each with a list of " << budget.num_pages << " pages of "
                                       << budget.page_size << " tokens; plan with kv_len " << budget.num_pages * budget.page_size
                                       << " for each request and KV head";
  }
  if (plan.bytes_used != planned.bytes_used || plan.num_works != planned.num_works || plan.num_kv_lists != planned.num_kv_lists) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `plan` has another structure than `planned`; it must begin as a copy of it";
  }
}

}  // namespace tvm_infer::ffi_api
