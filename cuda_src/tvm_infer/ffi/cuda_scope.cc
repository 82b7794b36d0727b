#include "tvm_infer/ffi/cuda_scope.h"

#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include <string>

#include "tvm_infer/cuda/kernels.h"

namespace tvm_infer::ffi_api {
namespace {

constexpr int64_t kAlignment = 16;  // bytes of one copy: cp.async, vector loads and stores, the copy engine's strides

// Looked up when a kernel is missing, not when the library is loaded: a compiled model runs without Python, and may never need it.
std::string JitCubin(const std::string& name, const std::string& arch) {
  const auto jit = tvm::ffi::Function::GetGlobal("tvm_infer.jit_cubin");
  if (!jit.has_value()) return "";
  return std::string(jit.value()(tvm::ffi::String(name), tvm::ffi::String(arch)).cast<tvm::ffi::Bytes>());
}

[[noreturn]] void ThrowMisaligned(const TensorView& tensor, const char* name, int axis) {
  TVM_INFER_THROW(ArgumentError) << "argument `" << name << "`, shape " << ShapeString(tensor) << ", has stride " << Stride(tensor, axis)
                                 << " in dimension " << axis << ", " << Stride(tensor, axis) * tensor.dtype().bits / 8
                                 << " bytes; on CUDA strides must be multiples of " << kAlignment
                                 << " bytes, and not negative. Make it contiguous, or pad its rows";
}

// NOTE: before main, so that every binding finds it, whichever is called first. It registers nothing with tvm-ffi.
[[maybe_unused]] const bool provider_is_set = (cuda::SetCubinProvider(JitCubin), true);

}  // namespace

CudaScope::CudaScope(DLDevice device)
    : device_id_(device.device_id), guard_(device.device_id), stream_(TVMFFIEnvGetStream(kDLCUDA, device.device_id)) {}

std::vector<int32_t> CudaScope::ToHost(const TensorView& tensor) const {
  std::vector<int32_t> host(static_cast<size_t>(tensor.numel()));
  if (!host.empty()) cuda::CopyToHost(host.data(), DataPtr<void>(tensor), host.size() * sizeof(int32_t), stream_);
  return host;
}

void CheckAligned(const TensorView& tensor, const char* name) {
  const auto address = reinterpret_cast<uintptr_t>(DataPtr<void>(tensor));
  if (tensor.numel() == 0 || address % kAlignment == 0) return;
  TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` begins " << address % kAlignment << " bytes behind a multiple of "
                                 << kAlignment << " (byte_offset " << tensor.byte_offset() << "); on CUDA it must begin on a boundary of "
                                 << kAlignment << " bytes. Copy it, or slice it elsewhere";
}

void CheckAlignedRows(const TensorView& tensor, const char* name) {
  if (tensor.numel() == 0) return;
  CheckAligned(tensor, name);
  for (int axis = 0; axis < tensor.ndim() - 1; ++axis) {
    const int64_t bytes = Stride(tensor, axis) * tensor.dtype().bits / 8;
    if (tensor.size(axis) > 1 && (bytes < 0 || bytes % kAlignment != 0)) ThrowMisaligned(tensor, name, axis);
  }
}

}  // namespace tvm_infer::ffi_api
