// Compiled, not run, where cuBLAS's headers are: our declarations of cuBLASLt (cuda/cublas_api.h) against cublasLt.h.
#include <cublasLt.h>

#include <cstddef>

#include "tvm_infer/cuda/cublas_api.h"

namespace ours = tvm_infer::cuda;

static_assert(ours::kLtSuccess == CUBLAS_STATUS_SUCCESS);
static_assert(ours::kLtNotSupported == CUBLAS_STATUS_NOT_SUPPORTED);
static_assert(ours::kLtFloat32 == CUDA_R_32F);
static_assert(ours::kLtFloat16 == CUDA_R_16F);
static_assert(ours::kLtBFloat16 == CUDA_R_16BF);
static_assert(ours::kLtCompute32F == CUBLAS_COMPUTE_32F);
static_assert(ours::kLtCompute32FTf32 == CUBLAS_COMPUTE_32F_FAST_TF32);
static_assert(ours::kLtOpT == CUBLAS_OP_T);
static_assert(ours::kLtDescTransA == CUBLASLT_MATMUL_DESC_TRANSA);
static_assert(ours::kLtPrefMaxWorkspace == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
static_assert(ours::kLtPrefReductionMask == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK);
static_assert(ours::kLtPrefAlignmentA == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES);
static_assert(ours::kLtPrefAlignmentB == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES);
static_assert(ours::kLtPrefAlignmentC == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES);
static_assert(ours::kLtPrefAlignmentD == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
static_assert(ours::kLtReduceCompute == CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);

static_assert(sizeof(ours::LtAlgo) == sizeof(cublasLtMatmulAlgo_t));
static_assert(sizeof(ours::LtHeuristicResult) == sizeof(cublasLtMatmulHeuristicResult_t));
static_assert(offsetof(ours::LtHeuristicResult, algo) == offsetof(cublasLtMatmulHeuristicResult_t, algo));
static_assert(offsetof(ours::LtHeuristicResult, workspace_bytes) == offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
static_assert(offsetof(ours::LtHeuristicResult, status) == offsetof(cublasLtMatmulHeuristicResult_t, state));
static_assert(sizeof(cublasStatus_t) == sizeof(int));

// As many parameters as ours, of the same sizes.
template <typename... A, typename... B>
constexpr bool SameParameters(int (*)(A...), cublasStatus_t (*)(B...)) {
  return sizeof...(A) == sizeof...(B) && ((sizeof(A) == sizeof(B)) && ...);
}
#define HOLD(name, parameters) \
  static_assert(SameParameters(static_cast<int(*) parameters>(nullptr), static_cast<decltype(&::name)>(nullptr)));
using ours::LtAlgo;
using ours::LtHeuristicResult;
TVM_INFER_CUBLASLT_FUNCTIONS(HOLD)
