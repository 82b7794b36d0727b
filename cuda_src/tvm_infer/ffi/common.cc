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

void CheckCpu(const TensorView& tensor, const char* name) {
  if (tensor.device().device_type != kDLCPU) {
    TVM_INFER_THROW(ExecutorError) << "argument `" << name << "` is on device type " << static_cast<int>(tensor.device().device_type)
                                   << "; the cpu executor takes host tensors only. Move it to the host first";
  }
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

void CheckIndex(const TensorView& tensor, const char* name) {
  CheckCpu(tensor, name);
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
