// Copies of pages that sequences stop sharing, in every layer, before a step appends to them. A copy bound by bandwidth, and rare: a fork
// costs one page.
#pragma once

#include <cstdint>

#include "tvm_infer/cuda/params.h"
#include "tvm_infer/ptx/sync.cuh"

namespace tvm_infer::kernels {

inline constexpr int32_t kCopyPagesThreads = 256;
inline constexpr int32_t kCopyPagesCtasPerSm = 4;
inline constexpr int32_t kCopyPagesUnroll = 4;  // 16-byte vectors that a thread has in flight

// A page of one layer is a task of a CTA.
__device__ __forceinline__ void CopyPages(const cuda::CopyPagesParams& p) {
  ptx::AllowDependentGrid();
  ptx::WaitForPriorGrid();  // the list was uploaded before; the pages may still be the prior grid's
  const int64_t num_tasks = int64_t{p.num_copies} * p.num_layers;
  for (int64_t task = blockIdx.x; task < num_tasks; task += gridDim.x) {
    const int32_t* copy = p.copies + task % p.num_copies * 3;
    char* layer = static_cast<char*>(p.pages) + task / p.num_copies * p.layer_bytes;
    const auto* from = reinterpret_cast<const uint4*>(layer + __ldg(copy) * p.page_bytes);
    auto* to = reinterpret_cast<uint4*>(layer + __ldg(copy + 1) * p.page_bytes);
    const int64_t num_vectors = p.page_bytes / 16;
    constexpr int64_t kStep = kCopyPagesThreads * kCopyPagesUnroll;
    for (int64_t begin = threadIdx.x; begin < num_vectors; begin += kStep) {
      uint4 values[kCopyPagesUnroll];
#pragma unroll
      for (int i = 0; i < kCopyPagesUnroll; ++i) {
        if (begin + i * kCopyPagesThreads < num_vectors) values[i] = __ldcg(from + begin + i * kCopyPagesThreads);
      }
#pragma unroll
      for (int i = 0; i < kCopyPagesUnroll; ++i) {
        if (begin + i * kCopyPagesThreads < num_vectors) to[begin + i * kCopyPagesThreads] = values[i];
      }
    }
  }
}

}  // namespace tvm_infer::kernels

#define TVM_INFER_COPY_PAGES(NAME)                                                                                             \
  extern "C" __global__ void __launch_bounds__(tvm_infer::kernels::kCopyPagesThreads, tvm_infer::kernels::kCopyPagesCtasPerSm) \
      NAME(const __grid_constant__ tvm_infer::cuda::CopyPagesParams params) {                                                  \
    tvm_infer::kernels::CopyPages(params);                                                                                     \
  }                                                                                                                            \
  extern "C" __device__ const tvm_infer::cuda::KernelInfo NAME##_info = {                                                      \
      tvm_infer::cuda::kKernelAbi, tvm_infer::kernels::kCopyPagesThreads, 0, tvm_infer::kernels::kCopyPagesCtasPerSm}
