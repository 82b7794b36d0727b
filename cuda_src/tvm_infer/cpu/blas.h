// The packaged BLAS that matrix products run on: a shared library that is opened at run time, so that building needs none.
#pragma once

#include <cstdint>
#include <string>

namespace tvm_infer::cpu {

// cblas_sgemm and cblas_sgemv with 32-bit integers; enums as int (C ABI).
using SgemmFn = void (*)(int layout, int trans_a, int trans_b, int m, int n, int k, float alpha, const float* a, int lda, const float* b,
                         int ldb, float beta, float* c, int ldc);
using SgemvFn = void (*)(int layout, int trans, int m, int n, float alpha, const float* a, int lda, const float* x, int incx, float beta,
                         float* y, int incy);

struct Blas {
  SgemmFn sgemm;
  SgemvFn sgemv;
  std::string path;
  std::string core;       // OpenBLAS's name of the kernels it chose ("SkylakeX"), or ""
  bool has_small_kernel;  // its sgemm skips packing where m * n * k <= kSmallMatrixLimit
};

// OpenBLAS's limit for its AVX-512 small-matrix kernels (gemm_small_matrix_permit: 100^3).
inline constexpr int64_t kSmallMatrixLimit = 1000000;

// Opens the library; its symbols are `prefix` + "cblas_sgemm" and so on. One thread a call from then on: our own pool cuts the work.
// Throws Error("ArgumentError") if the file cannot be opened or lacks a symbol; what was set before stays.
void SetBlas(const std::string& path, const std::string& prefix);

// The library in force. Throws Error("MissingDependencyError") if none was set.
const Blas& GetBlas();
bool HasBlas();

}  // namespace tvm_infer::cpu
