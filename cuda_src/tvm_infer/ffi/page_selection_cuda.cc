#include "tvm_infer/ffi/page_selection_cuda.h"

#include <algorithm>
#include <vector>

#include "tvm_infer/cuda/page_selection.h"
#include "tvm_infer/ffi/cuda_launch.h"
#include "tvm_infer/ffi/cuda_scope.h"
#include "tvm_infer/ffi/page_selection_checks.h"
#include "tvm_infer/ffi/value_checks.h"

namespace tvm_infer::ffi_api::on_cuda {
namespace {

cuda::PageBounds BoundsOf(const TensorView& page_bounds) {
  CheckAlignedRows(page_bounds, "page_bounds");
  if (CheckFloat(page_bounds, "page_bounds") == cpu::DType::kFloat32) {
    TVM_INFER_THROW(ExecutorError) << "argument `page_bounds` has dtype float32; the cuda executor has bounds of float16 and bfloat16. "
                                      "Pass those, or host tensors (the cpu executor takes float32)";
  }
  return {DataPtr<void>(page_bounds), Stride(page_bounds, 0), Stride(page_bounds, 1), Stride(page_bounds, 2)};
}

// Copies of lengths and table, checked as those on the host are. Returns the lengths. Synchronises.
std::vector<int32_t> CheckTableValues(const CudaScope& scope, const TensorView& kv_len, const TensorView& kv_page_indptr,
                                      const TensorView& kv_page_indices, const CacheShape& shape) {
  const std::vector<int32_t> lengths = scope.ToHost(kv_len), indptr = scope.ToHost(kv_page_indptr), indices = scope.ToHost(kv_page_indices);
  const auto num_requests = static_cast<int32_t>(kv_len.size(0));
  CheckLengths(lengths.data(), num_requests);
  CheckPageTableValues({indptr.data(), kv_page_indptr.size(0), indices.data(), kv_page_indices.size(0)}, num_requests, lengths.data(),
                       shape,
                       /*check_pages=*/shape.num_pages > 0);
  return lengths;
}

CacheShape PagesOf(int64_t page_size, int64_t num_pages) {
  CacheShape shape{};
  shape.page_size = static_cast<int32_t>(page_size);
  shape.num_pages = num_pages;
  return shape;
}

}  // namespace

void CheckPageBounds(const TensorView& page_bounds, const TensorView& k_cache) {
  CheckAlignedRows(k_cache, "k_cache");
  BoundsOf(page_bounds);
}

void UpdatePageBounds(const Place& place, const TensorView& page_bounds, const NewTokens& tokens, const TensorView& k_cache,
                      const CacheShape& shape, const cpu::KVSource& cache, const TensorView& kv_page_indptr,
                      const TensorView& kv_page_indices) {
  CheckAlignedRows(k_cache, "k_cache");
  cuda::PageBoundsParams params{};
  params.bounds = BoundsOf(page_bounds);
  cuda::AppendParams& append = params.append;
  append.kv_page_indptr = cache.page_indptr;
  append.kv_page_indices = cache.page_indices;
  append.k_cache = const_cast<void*>(cache.k);
  append.k_cache_stride_page = cache.k_page_stride;
  append.k_cache_stride_head = cache.k_head_stride;
  append.k_cache_stride_token = cache.k_token_stride;
  append.num_kv_heads = shape.num_kv_heads;
  append.head_dim = shape.head_dim;
  append.page_size = shape.page_size;
  if (tokens.plan != nullptr) {
    CheckPlanTensor(*tokens.plan, place);
    if (shape.num_kv_heads < 1 || tokens.num_qo_heads % shape.num_kv_heads != 0) {
      TVM_INFER_THROW(ArgumentError) << "argument `num_qo_heads` is " << tokens.num_qo_heads << ", `k_cache` has " << shape.num_kv_heads
                                     << " heads; query heads must be a multiple of KV heads";
    }
    append.plan = DataPtr<const void>(*tokens.plan);
    append.expected.num_kv_heads = shape.num_kv_heads;
    append.expected.group_size = static_cast<int32_t>(tokens.num_qo_heads / shape.num_kv_heads);
    append.expected.max_tokens = append.expected.max_partial_rows = INT32_MAX;  // no business of this kernel's
    append.expected.max_kv_lists = static_cast<int32_t>(kv_page_indptr.size(0)) - 1;
    append.expected.features = cuda::kSharedWorks | cuda::kRowMasks;  // as of an append, which sees nothing of them
  } else {
    append.qo_indptr = DataPtr<const int32_t>(*tokens.qo_indptr);
    append.kv_len = DataPtr<const int32_t>(*tokens.kv_len);
    append.num_requests = static_cast<int32_t>(tokens.kv_len->size(0));
  }
  const CudaScope scope(place.device);
  if (MayCheckValues(scope) && tokens.plan == nullptr) {
    const std::vector<int32_t> qo = scope.ToHost(*tokens.qo_indptr);
    CheckAppendLengths(qo.data(), CheckTableValues(scope, *tokens.kv_len, kv_page_indptr, kv_page_indices, shape).data(),
                       append.num_requests);
  }
  cuda::LaunchPageBounds(scope.device_id(), scope.stream(), ToTag(CheckFloat(page_bounds, "page_bounds")), ToTag(shape.dtype), params);
}

void PageScores(const Place& place, const TensorView& q, const TensorView& page_bounds, const TensorView& kv_len,
                const TensorView& kv_page_indptr, const TensorView& kv_page_indices, int64_t page_size, bool is_sum, int64_t min_pages,
                const TensorView& scores, bool is_own) {
  cuda::PageScoresParams params{};
  params.bounds = BoundsOf(page_bounds);
  CheckAlignedRows(q, "q");
  params.q = DataPtr<void>(q);
  params.q_stride_token = Stride(q, 0);
  params.q_stride_head = Stride(q, 1);
  params.kv_len = DataPtr<const int32_t>(kv_len);
  params.kv_page_indptr = DataPtr<const int32_t>(kv_page_indptr);
  params.kv_page_indices = DataPtr<const int32_t>(kv_page_indices);
  params.scores = DataPtr<float>(scores);
  params.scores_stride_request = Stride(scores, 0);
  params.scores_stride_head = Stride(scores, 1);
  params.num_requests = static_cast<int32_t>(kv_len.size(0));
  params.num_kv_heads = static_cast<int32_t>(scores.size(1));
  params.group_size = static_cast<int32_t>(q.size(1) / scores.size(1));
  params.head_dim = static_cast<int32_t>(q.size(2));
  params.page_size = static_cast<int32_t>(page_size);
  params.max_pages = static_cast<int32_t>(std::min<int64_t>(scores.size(2), INT32_MAX));
  params.min_pages = static_cast<int32_t>(min_pages);
  params.is_sum = is_sum;
  const CudaScope scope(place.device);
  if (!is_own && MayCheckValues(scope)) {
    const std::vector<int32_t> lengths =
        CheckTableValues(scope, kv_len, kv_page_indptr, kv_page_indices, PagesOf(page_size, page_bounds.size(0)));
    CheckRoom(lengths.data(), params.num_requests, page_size, min_pages, scores.size(2));
  }
  cuda::LaunchPageScores(scope.device_id(), scope.stream(), ToTag(CheckFloat(q, "q")), params);
}

void SelectPages(const Place& place, const TensorView& scores, const TensorView& kv_len, const TensorView& kv_page_indptr,
                 const TensorView& kv_page_indices, const PageBudget& budget, const TensorView& planned, const TensorView& plan,
                 const TensorView& page_lists, bool is_own) {
  CheckPlanTensor(plan, place);
  CheckIndex(planned, "planned", place);
  CheckDim(planned, "planned", 0, plan.size(0), "words of plan");
  cuda::SelectPagesParams params{};
  params.scores = DataPtr<const float>(scores);
  params.scores_stride_request = Stride(scores, 0);
  params.scores_stride_head = Stride(scores, 1);
  params.kv_len = DataPtr<const int32_t>(kv_len);
  params.kv_page_indptr = DataPtr<const int32_t>(kv_page_indptr);
  params.kv_page_indices = DataPtr<const int32_t>(kv_page_indices);
  params.lists = DataPtr<int32_t>(page_lists);
  params.planned = DataPtr<const void>(planned);
  params.plan = DataPtr<void>(plan);
  params.budget = budget;
  params.num_requests = static_cast<int32_t>(kv_len.size(0));
  params.num_kv_heads = static_cast<int32_t>(scores.size(1));
  params.max_pages = static_cast<int32_t>(std::min<int64_t>(scores.size(2), INT32_MAX));
  params.plan_bytes = plan.numel() * static_cast<int64_t>(sizeof(int32_t));
  const CudaScope scope(place.device);
  if (!is_own && MayCheckValues(scope)) {
    const std::vector<int32_t> lengths = CheckTableValues(scope, kv_len, kv_page_indptr, kv_page_indices, PagesOf(budget.page_size, 0));
    CheckRoom(lengths.data(), params.num_requests, budget.page_size, budget.num_pages, scores.size(2));
    const std::vector<int32_t> words = scope.ToHost(planned), own = scope.ToHost(plan);
    CheckSelectionPlans(CheckPlanBytes(words.data(), params.plan_bytes), CheckPlanBytes(own.data(), params.plan_bytes), budget,
                        kv_len.size(0), scores.size(1));
  }
  cuda::LaunchSelectPages(scope.device_id(), scope.stream(), params);
}

void SelectOwnPages(const Place& place, const OwnSelection& own, const TensorView& tokens, const TensorView& q, const TensorView& k_cache,
                    const CacheShape& shape, const cpu::KVSource& cache, const TensorView& kv_page_indptr,
                    const TensorView& kv_page_indices) {
  UpdatePageBounds(place, own.page_bounds, {nullptr, nullptr, &tokens, q.size(1)}, k_cache, shape, cache, kv_page_indptr, kv_page_indices);
  PageScores(place, q, own.page_bounds, own.kv_len, own.kv_page_indptr, kv_page_indices, own.budget.page_size, own.is_sum,
             own.budget.num_pages, own.scores, /*is_own=*/true);
  SelectPages(place, own.scores, own.kv_len, own.kv_page_indptr, kv_page_indices, own.budget, own.planned, own.plan, own.page_lists,
              /*is_own=*/true);
}

void UpdateOwnBounds(const Place& place, const TensorView& page_bounds, const NewTokens& tokens, const TensorView& k_cache,
                     const OptionalTensor& v_cache, const TensorView& kv_page_indptr, const TensorView& kv_page_indices) {
  cpu::KVSource cache{};
  const CacheShape shape = CheckCache(k_cache, v_cache, /*kv_layout=*/0, place, &cache);
  CheckPageTable(kv_page_indptr, kv_page_indices, place, &cache);
  UpdatePageBounds(place, page_bounds, tokens, k_cache, shape, cache, kv_page_indptr, kv_page_indices);
}

}  // namespace tvm_infer::ffi_api::on_cuda
