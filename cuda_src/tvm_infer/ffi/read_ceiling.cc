#include "tvm_infer/ffi/read_ceiling.h"

#include <tvm/ffi/extra/c_env_api.h>

#include <cstdint>

#include "tvm_infer/cuda/read_ceiling.h"
#include "tvm_infer/ffi/common.h"

namespace tvm_infer::ffi_api {

void ReadCeiling(TensorView x, TensorView sum) {
  return Guarded([&] {
    const DLDevice device = x.device();
    if (device.device_type != kDLCUDA) {
      TVM_INFER_THROW(ArgumentError) << "argument `x` is on device type " << static_cast<int>(device.device_type)
                                     << "; it must be on a CUDA device (type " << static_cast<int>(kDLCUDA)
                                     << "). On the host, tvm_infer.cpu_stream_read measures the same";
    }
    if (sum.device().device_type != device.device_type || sum.device().device_id != device.device_id) {
      TVM_INFER_THROW(ArgumentError) << "argument `sum` is on device type " << static_cast<int>(sum.device().device_type) << ", number "
                                     << sum.device().device_id << "; it must be where `x` is: CUDA device " << device.device_id;
    }
    CheckContiguous(x, "x");
    CheckDType(sum, "sum", DLDataType{kDLInt, 32, 1}, "a sum of 32-bit words");
    CheckRank(sum, "sum", 1, "one number");
    CheckDim(sum, "sum", 0, 1, "one number");
    const int64_t bytes = x.numel() * x.dtype().bits * x.dtype().lanes / 8;
    if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(DataPtr(x)) % 16 != 0) {
      TVM_INFER_THROW(ArgumentError) << "argument `x` has " << bytes << " bytes at an address that is "
                                     << reinterpret_cast<uintptr_t>(DataPtr(x)) % 16
                                     << " modulo 16; both must be multiples of 16, because it is read in units of 16 bytes";
    }
    cuda::LaunchReadCeiling(device.device_id, TVMFFIEnvGetStream(kDLCUDA, device.device_id), DataPtr(x), bytes, DataPtr<uint32_t>(sum));
  });
}

}  // namespace tvm_infer::ffi_api
