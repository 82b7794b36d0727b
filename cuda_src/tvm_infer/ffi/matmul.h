// Packed functions of the matrix product.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/string.h>

#include <cstdint>

#define TVM_INFER_MATMUL_FUNCTIONS(V) \
  V(matmul, Matmul)                   \
  V(matmul_add, MatmulAdd)            \
  V(set_blas, SetBlas)                \
  V(blas_path, BlasPath)

namespace tvm_infer::ffi_api {

// out = a @ b, or a @ b.T if transpose_b, where the tensors lie: on the host with a BLAS, on a CUDA device with cuBLASLt on its current
// stream (cuda/matmul_workspace.h: what streams and graphs may share).
//   a    [..., m, k], rank >= 2: leading dimensions count as rows, so they must collapse into one stride; last dimension contiguous
//   b    [k, n], or [n, k] if transpose_b; last dimension contiguous
//   out  [..., m, n], leading dimensions as a's; overwritten
// On the host all are float32. On CUDA a and b are both float16, bfloat16 or float32; out is that or float32; sums are float32.
// Throws ArgumentError, DTypeError, MissingDependencyError (no BLAS, no cuBLASLt), ExecutorError, and on CUDA WorkspaceError, DeviceError.
void Matmul(tvm::ffi::TensorView a, tvm::ffi::TensorView b, int64_t transpose_b, tvm::ffi::TensorView out);

// out = a @ b + c, or a @ b.T + c if transpose_b: as above, where c counts as one summand more: it is added in float32, before the one
// rounding.
//   c    [..., m, n] of out's dtype, leading dimensions as out's; last dimension contiguous. It is out itself (the same first element and
//        row stride), whose values are then replaced, or shares no element with it.
void MatmulAdd(tvm::ffi::TensorView a, tvm::ffi::TensorView b, int64_t transpose_b, tvm::ffi::TensorView c, tvm::ffi::TensorView out);

// Opens the BLAS library at `path`, symbols `prefix` + "cblas_sgemm" …, for this process; returns the kernels it chose ("SkylakeX"), or "".
tvm::ffi::String SetBlas(tvm::ffi::String path, tvm::ffi::String prefix);

// The library in force, or "".
tvm::ffi::String BlasPath();

}  // namespace tvm_infer::ffi_api
