// Packed functions on tensors as such.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>

#define TVM_INFER_TENSOR_FUNCTIONS(V) \
  V(view_as, ViewAs)                  \
  V(cpu_stream_read, CpuStreamRead)

namespace tvm_infer::ffi_api {

// The same memory under another data type of the same width, strides kept. numpy cannot export bfloat16 arrays, but can as uint16.
tvm::ffi::Tensor ViewAs(tvm::ffi::Tensor tensor, DLDataType dtype);

// Reads the whole contiguous host tensor with that many threads: the ceiling that benchmarks quote. Returns a checksum.
int64_t CpuStreamRead(tvm::ffi::TensorView tensor, int64_t num_threads);

}  // namespace tvm_infer::ffi_api
