#include "tvm_infer/ffi/matmul_cuda.h"

#include <tvm/ffi/function.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "tvm_infer/cuda/cublas_api.h"
#include "tvm_infer/cuda/matmul.h"
#include "tvm_infer/cuda/matmul_workspace.h"
#include "tvm_infer/ffi/cuda_scope.h"

namespace tvm_infer::ffi_api {
namespace {

// Looked up when the first product runs, not when the library is loaded: a compiled model runs without Python.
void EnsureCublas() {
  if (cuda::FindCublas() != nullptr) return;
  const auto find = tvm::ffi::Function::GetGlobal("tvm_infer.find_cublas");
  if (!find.has_value()) return;  // the core looks by itself
  const std::string path(find.value()().cast<tvm::ffi::String>());
  if (!path.empty()) cuda::SetCublas(path);
}

// A setting that is 0 or 1.
bool Setting(const char* name, bool otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? std::strcmp(value, "1") == 0 : otherwise;
}

std::atomic<bool>& Tf32Flag() {
  static std::atomic<bool> flag(Setting("TVM_INFER_MATMUL_TF32", false));
  return flag;
}

std::atomic<bool>& GemvFlag() {
  static std::atomic<bool> flag(Setting("TVM_INFER_MATMUL_GEMV", true));
  return flag;
}

}  // namespace

int64_t LoadCublas(tvm::ffi::String path) {
  return Guarded([&] { return cuda::SetCublas(std::string(path)); });
}

tvm::ffi::String CublasPath() {
  const cuda::CublasLt* cublas = cuda::FindCublas();
  return tvm::ffi::String(cublas != nullptr ? cublas->path : "");
}

bool ExchangeTf32(bool enabled) { return Tf32Flag().exchange(enabled); }

bool ExchangeGemv(bool enabled) { return GemvFlag().exchange(enabled); }

int64_t WorkspaceBytes(int64_t device_id) { return cuda::MatmulWorkspaceBytes(static_cast<int32_t>(device_id)); }

namespace on_cuda {

void CheckMatmulTypes(const TensorView& a, const TensorView& b, const TensorView& out) {
  const cpu::DType dtype = CheckFloat(a, "a");
  CheckDType(b, "b", a.dtype(), "both sides of a product have one dtype; cast one of them");
  if (CheckFloat(out, "out") != dtype && CheckFloat(out, "out") != cpu::DType::kFloat32) {
    TVM_INFER_THROW(DTypeError) << "argument `out` has dtype " << DTypeString(out.dtype()) << "; the product of " << DTypeString(a.dtype())
                                << " matrices is " << DTypeString(a.dtype()) << " or float32. Cast it afterwards";
  }
}

void Matmul(const Place& place, const Product& x, const TensorView& a, const TensorView& b, const TensorView& out) {
  const CudaScope scope(place.device);
  EnsureCublas();
  const cuda::MatmulArgs args{x.a.rows,
                              x.out.cols,
                              x.a.cols,
                              static_cast<cuda::DTypeTag>(CheckFloat(a, "a")),
                              static_cast<cuda::DTypeTag>(CheckFloat(out, "out")),
                              DataPtr<const void>(a),
                              x.a.row_stride,
                              DataPtr<const void>(b),
                              x.b.row_stride,
                              x.transpose_b,
                              DataPtr<void>(out),
                              x.out.row_stride,
                              Tf32Flag().load(std::memory_order_relaxed),
                              x.c.data,
                              x.c.row_stride,
                              GemvFlag().load(std::memory_order_relaxed),
                              x.b_is_constant};
  cuda::LaunchMatmul(scope.device_id(), scope.stream(), args);
}

}  // namespace on_cuda
}  // namespace tvm_infer::ffi_api
