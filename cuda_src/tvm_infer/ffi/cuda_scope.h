// The CUDA half of every binding's "guard and stream, resolve": the device's context current and the stream of the caller's environment.
// cuda_scope.cc also says where missing kernels come from: the global function `tvm_infer.jit_cubin(name, arch) -> bytes`, if there is one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "tvm_infer/cuda/driver.h"
#include "tvm_infer/ffi/common.h"

namespace tvm_infer::ffi_api {

class CudaScope {
 public:
  explicit CudaScope(DLDevice device);

  int32_t device_id() const { return device_id_; }
  void* stream() const { return stream_; }

  // A copy of a contiguous int32 tensor of the device, after the work before it on the stream. Synchronises.
  std::vector<int32_t> ToHost(const TensorView& tensor) const;

 private:
  int32_t device_id_;
  cuda::DeviceGuard guard_;
  void* stream_;
};

// Throws ArgumentError where a row of `tensor` (all dimensions but the last) does not begin on a 16-byte boundary.
void CheckAlignedRows(const TensorView& tensor, const char* name);
void CheckAligned(const TensorView& tensor, const char* name);  // its first element alone

}  // namespace tvm_infer::ffi_api
