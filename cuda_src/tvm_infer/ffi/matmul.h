// Packed functions of the matrix product.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/string.h>

#include <cstdint>

#define TVM_INFER_MATMUL_FUNCTIONS(V) \
  V(matmul, Matmul)                   \
  V(set_blas, SetBlas)                \
  V(blas_path, BlasPath)

namespace tvm_infer::ffi_api {

// out = a @ b, or a @ b.T if transpose_b. float32, on the host.
//   a    [..., m, k], rank >= 2: leading dimensions count as rows, so they must collapse into one stride; last dimension contiguous
//   b    [k, n], or [n, k] if transpose_b; last dimension contiguous
//   out  [..., m, n], leading dimensions as a's; overwritten
// Throws ArgumentError, DTypeError, MissingDependencyError (no BLAS set).
void Matmul(tvm::ffi::TensorView a, tvm::ffi::TensorView b, int64_t transpose_b, tvm::ffi::TensorView out);

// Opens the BLAS library at `path`, symbols `prefix` + "cblas_sgemm" …, for this process; returns the kernels it chose ("SkylakeX"), or "".
tvm::ffi::String SetBlas(tvm::ffi::String path, tvm::ffi::String prefix);

// The library in force, or "".
tvm::ffi::String BlasPath();

}  // namespace tvm_infer::ffi_api
