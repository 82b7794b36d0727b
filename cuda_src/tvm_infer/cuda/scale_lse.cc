#include "tvm_infer/cuda/scale_lse.h"

#include <algorithm>

#include "tvm_infer/cuda/driver.h"
#include "tvm_infer/cuda/kernels.h"

namespace tvm_infer::cuda {

void LaunchScaleLse(int32_t device_id, void* stream, const ScaleLseParams& params) {
  const int64_t elements = int64_t{params.num_rows} * params.num_heads;
  if (elements == 0) return;
  static auto* const cached = new CachedKernel("scale_lse");
  const Kernel& kernel = cached->Get(device_id, stream);
  const int64_t ctas = (elements + kernel.info.threads - 1) / kernel.info.threads;
  const int64_t grid = std::min<int64_t>(ctas, GetDevice(device_id).num_sms * kernel.info.ctas_per_sm);
  void* args[] = {const_cast<ScaleLseParams*>(&params)};
  LaunchKernel(kernel, static_cast<int32_t>(grid), stream, args);
}

}  // namespace tvm_infer::cuda
