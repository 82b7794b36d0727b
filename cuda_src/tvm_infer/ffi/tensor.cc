#include "tvm_infer/ffi/tensor.h"

#include <utility>
#include <vector>

#include "tvm_infer/cpu/stream.h"
#include "tvm_infer/ffi/common.h"

namespace tvm_infer::ffi_api {
namespace {

// Keeps the owner of the memory alive instead of allocating.
struct SharedMemory {
  tvm::ffi::Tensor owner;
  void AllocData(DLTensor* tensor) {
    tensor->data = owner.data_ptr();  // lint: byte_offset is carried over below
    tensor->byte_offset = owner.byte_offset();
  }
  void FreeData(DLTensor*) {}
};

}  // namespace

tvm::ffi::Tensor ViewAs(tvm::ffi::Tensor tensor, DLDataType dtype) {
  return Guarded([&] {
    if (tensor.dtype().bits * tensor.dtype().lanes != dtype.bits * dtype.lanes) {
      TVM_INFER_THROW(DTypeError) << "argument `tensor` has dtype " << DTypeString(tensor.dtype()) << ", not as wide as "
                                  << DTypeString(dtype) << "; a view keeps the width of elements";
    }
    const tvm::ffi::ShapeView shape = tensor.shape(), strides = tensor.strides();  // lint: a Tensor has strides
    const DLDevice device = tensor.device();
    return tvm::ffi::Tensor::FromNDAllocStrided(SharedMemory{std::move(tensor)}, shape, strides, dtype, device);
  });
}

tvm::ffi::Tensor SplitRows(tvm::ffi::Tensor tensor, int64_t rows) {
  return Guarded([&] {
    const TensorView view(tensor);
    if (view.ndim() < 1 || rows < 1 || view.size(0) % rows != 0) {
      TVM_INFER_THROW(ArgumentError) << "argument `tensor` has shape " << ShapeString(view) << " and `rows` is " << rows
                                     << "; it must be at least 1 and divide the first dimension";
    }
    std::vector<int64_t> shape{view.size(0) / rows, rows}, strides{rows * Stride(view, 0), Stride(view, 0)};
    for (int axis = 1; axis < view.ndim(); ++axis) {
      shape.push_back(view.size(axis));
      strides.push_back(Stride(view, axis));
    }
    const DLDevice device = tensor.device();
    const DLDataType dtype = tensor.dtype();
    return tvm::ffi::Tensor::FromNDAllocStrided(SharedMemory{std::move(tensor)}, tvm::ffi::ShapeView(shape.data(), shape.size()),
                                                tvm::ffi::ShapeView(strides.data(), strides.size()), dtype, device);
  });
}

int64_t CpuStreamRead(TensorView tensor, int64_t num_threads) {
  return Guarded([&] {
    CheckCpu(tensor, "tensor");
    CheckContiguous(tensor, "tensor");
    const int64_t bytes = tensor.numel() * tensor.dtype().bits / 8;
    if (bytes % 64 != 0 || num_threads < 1) {
      TVM_INFER_THROW(ArgumentError) << "argument `tensor` has " << bytes << " bytes and `num_threads` is " << num_threads
                                     << "; bytes must be a multiple of 64, threads at least 1";
    }
    return static_cast<int64_t>(cpu::StreamRead(DataPtr<void>(tensor), bytes, static_cast<int>(num_threads)));
  });
}

}  // namespace tvm_infer::ffi_api
