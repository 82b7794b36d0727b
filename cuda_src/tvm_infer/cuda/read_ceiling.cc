#include "tvm_infer/cuda/read_ceiling.h"

#include "tvm_infer/cuda/driver.h"
#include "tvm_infer/cuda/kernels.h"

namespace tvm_infer::cuda {

void LaunchReadCeiling(int32_t device_id, void* stream, const void* data, int64_t bytes, uint32_t* sum) {
  const DeviceGuard guard(device_id);
  const Kernel& kernel = GetKernel(device_id, "read_ceiling", stream);
  ReadCeilingParams params{data, bytes / 16, sum};
  void* arguments[] = {&params};
  LaunchKernel(kernel, GetDevice(device_id).num_sms * kernel.info.ctas_per_sm, stream, arguments);
}

}  // namespace tvm_infer::cuda
