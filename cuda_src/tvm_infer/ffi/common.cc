#include "tvm_infer/ffi/common.h"

#include <tvm/ffi/dtype.h>

#include <sstream>

namespace tvm_infer::ffi_api {

std::string ShapeString(const TensorView& tensor) {
  std::ostringstream os;
  os << "[";
  for (int i = 0; i < tensor.ndim(); ++i) os << (i ? ", " : "") << tensor.size(i);
  os << "]";
  return os.str();
}

std::string DTypeString(DLDataType dtype) { return std::string(tvm::ffi::DLDataTypeToString(dtype)); }

std::string DeviceString(DLDevice device) {
  switch (device.device_type) {
    case kDLCPU:
      return "cpu";
    case kDLCUDAHost:
      return "pinned host memory";
    case kDLCUDA:
      return "cuda:" + std::to_string(device.device_id);
    default:
      return "device type " + std::to_string(static_cast<int>(device.device_type)) + ":" + std::to_string(device.device_id);
  }
}

Place PlaceOf(const TensorView& tensor, const char* name) {
  const DLDevice device = tensor.device();
  if (device.device_type == kDLCPU || device.device_type == kDLCUDAHost) return kHost;
  if (device.device_type == kDLCUDA) return {device, name};
  TVM_INFER_THROW(ExecutorError) << "argument `" << name << "` is on " << DeviceString(device)
                                 << ", for which there is no executor. Executors: cpu for host tensors, cuda for tensors on CUDA devices. "
                                 << "Move the tensors to one of them";
}

void CheckPlace(const TensorView& tensor, const char* name, const Place& place) {
  if (!place.is_cuda()) return CheckCpu(tensor, name);
  const DLDevice device = tensor.device();
  if (device.device_type == kDLCUDA && device.device_id == place.device.device_id) return;
  TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` is on " << DeviceString(device) << ", `" << place.chosen_by << "` on "
                                 << DeviceString(place.device) << "; all tensors of a call must be on one device. Move `" << name
                                 << "` there";
}

void CheckCpu(const TensorView& tensor, const char* name) {
  const DLDevice device = tensor.device();
  if (device.device_type == kDLCPU || device.device_type == kDLCUDAHost) return;
  TVM_INFER_THROW(ExecutorError) << "argument `" << name << "` is on " << DeviceString(device)
                                 << "; the cpu executor takes host tensors only. Move it to the host first";
}

void CheckRank(const TensorView& tensor, const char* name, int rank, const char* dims) {
  if (tensor.ndim() != rank) {
    TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` has rank " << tensor.ndim() << ", shape " << ShapeString(tensor)
                                   << "; it must have rank " << rank << ": " << dims;
  }
}

void CheckDim(const TensorView& tensor, const char* name, int axis, int64_t expected, const char* expected_what) {
  if (tensor.size(axis) != expected) {
    TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` has shape " << ShapeString(tensor) << "; dimension " << axis << " must be "
                                   << expected << " (" << expected_what << ")";
  }
}

void CheckLastDimContiguous(const TensorView& tensor, const char* name) {
  const int last = tensor.ndim() - 1;
  if (tensor.size(last) > 1 && tensor.numel() > 0 && Stride(tensor, last) != 1) {
    TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` has stride " << Stride(tensor, last) << " in its last dimension, shape "
                                   << ShapeString(tensor)
                                   << "; elements of a row must be adjacent (stride 1). Make it contiguous in that dimension";
  }
}

void CheckDType(const TensorView& tensor, const char* name, DLDataType expected, const char* why) {
  const DLDataType actual = tensor.dtype();
  if (actual.code != expected.code || actual.bits != expected.bits || actual.lanes != expected.lanes) {
    TVM_INFER_THROW(DTypeError) << "argument `" << name << "` has dtype " << DTypeString(actual) << "; it must be " << DTypeString(expected)
                                << " (" << why << ")";
  }
}

void CheckContiguous(const TensorView& tensor, const char* name) {
  if (!tensor.IsContiguous()) {
    TVM_INFER_THROW(ArgumentError) << "argument `" << name << "`, shape " << ShapeString(tensor)
                                   << ", is not contiguous; copy it to a contiguous tensor first";
  }
}

void CheckIndex(const TensorView& tensor, const char* name, const Place& place) {
  CheckPlace(tensor, name, place);
  CheckRank(tensor, name, 1, "a list of indices");
  CheckDType(tensor, name, DLDataType{kDLInt, 32, 1}, "indices are int32");
  CheckContiguous(tensor, name);
}

cpu::DType CheckFloat(const TensorView& tensor, const char* name) {
  const DLDataType dtype = tensor.dtype();
  if (dtype.lanes == 1 && dtype.code == kDLFloat && dtype.bits == 32) return cpu::DType::kFloat32;
  if (dtype.lanes == 1 && dtype.code == kDLFloat && dtype.bits == 16) return cpu::DType::kFloat16;
  if (dtype.lanes == 1 && dtype.code == kDLBfloat && dtype.bits == 16) return cpu::DType::kBFloat16;
  TVM_INFER_THROW(DTypeError) << "argument `" << name << "` has dtype " << DTypeString(dtype)
                              << "; it must be float32, float16 or bfloat16. Cast it first";
}

}  // namespace tvm_infer::ffi_api
