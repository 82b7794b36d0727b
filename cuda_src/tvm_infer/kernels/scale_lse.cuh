// An LSE in another base: every element times a constant, in place. TVM's KV cache has base 2, attention gives natural logarithms; a step
// has a few thousand of them, so this is one launch's latency and nothing else.
#pragma once

#include <cstdint>

#include "tvm_infer/cuda/params.h"
#include "tvm_infer/ptx/sync.cuh"

namespace tvm_infer::kernels {

inline constexpr int32_t kScaleLseThreads = 256;
inline constexpr int32_t kScaleLseCtasPerSm = 4;

__device__ __forceinline__ void ScaleLse(const cuda::ScaleLseParams& p) {
  ptx::AllowDependentGrid();
  ptx::WaitForPriorGrid();  // which wrote the LSE
  const int64_t num_elements = int64_t{p.num_rows} * p.num_heads;
  for (int64_t i = int64_t{blockIdx.x} * kScaleLseThreads + threadIdx.x; i < num_elements; i += int64_t{gridDim.x} * kScaleLseThreads) {
    float* value = p.lse + i / p.num_heads * p.stride_row + i % p.num_heads * p.stride_head;
    *value *= p.factor;  // -inf stays: the factor is above 0
  }
}

}  // namespace tvm_infer::kernels

#define TVM_INFER_SCALE_LSE(NAME)                                                                                            \
  extern "C" __global__ void __launch_bounds__(tvm_infer::kernels::kScaleLseThreads, tvm_infer::kernels::kScaleLseCtasPerSm) \
      NAME(const __grid_constant__ tvm_infer::cuda::ScaleLseParams params) {                                                 \
    tvm_infer::kernels::ScaleLse(params);                                                                                    \
  }                                                                                                                          \
  extern "C" __device__ const tvm_infer::cuda::KernelInfo NAME##_info = {                                                    \
      tvm_infer::cuda::kKernelAbi, tvm_infer::kernels::kScaleLseThreads, 0, tvm_infer::kernels::kScaleLseCtasPerSm}
