// cuBLASLt's functions as libcublasLt.so exports them, found at first use: our own declarations of cublasLt.h's, so that building needs no
// CUDA toolkit. The library comes with a CUDA toolkit, with torch, or with NVIDIA's package nvidia-cublas.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace tvm_infer::cuda {

// cublasLtMatmulAlgo_t: opaque; which kernel, tile, stages, split of k.
struct LtAlgo {
  uint64_t data[8];
};

// cublasLtMatmulHeuristicResult_t.
struct LtHeuristicResult {
  LtAlgo algo;
  size_t workspace_bytes;
  int status;         // a cublasStatus_t: whether the rest holds
  float waves_count;  // of CTAs over the device's SMs
  int reserved[4];
};

// Values of cublasLt.h's enumerations (tests/cuda/cublas_constants.cc holds them, and the structs above, against the header).
inline constexpr int kLtSuccess = 0;             // CUBLAS_STATUS_SUCCESS
inline constexpr int kLtNotSupported = 15;       // CUBLAS_STATUS_NOT_SUPPORTED
inline constexpr int kLtFloat32 = 0;             // CUDA_R_32F
inline constexpr int kLtFloat16 = 2;             // CUDA_R_16F
inline constexpr int kLtBFloat16 = 14;           // CUDA_R_16BF
inline constexpr int kLtCompute32F = 68;         // CUBLAS_COMPUTE_32F
inline constexpr int kLtCompute32FTf32 = 77;     // CUBLAS_COMPUTE_32F_FAST_TF32
inline constexpr int kLtOpT = 1;                 // CUBLAS_OP_T
inline constexpr int kLtDescTransA = 3;          // CUBLASLT_MATMUL_DESC_TRANSA: int32_t
inline constexpr int kLtPrefMaxWorkspace = 1;    // CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: uint64_t
inline constexpr int kLtPrefReductionMask = 3;   // CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK: uint32_t
inline constexpr int kLtPrefAlignmentA = 5;      // CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES: uint32_t
inline constexpr int kLtPrefAlignmentB = 6;      // CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES: uint32_t
inline constexpr int kLtPrefAlignmentC = 7;      // CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES: uint32_t
inline constexpr int kLtPrefAlignmentD = 8;      // CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES: uint32_t
inline constexpr uint32_t kLtReduceCompute = 2;  // CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE

// V(name, parameters): every function returns a cublasStatus_t. Handles and descriptors are pointers to opaque structs.
#define TVM_INFER_CUBLASLT_FUNCTIONS(V)                                                                                               \
  V(cublasLtCreate, (void** handle))                                                                                                  \
  V(cublasLtMatmulDescCreate, (void** desc, int compute_type, int scale_type))                                                        \
  V(cublasLtMatmulDescDestroy, (void* desc))                                                                                          \
  V(cublasLtMatmulDescSetAttribute, (void* desc, int attribute, const void* value, size_t bytes))                                     \
  V(cublasLtMatrixLayoutCreate, (void** layout, int type, uint64_t rows, uint64_t cols, int64_t leading_dim))                         \
  V(cublasLtMatrixLayoutDestroy, (void* layout))                                                                                      \
  V(cublasLtMatmulPreferenceCreate, (void** preference))                                                                              \
  V(cublasLtMatmulPreferenceDestroy, (void* preference))                                                                              \
  V(cublasLtMatmulPreferenceSetAttribute, (void* preference, int attribute, const void* value, size_t bytes))                         \
  V(cublasLtMatmulAlgoGetHeuristic, (void* handle, void* desc, void* a, void* b, void* c, void* d, void* preference, int max_results, \
                                     LtHeuristicResult* results, int* num_results))                                                   \
  V(cublasLtMatmul,                                                                                                                   \
    (void* handle, void* desc, const void* alpha, const void* a, void* a_layout, const void* b, void* b_layout, const void* beta,     \
     const void* c, void* c_layout, void* d, void* d_layout, const LtAlgo* algo, void* workspace, size_t workspace_bytes, void* stream))

struct CublasLt {
#define TVM_INFER_CUBLASLT_MEMBER(name, parameters) int(*name) parameters;
  TVM_INFER_CUBLASLT_FUNCTIONS(TVM_INFER_CUBLASLT_MEMBER)
#undef TVM_INFER_CUBLASLT_MEMBER
  size_t (*cublasLtGetVersion)();
  const char* (*cublasLtGetStatusName)(int status);
  std::string path;
};

// Opens the library at `path` for this process; returns its version (130100: 13.1.0). Throws Error("ArgumentError") if it cannot be opened
// or lacks a function, or if products ran on another library already; what was set before stays.
int64_t SetCublas(const std::string& path);

// The library in force, or null. Opens none.
const CublasLt* FindCublas();

// The library in force; if none was set: the one that TVM_INFER_CUBLASLT names, one that the process has loaded already (torch's), or what
// the dynamic loader finds, of the newest version that the driver can run. Throws Error("MissingDependencyError") if there is none.
const CublasLt& Cublas();

// Throws Error("DeviceError") naming the call `what` and the status, where it is not CUBLAS_STATUS_SUCCESS.
void CheckCublas(const CublasLt& cublas, int status, const std::string& what);

}  // namespace tvm_infer::cuda
