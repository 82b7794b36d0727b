// (o, lse) = (o_a, lse_a) (+) (o_b, lse_b) row by row (section 2.2 of arXiv 2501.01005): attention over the union of two disjoint sets of
// keys. Bound by bandwidth. -inf is the identity, and its O is not looked at.
#pragma once

#include <cstdint>
#include <type_traits>

#include "tvm_infer/cuda/params.h"
#include "tvm_infer/ptx/element.cuh"
#include "tvm_infer/ptx/sync.cuh"

namespace tvm_infer::kernels {

inline constexpr int32_t kMergeStatesThreads = 256;
inline constexpr int32_t kMergeStatesCtasPerSm = 6;  // at most 42 registers: 48 warps, 48 KiB in flight on an SM

// Shares of two states in their union, and its LSE.
struct MergeWeights {
  float a, b;  // sum to 1; 0 and 0 where neither saw a key
  float lse;   // natural logarithm

  __device__ __forceinline__ MergeWeights(float lse_a, float lse_b) {
    constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f, kNegInf = -__builtin_huge_valf();
    const float max = fmaxf(lse_a, lse_b);
    const float offset = max == kNegInf ? 0.f : max;  // -inf - -inf would be NaN
    a = ptx::Exp2((lse_a - offset) * kLog2e);
    b = ptx::Exp2((lse_b - offset) * kLog2e);
    const float sum = a + b, factor = sum == 0.f ? 0.f : __frcp_rn(sum);
    a *= factor;
    b *= factor;
    lse = sum == 0.f ? kNegInf : max + ptx::Log2(sum) * kLn2;
  }
};

// The weighted sum of 16 bytes of two rows. A weight of 0 hides whatever stands in its row, NaN too.
template <typename Element>
__device__ __forceinline__ uint4 MergeVector(const MergeWeights& weights, const uint4& a, const uint4& b) {
  const uint32_t words_a[4] = {a.x, a.y, a.z, a.w}, words_b[4] = {b.x, b.y, b.z, b.w};
  const auto sum = [&](float x, float y) { return (weights.a == 0.f ? 0.f : weights.a * x) + (weights.b == 0.f ? 0.f : weights.b * y); };
  uint32_t out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<Element, ptx::Fp32>) {
      out[i] = __float_as_uint(sum(__uint_as_float(words_a[i]), __uint_as_float(words_b[i])));
    } else {
      const float2 x = ptx::Unpack<Element>(words_a[i]), y = ptx::Unpack<Element>(words_b[i]);
      out[i] = ptx::Pack<Element>(sum(x.x, y.x), sum(x.y, y.y));
    }
  }
  return make_uint4(out[0], out[1], out[2], out[3]);
}

// A warp takes as many whole (row, head) pairs as it has lanes for, so that nothing is written before all lanes of the pair have read it:
// outputs may be the inputs.
template <typename Element>
__device__ __forceinline__ void MergeStates(const cuda::MergeStatesParams& p) {
  ptx::AllowDependentGrid();
  constexpr uint32_t kVector = 16 / sizeof(Element);
  const uint32_t lane = threadIdx.x % 32, vectors = p.head_dim / kVector;
  const uint32_t pair_lanes = min(vectors, 32u), warp_pairs = 32 / pair_lanes;
  const uint32_t pair_in_warp = lane / pair_lanes, first_vector = lane % pair_lanes;
  const uint32_t num_pairs = static_cast<uint32_t>(p.num_rows) * p.num_heads;  // below 2^31: cuda/merge_states.cc
  const uint32_t warp = blockIdx.x * (kMergeStatesThreads / 32) + threadIdx.x / 32, num_warps = gridDim.x * (kMergeStatesThreads / 32);

  ptx::WaitForPriorGrid();  // its writes are what we read
  for (uint32_t first = warp * warp_pairs; first < num_pairs; first += num_warps * warp_pairs) {
    const uint32_t pair = first + pair_in_warp;
    const bool is_mine = pair_in_warp < warp_pairs && pair < num_pairs;
    const int64_t row = is_mine ? pair / p.num_heads : 0, head = is_mine ? pair % p.num_heads : 0;
    const auto* o_a = static_cast<const Element*>(p.o_a) + row * p.o_a_stride_row + head * p.o_a_stride_head;
    const auto* o_b = static_cast<const Element*>(p.o_b) + row * p.o_b_stride_row + head * p.o_b_stride_head;
    auto* o = static_cast<Element*>(p.o) + row * p.o_stride_row + head * p.o_stride_head;
    const MergeWeights weights(__ldcg(p.lse_a + row * p.lse_a_stride_row + head * p.lse_a_stride_head),
                               __ldcg(p.lse_b + row * p.lse_b_stride_row + head * p.lse_b_stride_head));
    if (is_mine) {
      for (uint32_t i = first_vector; i < vectors; i += 32) {
        const uint4 a = __ldcg(reinterpret_cast<const uint4*>(o_a) + i), b = __ldcg(reinterpret_cast<const uint4*>(o_b) + i);
        reinterpret_cast<uint4*>(o)[i] = MergeVector<Element>(weights, a, b);
      }
    }
    __syncwarp();  // every lane has read the LSE that is replaced now
    if (is_mine && first_vector == 0 && p.lse != nullptr) p.lse[row * p.lse_stride_row + head * p.lse_stride_head] = weights.lse;
  }
}

}  // namespace tvm_infer::kernels

// A kernel by name; ELEMENT is Bf16, Fp16 or Fp32. Rows start on 16-byte boundaries (the bindings check that).
#define TVM_INFER_MERGE_STATES(NAME, ELEMENT)                                                                                      \
  extern "C" __global__ void __launch_bounds__(tvm_infer::kernels::kMergeStatesThreads, tvm_infer::kernels::kMergeStatesCtasPerSm) \
      NAME(const __grid_constant__ tvm_infer::cuda::MergeStatesParams params) {                                                    \
    tvm_infer::kernels::MergeStates<tvm_infer::ptx::ELEMENT>(params);                                                              \
  }                                                                                                                                \
  extern "C" __device__ const tvm_infer::cuda::KernelInfo NAME##_info = {                                                          \
      tvm_infer::cuda::kKernelAbi, tvm_infer::kernels::kMergeStatesThreads, 0, tvm_infer::kernels::kMergeStatesCtasPerSm}
