// Packed functions on tensors as such.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>

#define TVM_INFER_TENSOR_FUNCTIONS(V) \
  V(view_as, ViewAs)                  \
  V(split_rows, SplitRows)            \
  V(cpu_stream_read, CpuStreamRead)

namespace tvm_infer::ffi_api {

// The same memory under another data type of the same width, strides kept. numpy cannot export bfloat16 arrays, but can as uint16.
tvm::ffi::Tensor ViewAs(tvm::ffi::Tensor tensor, DLDataType dtype);

// [num_rows, …] as [num_rows / rows, rows, …] of the same memory, strides kept; `rows` divides num_rows.
tvm::ffi::Tensor SplitRows(tvm::ffi::Tensor tensor, int64_t rows);

// Reads the whole contiguous host tensor with that many threads: the ceiling that benchmarks quote. Returns a checksum.
int64_t CpuStreamRead(tvm::ffi::TensorView tensor, int64_t num_threads);

}  // namespace tvm_infer::ffi_api
