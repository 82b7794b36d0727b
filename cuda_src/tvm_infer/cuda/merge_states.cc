#include "tvm_infer/cuda/merge_states.h"

#include <algorithm>

#include "tvm_infer/cuda/driver.h"
#include "tvm_infer/cuda/kernels.h"
#include "tvm_infer/error.h"

namespace tvm_infer::cuda {
namespace {

constexpr int64_t kWarp = 32;
constexpr int64_t kVectorBytes = 16;

CachedKernel& KernelOf(DTypeTag dtype) {
  static auto* const kernels = new CachedKernel[3]{CachedKernel(std::string("merge_states_") + Suffix(DTypeTag::kFloat32)),
                                                   CachedKernel(std::string("merge_states_") + Suffix(DTypeTag::kFloat16)),
                                                   CachedKernel(std::string("merge_states_") + Suffix(DTypeTag::kBFloat16))};
  return kernels[static_cast<int>(dtype)];
}

}  // namespace

void LaunchMergeStates(int32_t device_id, void* stream, DTypeTag dtype, const MergeStatesParams& params) {
  if (params.num_rows == 0 || params.num_heads == 0 || params.head_dim == 0) return;
  const int64_t pairs = static_cast<int64_t>(params.num_rows) * params.num_heads;
  if (pairs > INT32_MAX) {
    TVM_INFER_THROW(ArgumentError) << "argument `o_a` has " << params.num_rows << " rows of " << params.num_heads
                                   << " heads; at most 2^31 - 1 heads in all are merged by one call. Merge the rows in several calls";
  }
  const Kernel& kernel = KernelOf(dtype).Get(device_id, stream);
  const int64_t element_bytes = dtype == DTypeTag::kFloat32 ? 4 : 2;
  const int64_t vectors = params.head_dim * element_bytes / kVectorBytes;
  const int64_t pairs_of_warp = std::max<int64_t>(1, kWarp / vectors);
  const int64_t pairs_of_cta = pairs_of_warp * (kernel.info.threads / kWarp);
  const int64_t grid = std::min<int64_t>((pairs + pairs_of_cta - 1) / pairs_of_cta, GetDevice(device_id).num_sms * kernel.info.ctas_per_sm);
  void* args[] = {const_cast<MergeStatesParams*>(&params)};
  LaunchKernel(kernel, static_cast<int32_t>(grid), stream, args);
}

}  // namespace tvm_infer::cuda
