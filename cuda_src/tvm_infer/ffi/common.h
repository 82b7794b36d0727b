// Steps that every binding shares: validate arguments, find their memory, pass on the core's errors.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/optional.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include "tvm_infer/cpu/attention.h"
#include "tvm_infer/error.h"

namespace tvm_infer::ffi_api {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

// Bumped when a packed function's arguments, the Plan or an object's layout change. A compiled model carries the number.
inline constexpr int64_t kAbiVersion = 5;

// The tensor's first element. TVM passes views by byte_offset, which TensorView::data_ptr() ignores: never call that one.
template <typename T = void>
inline T* DataPtr(const TensorView& tensor) {
  return reinterpret_cast<T*>(static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset());  // lint: the one allowed data_ptr()
}
template <typename T = void>
inline T* DataPtr(const Optional<TensorView>& tensor) {
  return tensor.has_value() ? DataPtr<T>(tensor.value()) : nullptr;
}

// Elements between neighbours along `axis`. Generated code passes dense tensors with no strides at all (a null pointer), which
// TensorView::stride() would read: never call that one.
inline int64_t Stride(const TensorView& tensor, int axis) {
  if (!tensor.IsContiguous()) return tensor.stride(axis);  // lint: the one allowed stride()
  int64_t stride = 1;
  for (int i = tensor.ndim() - 1; i > axis; --i) stride *= tensor.size(i);
  return stride;
}

// Runs `f`, turning the core's Error into an ffi::Error of the same kind (a class of tvm_infer/errors.py).
template <typename F>
inline auto Guarded(F&& f) {
  try {
    return std::forward<F>(f)();
  } catch (const Error& e) {
    throw tvm::ffi::Error(e.kind(), e.what(), "");
  }
}

std::string ShapeString(const TensorView& tensor);  // "[3, 8, 128]"
std::string DTypeString(DLDataType dtype);          // "float16"
std::string DeviceString(DLDevice device);          // "cuda:0"

// Where the tensors of a call are: the device of the one that chose the executor.
struct Place {
  DLDevice device;        // kDLCPU or kDLCUDA
  const char* chosen_by;  // the argument, for messages
  bool is_cuda() const { return device.device_type == kDLCUDA; }
};
inline constexpr Place kHost{{kDLCPU, 0}, ""};

// The executor for a tensor's device: kHost (pinned memory counts as host memory) or a CUDA device. Throws ExecutorError for others.
Place PlaceOf(const TensorView& tensor, const char* name);
// Throws ArgumentError naming both devices where `tensor` is on another than `place`; ExecutorError where that is the host.
void CheckPlace(const TensorView& tensor, const char* name, const Place& place);

// Throws ArgumentError / DTypeError naming `name`, what it is and what it should be.
void CheckCpu(const TensorView& tensor, const char* name);
void CheckRank(const TensorView& tensor, const char* name, int rank, const char* dims);
void CheckDim(const TensorView& tensor, const char* name, int axis, int64_t expected, const char* expected_what);
void CheckLastDimContiguous(const TensorView& tensor, const char* name);
void CheckDType(const TensorView& tensor, const char* name, DLDataType expected, const char* why);
void CheckContiguous(const TensorView& tensor, const char* name);
// int32, rank 1, contiguous, at that place.
void CheckIndex(const TensorView& tensor, const char* name, const Place& place = kHost);
// float32, float16 or bfloat16.
cpu::DType CheckFloat(const TensorView& tensor, const char* name);

}  // namespace tvm_infer::ffi_api
