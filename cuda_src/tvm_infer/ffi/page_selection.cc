#include "tvm_infer/ffi/page_selection.h"

#include "tvm_infer/cpu/page_selection.h"
#include "tvm_infer/ffi/common.h"
#include "tvm_infer/ffi/page_selection_checks.h"
#include "tvm_infer/ffi/page_selection_cuda.h"
#include "tvm_infer/ffi/value_checks.h"

namespace tvm_infer::ffi_api {
namespace {

cpu::PageBounds HostBounds(const TensorView& bounds) {
  return {CheckFloat(bounds, "page_bounds"), DataPtr<void>(bounds), Stride(bounds, 0), Stride(bounds, 1), Stride(bounds, 2)};
}

// Request by request, on the host: as many lengths as tables, none negative, pages enough.
void CheckHostTable(const TensorView& kv_len, const TensorView& kv_page_indptr, const TensorView& kv_page_indices, int64_t page_size,
                    int64_t num_pages) {
  const auto num_requests = static_cast<int32_t>(kv_len.size(0));
  const auto* lengths = DataPtr<const int32_t>(kv_len);
  CheckLengths(lengths, num_requests);
  const PageTable table{DataPtr<const int32_t>(kv_page_indptr), kv_page_indptr.size(0), DataPtr<const int32_t>(kv_page_indices),
                        kv_page_indices.size(0)};
  CacheShape shape{};
  shape.page_size = static_cast<int32_t>(page_size);
  shape.num_pages = num_pages;
  CheckPageTableValues(table, num_requests, lengths, shape, /*check_pages=*/num_pages > 0 && DebugChecks());
}

// Bounds of the pages with new tokens, of lengths on the host.
void UpdateOnHost(const TensorView& bounds, const cpu::KVSource& cache, const CacheShape& shape, const TensorView& kv_page_indptr,
                  const TensorView& kv_page_indices, const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests) {
  CheckAppendLengths(qo_indptr, kv_len, num_requests);
  CheckPageTableValues({cache.page_indptr, kv_page_indptr.size(0), cache.page_indices, kv_page_indices.size(0)}, num_requests, kv_len,
                       shape, DebugChecks());
  cpu::UpdatePageBoundsArgs args{};
  args.num_requests = num_requests;
  args.num_kv_heads = shape.num_kv_heads;
  args.head_dim = shape.head_dim;
  args.qo_indptr = qo_indptr;
  args.kv_len = kv_len;
  args.cache = cache;
  args.bounds = HostBounds(bounds);
  cpu::UpdatePageBounds(args, 0);
}

}  // namespace

void CheckPageBounds(TensorView page_bounds, TensorView k_cache, OptionalTensor v_cache, int64_t kv_layout) {
  Guarded([&] {
    const Place place = PlaceOf(k_cache, "k_cache");
    cpu::KVSource cache{};
    CheckBoundsFitCache(page_bounds, CheckCache(k_cache, v_cache, kv_layout, place, &cache), place);
    if (place.is_cuda()) on_cuda::CheckPageBounds(page_bounds, k_cache);
  });
}

void UpdatePageBounds(TensorView page_bounds, TensorView qo_indptr, TensorView kv_len, TensorView k_cache, OptionalTensor v_cache,
                      int64_t kv_layout, TensorView kv_page_indptr, TensorView kv_page_indices) {
  Guarded([&] {
    const Place place = PlaceOf(page_bounds, "page_bounds");
    CheckAppendTensors(qo_indptr, kv_len, place);
    cpu::KVSource cache{};
    const CacheShape shape = CheckCache(k_cache, v_cache, kv_layout, place, &cache);
    CheckPageTable(kv_page_indptr, kv_page_indices, place, &cache);
    CheckBoundsFitCache(page_bounds, shape, place);
    CheckDim(kv_page_indptr, "kv_page_indptr", 0, kv_len.size(0) + 1, "one more than kv_len has entries");
    if (place.is_cuda()) {
      return on_cuda::UpdatePageBounds(place, page_bounds, {&qo_indptr, &kv_len}, k_cache, shape, cache, kv_page_indptr, kv_page_indices);
    }
    UpdateOnHost(page_bounds, cache, shape, kv_page_indptr, kv_page_indices, DataPtr<int32_t>(qo_indptr), DataPtr<int32_t>(kv_len),
                 static_cast<int32_t>(kv_len.size(0)));
  });
}

void UpdateBoundsByPlan(TensorView page_bounds, TensorView plan, int64_t num_qo_heads, TensorView k_cache, OptionalTensor v_cache,
                        int64_t kv_layout, TensorView kv_page_indptr, TensorView kv_page_indices) {
  Guarded([&] {
    const Place place = PlaceOf(page_bounds, "page_bounds");
    cpu::KVSource cache{};
    const CacheShape shape = CheckCache(k_cache, v_cache, kv_layout, place, &cache);
    CheckPageTable(kv_page_indptr, kv_page_indices, place, &cache);
    CheckBoundsFitCache(page_bounds, shape, place);
    if (place.is_cuda()) {
      return on_cuda::UpdatePageBounds(place, page_bounds, {nullptr, nullptr, &plan, num_qo_heads}, k_cache, shape, cache, kv_page_indptr,
                                       kv_page_indices);
    }
    const PlanHeader& header = CheckPlan(plan);
    CheckPlanFitsCache(header, shape);
    if (num_qo_heads != int64_t{header.num_kv_heads} * header.group_size) {
      TVM_INFER_THROW(PlanMismatchError) << "argument `num_qo_heads` is " << num_qo_heads << ", but the plan was made for "
                                         << int64_t{header.num_kv_heads} * header.group_size << "; plan with this num_qo_heads";
    }
    CheckPlanAppends(header);
    UpdateOnHost(page_bounds, cache, shape, kv_page_indptr, kv_page_indices, PlanView(&header).qo_indptr(), PlanView(&header).kv_len(),
                 header.num_requests);
  });
}

void PageScores(TensorView q, TensorView page_bounds, TensorView kv_len, TensorView kv_page_indptr, TensorView kv_page_indices,
                int64_t page_size, int64_t is_sum, int64_t min_pages, TensorView scores) {
  Guarded([&] {
    const Place place = PlaceOf(q, "q");
    if (min_pages < 0 || min_pages > INT32_MAX) {
      TVM_INFER_THROW(ArgumentError) << "argument `min_pages` is " << min_pages << "; it must be from 0 to " << INT32_MAX;
    }
    const int32_t num_kv_heads = CheckScores(q, page_bounds, kv_len, kv_page_indptr, kv_page_indices, page_size, is_sum, scores, place);
    if (place.is_cuda()) {
      return on_cuda::PageScores(place, q, page_bounds, kv_len, kv_page_indptr, kv_page_indices, page_size, is_sum != 0, min_pages, scores);
    }
    CheckHostTable(kv_len, kv_page_indptr, kv_page_indices, page_size, page_bounds.size(0));
    CheckRoom(DataPtr<const int32_t>(kv_len), static_cast<int32_t>(kv_len.size(0)), page_size, min_pages, scores.size(2));
    cpu::PageScoresArgs args{};
    args.num_requests = static_cast<int32_t>(kv_len.size(0));
    args.num_qo_heads = static_cast<int32_t>(q.size(1));
    args.num_kv_heads = num_kv_heads;
    args.head_dim = static_cast<int32_t>(q.size(2));
    args.page_size = static_cast<int32_t>(page_size);
    args.is_sum = is_sum != 0;
    args.kv_len = DataPtr<const int32_t>(kv_len);
    args.dtype = CheckFloat(q, "q");
    args.q = DataPtr<void>(q);
    args.q_token_stride = Stride(q, 0);
    args.q_head_stride = Stride(q, 1);
    args.page_indptr = DataPtr<const int32_t>(kv_page_indptr);
    args.page_indices = DataPtr<const int32_t>(kv_page_indices);
    args.bounds = HostBounds(page_bounds);
    args.scores = DataPtr<float>(scores);
    args.score_request_stride = Stride(scores, 0);
    args.score_head_stride = Stride(scores, 1);
    args.min_pages = static_cast<int32_t>(min_pages);
    cpu::PageScores(args, 0);
  });
}

void SelectPages(TensorView scores, TensorView kv_len, TensorView kv_page_indptr, TensorView kv_page_indices, int64_t page_size,
                 int64_t num_pages, int64_t num_sink, int64_t num_recent, TensorView planned, TensorView plan, TensorView page_lists) {
  Guarded([&] {
    const Place place = PlaceOf(scores, "scores");
    const PageBudget budget = CheckSelection(scores, kv_len, kv_page_indptr, kv_page_indices, page_size, num_pages, num_sink, num_recent,
                                             plan, page_lists, place);
    if (DataPtr<const void>(planned) == DataPtr<const void>(plan)) {
      TVM_INFER_THROW(ArgumentError)
          << "argument `plan` is the buffer of `planned`, whose works end where the lists end; pass a copy of it";
    }
    if (place.is_cuda()) {
      return on_cuda::SelectPages(place, scores, kv_len, kv_page_indptr, kv_page_indices, budget, planned, plan, page_lists);
    }
    CheckHostTable(kv_len, kv_page_indptr, kv_page_indices, page_size, 0);
    CheckRoom(DataPtr<const int32_t>(kv_len), static_cast<int32_t>(kv_len.size(0)), page_size, budget.num_pages, scores.size(2));
    CheckSelectionPlans(CheckPlan(planned), CheckPlan(plan), budget, kv_len.size(0), scores.size(1));
    cpu::SelectPagesArgs args{};
    args.num_requests = static_cast<int32_t>(kv_len.size(0));
    args.num_kv_heads = static_cast<int32_t>(scores.size(1));
    args.budget = budget;
    args.kv_len = DataPtr<const int32_t>(kv_len);
    args.page_indptr = DataPtr<const int32_t>(kv_page_indptr);
    args.page_indices = DataPtr<const int32_t>(kv_page_indices);
    args.scores = DataPtr<const float>(scores);
    args.score_request_stride = Stride(scores, 0);
    args.score_head_stride = Stride(scores, 1);
    args.lists = DataPtr<int32_t>(page_lists);
    args.planned = DataPtr<const void>(planned);
    args.plan = DataPtr<void>(plan);
    cpu::SelectPages(args, 0);
  });
}

}  // namespace tvm_infer::ffi_api
