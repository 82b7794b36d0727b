// The packed function that measures how fast a CUDA device reads memory.
#pragma once

#include <tvm/ffi/container/tensor.h>

#define TVM_INFER_READ_CEILING_FUNCTIONS(V) V(read_ceiling, ReadCeiling)

namespace tvm_infer::ffi_api {

// Reads the whole tensor on its device's current stream.
//   x    CUDA, contiguous, 16-byte aligned, a multiple of 16 bytes, any dtype
//   sum  int32 [1] on the same device: the sum of x's 32-bit words, modulo 2^32, is added to it
void ReadCeiling(tvm::ffi::TensorView x, tvm::ffi::TensorView sum);

}  // namespace tvm_infer::ffi_api
