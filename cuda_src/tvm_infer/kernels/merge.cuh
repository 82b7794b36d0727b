// (O, LSE) of one row from its partial results (section 2.2 of arXiv 2501.01005), in the plan's order, so that the result does not
// depend on who finished first. -inf is the identity.
#pragma once

#include <cstdint>
#include <type_traits>

#include "tvm_infer/attention/output.cuh"
#include "tvm_infer/attention/softmax.cuh"

namespace tvm_infer::kernels {

// One warp merges one row of `merge`: row `row` of its KV head number `h`. Partials were written by other CTAs of this launch: they are
// read from L2, behind a fence of the caller's.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void MergeRow(const attention::AttentionParams& params, const PlanView& plan, const Merge& merge,
                                         const int32_t* slots, int32_t num_slots, int32_t h, int32_t row) {
  constexpr int kColumns = kHeadDim / 32;
  constexpr float kLog2e = 1.4426950408889634f;
  using Vector = std::conditional_t<kColumns == 4, float4, float2>;
  const int32_t lane = threadIdx.x % 32;
  constexpr int kLoads = 8;  // in flight; divides 32
  const int32_t in_slot = h * merge.num_rows + row;

  float max = attention::kNegInf;
  for (int32_t i = lane; i < num_slots; i += 32) max = fmaxf(max, __ldcg(params.partial_lse + slots[i] + in_slot));
#pragma unroll 1
  for (int bit = 16; bit > 0; bit /= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, bit));
  const float offset = max == attention::kNegInf ? 0.f : max;

  float sum = 0.f, o[kColumns] = {};
  for (int32_t first = 0; first < num_slots; first += 32) {
    const int32_t count = min(32, num_slots - first);
    // A lane without a slot has weight 0 and the first slot's row, which is finite.
    const int32_t partial = slots[first + (lane < count ? lane : 0)] + in_slot;
    const float weight = lane < count ? ptx::Exp2((__ldcg(params.partial_lse + partial) - offset) * kLog2e) : 0.f;
#pragma unroll 1
    for (int32_t i = 0; i < count; i += kLoads) {
      Vector v[kLoads];
#pragma unroll
      for (int32_t u = 0; u < kLoads; ++u) {
        const int64_t at = __shfl_sync(0xffffffff, partial, i + u);
        v[u] = __ldcg(reinterpret_cast<const Vector*>(params.partial_o + at * kHeadDim + lane * kColumns));
      }
#pragma unroll
      for (int32_t u = 0; u < kLoads; ++u) {
        const float w = __shfl_sync(0xffffffff, weight, i + u);
        sum += w;
        o[0] += w * v[u].x;
        o[1] += w * v[u].y;
        if constexpr (kColumns == 4) {
          o[2] += w * v[u].z;
          o[3] += w * v[u].w;
        }
      }
    }
  }
  const float factor = attention::InverseSum(sum);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) o[i] *= factor;
  const attention::OutputRow out = attention::FinalRow<Element>(params, plan, merge.row_begin + row, merge.kv_head_begin + h);
  attention::StoreColumns<Element>(out, true, lane * kColumns, o);
  if (lane == 0 && out.lse != nullptr) *out.lse = sum == 0.f ? attention::kNegInf : max + ptx::Log2(sum) * attention::kLn2;
}

// All rows of a merge, shared out among `num_warps` warps.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void MergeRows(const attention::AttentionParams& params, const PlanView& plan, int32_t merge_index, int32_t warp,
                                          int32_t num_warps) {
  const Merge merge = plan.merges()[merge_index];
  const int32_t first = plan.merge_indptr()[merge_index], last = plan.merge_indptr()[merge_index + 1];
  const int32_t* slots = plan.merge_slots() + first;
  for (int32_t i = warp; i < merge.num_rows * merge.num_kv_heads; i += num_warps) {
    MergeRow<Element, kHeadDim>(params, plan, merge, slots, last - first, i / merge.num_rows, i % merge.num_rows);
  }
}

}  // namespace tvm_infer::kernels
