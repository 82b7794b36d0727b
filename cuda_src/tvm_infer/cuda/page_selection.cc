#include "tvm_infer/cuda/page_selection.h"

#include <algorithm>
#include <string>

#include "tvm_infer/cuda/driver.h"
#include "tvm_infer/cuda/kernels.h"
#include "tvm_infer/error.h"

namespace tvm_infer::cuda {
namespace {

CachedKernel& BoundsKernel(DTypeTag dtype, DTypeTag kv_dtype) {
  const auto make = [](DTypeTag of, DTypeTag keys) {
    return new CachedKernel(std::string("page_bounds_") + Suffix(of) + (of == keys ? "" : std::string("_") + Suffix(keys)));
  };
  constexpr DTypeTag kFloat16 = DTypeTag::kFloat16, kBFloat16 = DTypeTag::kBFloat16;
  static CachedKernel* const kernels[2][3] = {
      {make(kFloat16, kFloat16), make(kFloat16, DTypeTag::kFloat8E4M3), make(kFloat16, DTypeTag::kFloat8E5M2)},
      {make(kBFloat16, kBFloat16), make(kBFloat16, DTypeTag::kFloat8E4M3), make(kBFloat16, DTypeTag::kFloat8E5M2)}};
  const int keys = kv_dtype == DTypeTag::kFloat8E4M3 ? 1 : kv_dtype == DTypeTag::kFloat8E5M2 ? 2 : 0;
  return *kernels[dtype == kBFloat16][keys];
}

CachedKernel& ScoresKernel(DTypeTag dtype) {
  static auto* const fp16 = new CachedKernel("page_scores_fp16");
  static auto* const bf16 = new CachedKernel("page_scores_bf16");
  return *(dtype == DTypeTag::kBFloat16 ? bf16 : fp16);
}

CachedKernel& SelectKernel() {
  static auto* const cached = new CachedKernel("select_pages");
  return *cached;
}

// A CTA for each list, and more; a grid has fewer than 2^31.
void CheckGrid(int64_t num_lists, int64_t ctas_per_list) {
  if (num_lists * ctas_per_list <= INT32_MAX) return;
  TVM_INFER_THROW(ArgumentError) << "argument `kv_len` and the KV heads make " << num_lists
                                 << " lists, more than a launch has room for; select pages for fewer requests at once";
}

}  // namespace

void LaunchPageBounds(int32_t device_id, void* stream, DTypeTag dtype, DTypeTag kv_dtype, const PageBoundsParams& params) {
  if (params.append.num_kv_heads == 0) return;
  const Kernel& kernel = BoundsKernel(dtype, kv_dtype).Get(device_id, stream);
  // How many tokens there are the host does not know.
  const int64_t grid = int64_t{GetDevice(device_id).num_sms} * kernel.info.ctas_per_sm;
  void* args[] = {const_cast<PageBoundsParams*>(&params)};
  LaunchKernel(kernel, static_cast<int32_t>(grid), stream, args);
}

void LaunchPageScores(int32_t device_id, void* stream, DTypeTag dtype, PageScoresParams params) {
  const int64_t num_lists = int64_t{params.num_requests} * params.num_kv_heads;
  if (num_lists == 0 || params.max_pages <= params.min_pages) return;
  const Kernel& kernel = ScoresKernel(dtype).Get(device_id, stream);
  // A CTA for each turn of its warps, 64 pages, where all of max_pages are used; but not many more than there are places for: requests with
  // fewer pages leave theirs at once, which takes time, too.
  constexpr int64_t kPlaces = 8;  // for each CTA of an SM
  const int64_t most = std::max<int64_t>(1, kPlaces * kernel.info.ctas_per_sm * GetDevice(device_id).num_sms / num_lists);
  const int64_t turns = (int64_t{params.max_pages} + kernel.info.threads / 2 - 1) / (kernel.info.threads / 2);
  params.ctas_per_list = static_cast<int32_t>(std::min(turns, most));
  CheckGrid(num_lists, params.ctas_per_list);
  void* args[] = {&params};
  LaunchKernel(kernel, static_cast<int32_t>(num_lists * params.ctas_per_list), stream, args);
}

void LaunchSelectPages(int32_t device_id, void* stream, const SelectPagesParams& params) {
  const int64_t num_lists = int64_t{params.num_requests} * params.num_kv_heads;
  if (num_lists == 0) return;
  CheckGrid(num_lists + kSelectPagesPlanCtas, 1);
  const Kernel& kernel = SelectKernel().Get(device_id, stream);
  void* args[] = {const_cast<SelectPagesParams*>(&params)};
  LaunchKernel(kernel, static_cast<int32_t>(num_lists) + kSelectPagesPlanCtas, stream, args);
}

void LoadPageSelection(int32_t device_id, void* stream, DTypeTag dtype, DTypeTag kv_dtype) {
  for (CachedKernel* kernel : {&BoundsKernel(dtype, kv_dtype), &ScoresKernel(dtype), &SelectKernel()}) kernel->Get(device_id, stream);
}

}  // namespace tvm_infer::cuda
