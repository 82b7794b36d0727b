#include "tvm_infer/cuda/copy_pages.h"

#include <algorithm>

#include "tvm_infer/cuda/driver.h"
#include "tvm_infer/cuda/kernels.h"

namespace tvm_infer::cuda {

void LaunchCopyPages(int32_t device_id, void* stream, const CopyPagesParams& params) {
  if (params.num_copies == 0) return;
  static auto* const cached = new CachedKernel("copy_pages");
  const Kernel& kernel = cached->Get(device_id, stream);
  const int64_t tasks = int64_t{params.num_copies} * params.num_layers;
  const int64_t grid = std::min<int64_t>(tasks, GetDevice(device_id).num_sms * kernel.info.ctas_per_sm);
  void* args[] = {const_cast<CopyPagesParams*>(&params)};
  LaunchKernel(kernel, static_cast<int32_t>(grid), stream, args);
}

}  // namespace tvm_infer::cuda
