// How fast this GPU reads memory: a sum over a tensor by plain 16-byte loads. Benchmarks quote what they reach as a share of it.
#pragma once

#include <cstdint>

#include "tvm_infer/cuda/params.h"
#include "tvm_infer/ptx/sync.cuh"

namespace tvm_infer::kernels {

inline constexpr int kReadThreads = 512;  // in a CTA
inline constexpr int kReadCtasPerSm = 2;
// Loads in flight in a thread: 2 CTAs * 512 threads * 8 * 16 bytes = 128 KiB an SM, where 4.5 TB/s at about 1 us of latency needs 35 KiB.
inline constexpr int kReadUnroll = 8;

// Read once, so it need not stay in L1.
__device__ __forceinline__ uint4 LoadOnce(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// Adds the sum of all 32-bit words (modulo 2^32) to *params.sum: the loads cannot be left out, and the result can be checked.
__device__ __forceinline__ void ReadCeiling(const cuda::ReadCeilingParams& params) {
  __shared__ uint32_t total;  // one atomic to memory a CTA: thousands to one address would take microseconds
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  ptx::AllowDependentGrid();
  ptx::WaitForPriorGrid();
  const uint4* data = static_cast<const uint4*>(params.data);
  constexpr int64_t kTile = static_cast<int64_t>(kReadThreads) * kReadUnroll;  // 64 KiB, contiguous
  uint32_t sum = 0;
  int64_t begin = blockIdx.x * kTile;
#pragma unroll 1
  for (; begin + kTile <= params.num_vectors; begin += gridDim.x * kTile) {
    uint4 v[kReadUnroll];
#pragma unroll
    for (int i = 0; i < kReadUnroll; ++i) v[i] = LoadOnce(data + begin + i * kReadThreads + threadIdx.x);
#pragma unroll
    for (int i = 0; i < kReadUnroll; ++i) sum += (v[i].x + v[i].y) + (v[i].z + v[i].w);
  }
  // The last tile, not whole, falls to the CTA whose turn it is; for the others it begins behind the end.
  for (int64_t i = begin + threadIdx.x; i < params.num_vectors; i += kReadThreads) {
    const uint4 v = LoadOnce(data + i);
    sum += (v.x + v.y) + (v.z + v.w);
  }
  sum = __reduce_add_sync(0xffffffff, sum);
  if (threadIdx.x % 32 == 0) atomicAdd(&total, sum);
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(params.sum, total);
}

}  // namespace tvm_infer::kernels

#define TVM_INFER_READ_CEILING(NAME)                                                                                                       \
  extern "C" __global__ void __launch_bounds__(tvm_infer::kernels::kReadThreads, tvm_infer::kernels::kReadCtasPerSm)                       \
      NAME(const __grid_constant__ tvm_infer::cuda::ReadCeilingParams params) {                                                            \
    tvm_infer::kernels::ReadCeiling(params);                                                                                               \
  }                                                                                                                                        \
  extern "C" __device__ const tvm_infer::cuda::KernelInfo NAME##_info = {tvm_infer::cuda::kKernelAbi, tvm_infer::kernels::kReadThreads, 0, \
                                                                         tvm_infer::kernels::kReadCtasPerSm}
