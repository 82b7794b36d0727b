// Packed functions of the matrix product.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/string.h>

#include <cstdint>

#define TVM_INFER_MATMUL_FUNCTIONS(V) \
  V(matmul, Matmul)                   \
  V(matmul_add, MatmulAdd)            \
  V(linear, Linear)                   \
  V(linear_add, LinearAdd)            \
  V(set_blas, SetBlas)                \
  V(blas_path, BlasPath)

namespace tvm_infer::ffi_api {

// out = a @ b, or a @ b.T if transpose_b, where the tensors lie: on the host with a BLAS, on a CUDA device on its current stream, with
// cuBLASLt (cuda/matmul_workspace.h: what streams and graphs may share) or, for a few rows, our own kernel (cuda/gemv.h).
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

// out = x @ weight.T (+ c), weight [n, k], as matmul and matmul_add do with transpose_b, for a weight that is constant: nothing that runs
// on the device, or will run before the call has, writes it. On CUDA it may be read before the work ahead on the stream is done.
void Linear(tvm::ffi::TensorView x, tvm::ffi::TensorView weight, tvm::ffi::TensorView out);
void LinearAdd(tvm::ffi::TensorView x, tvm::ffi::TensorView weight, tvm::ffi::TensorView c, tvm::ffi::TensorView out);

// Opens the BLAS library at `path`, symbols `prefix` + "cblas_sgemm" …, for this process; returns the kernels it chose ("SkylakeX"), or "".
tvm::ffi::String SetBlas(tvm::ffi::String path, tvm::ffi::String prefix);

// The library in force, or "".
tvm::ffi::String BlasPath();

}  // namespace tvm_infer::ffi_api
