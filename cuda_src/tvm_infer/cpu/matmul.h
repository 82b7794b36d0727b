// out = a @ b or a @ b.T, plus c where there is one, in fp32, on a packaged BLAS, cut into pieces that this process's own thread pool runs.
#pragma once

#include <cstdint>

namespace tvm_infer::cpu {

struct MatmulArgs {
  int64_t m, n, k;
  const float* a;  // [m, k], row stride lda >= k
  int64_t lda;
  const float* b;  // [k, n], row stride ldb >= n; [n, k], row stride ldb >= k, if transpose_b
  int64_t ldb;
  bool transpose_b;
  float* out;  // [m, n], row stride ldo >= n; what it held is not read
  int64_t ldo;
  const float* c = nullptr;  // [m, n], row stride ldc >= n: added; out itself (then ldc is ldo) or apart from it. Null: nothing is
  int64_t ldc = 0;
};

// num_threads <= 0: DefaultNumThreads(). Throws Error("MissingDependencyError") if no BLAS is set.
void Matmul(const MatmulArgs& args, int num_threads);

}  // namespace tvm_infer::cpu
