// out = a @ b or a @ b.T, plus c where there is one, on a CUDA device: our own kernel for a few rows (cuda/gemv.h), else cuBLASLt with one
// algorithm for each problem, found once.
#pragma once

#include <cstdint>

#include "tvm_infer/cuda/dtype.h"

namespace tvm_infer::cuda {

// Row-major matrices of the device; strides in elements. Sums are fp32, also where k is split over CTAs, and are
// rounded to out_dtype once, with c added.
struct MatmulArgs {
  int64_t m, n, k;
  DTypeTag dtype;      // of a and b
  DTypeTag out_dtype;  // dtype, or kFloat32
  const void* a;       // [m, k], row stride lda >= k
  int64_t lda;
  const void* b;  // [k, n], row stride ldb >= n; [n, k], row stride ldb >= k, if transpose_b
  int64_t ldb;
  bool transpose_b;
  void* out;  // [m, n], row stride ldo >= n; what it held is not read
  int64_t ldo;
  bool allow_tf32;  // for fp32: products of inputs rounded to 10 bits of mantissa
  // [m, n] of out_dtype, row stride ldc >= n: added. It is out itself (then ldc is ldo) or shares no element with it. Null: nothing is.
  const void* c = nullptr;
  int64_t ldc = 0;
  bool allow_gemv = true;      // false: cuBLASLt, whatever the number of rows
  bool b_is_constant = false;  // no work on the device that is under way, or will be before this has run, writes b
};

// Launches on the stream; the device's context is current. A problem's first call asks cuBLASLt's heuristic, later ones look it up.
// The result depends on the arguments' values, shapes, strides and on whether each begins on a 16-byte boundary, not on addresses, the
// stream or earlier calls. Where c is out cuBLASLt takes other kernels, some of which round the product before they add. May be captured
// for a graph (matmul_workspace.h says when). Thread safe. Throws Error("MissingDependencyError") without a cuBLASLt,
// Error("WorkspaceError"), Error("DeviceError") with cuBLAS's status.
void LaunchMatmul(int32_t device_id, void* stream, const MatmulArgs& args);

}  // namespace tvm_infer::cuda
