// (O, LSE) of one row from its partial results (section 2.2 of arXiv 2501.01005), in the plan's order, so that the result does not
// depend on who finished first. -inf is the identity.
#pragma once

#include <cstdint>
#include <type_traits>

#include "tvm_infer/attention/consumer.cuh"
#include "tvm_infer/attention/output.cuh"
#include "tvm_infer/attention/softmax.cuh"
#include "tvm_infer/attention/variant.cuh"

namespace tvm_infer::kernels {

// A merge and its partials. Loaded before it is known whether this CTA is the last to arrive: five dependent loads would follow otherwise.
struct MergeJob {
  Merge merge;
  const int32_t* slots;
  int32_t num_slots;
  int32_t my_slot;  // slots[lane], or the last: its rows are read, with weight 0

  __device__ __forceinline__ MergeJob(const PlanView& plan, int32_t index) {
    const int32_t* indptr = plan.merge_indptr() + index;
    const int32_t first = __ldg(indptr);
    num_slots = __ldg(indptr + 1) - first;
    slots = plan.merge_slots() + first;
    my_slot = __ldg(slots + min(static_cast<int32_t>(threadIdx.x % 32), num_slots - 1));
    const int4 words = __ldg(reinterpret_cast<const int4*>(plan.merges() + index));
    merge = {words.x, words.y, words.z, words.w};
  }
  __device__ __forceinline__ static int32_t NumSlots(const PlanView& plan, int32_t index) {
    const int32_t* indptr = plan.merge_indptr() + index;
    return __ldg(indptr + 1) - __ldg(indptr);
  }
};

// A lane's columns of the weighted sum of a row's partials, whose largest LSE is `max`, to the final row.
template <typename Config, int kColumns>
__device__ __forceinline__ void StoreMerged(const attention::Consumer<Config>& c, const MergeJob& job, int32_t h, int32_t row, float max,
                                            float sum, float (&o)[kColumns]) {
  using Element = typename Config::Element;
  using Variant = typename Config::Variant;
  const PlanView& plan = c.plan;
  const int32_t lane = c.ThreadAnew() % 32;
  const float factor = attention::Normaliser<Variant>(sum);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) o[i] *= factor;
  const float merged_lse = sum == 0.f ? attention::kNegInf : Variant::kHasSoftmax ? max + ptx::Log2(sum) * attention::kLn2 : 0.f;
  if constexpr (Variant::kHasOutput) {
    attention::ApplyOutput<Variant>(o, c.variant, attention::VariantRowOf(plan, job.merge.row_begin + row, job.merge.kv_head_begin + h),
                                    merged_lse);
  }
  const attention::OutputRow out = attention::FinalRow<Element>(c.params, plan, job.merge.row_begin + row, job.merge.kv_head_begin + h);
  attention::StoreColumns<Element>(out, true, lane * kColumns, o);
  if (lane == 0 && out.lse != nullptr) *out.lse = merged_lse;
}

// One warp merges row `row` of KV head number `h` of a merge. Partials were written by other CTAs of this launch: they are read from L2,
// after an acquire of the caller's.
template <typename Config>
__device__ __forceinline__ void MergeRow(const attention::Consumer<Config>& c, const MergeJob& job, int32_t h, int32_t row) {
  constexpr int kHeadDim = Config::kHeadDim;
  const attention::AttentionParams& params = c.params;
  constexpr int kColumns = kHeadDim / 32;  // a lane's
  constexpr int kLoads = 8;                // partials in flight; divides 32
  constexpr float kLog2e = 1.4426950408889634f;
  using Vector = std::conditional_t<kColumns == 4, float4, float2>;
  // NOTE: read anew where variants do not decide what is short: the compiler would keep it, and spill, on small pages.
  const int32_t lane = Config::kHasVariant ? threadIdx.x % 32 : c.ThreadAnew() % 32;
  const int32_t in_slot = h * job.merge.num_rows + row, n = job.num_slots;
  const float* columns = params.partial_o + lane * kColumns;

  int32_t partial = job.my_slot + in_slot;  // this lane's of 32
  Vector v[kLoads];
  const auto load = [&](int32_t i) {
#pragma unroll
    for (int32_t u = 0; u < kLoads; ++u) {
      v[u] = __ldcg(reinterpret_cast<const Vector*>(columns + static_cast<int64_t>(__shfl_sync(0xffffffff, partial, i + u)) * kHeadDim));
    }
  };
  float lse = lane < n ? __ldcg(params.partial_lse + partial) : attention::kNegInf;
  load(0);
  float max = lse;
  for (int32_t i = lane + 32; i < n; i += 32) max = fmaxf(max, __ldcg(params.partial_lse + job.slots[i] + in_slot));
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, bit));
  const float offset = max == attention::kNegInf ? 0.f : max;

  float sum = 0.f, o[kColumns] = {};
#pragma unroll 1
  for (int32_t first = 0;;) {
    const float weight = ptx::Exp2((lse - offset) * kLog2e);
#pragma unroll 1
    for (int32_t i = 0, count = min(32, n - first);;) {
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
      i += kLoads;
      if (i >= count) break;
      load(i);
    }
    first += 32;
    if (first >= n) break;
    partial = job.slots[min(first + lane, n - 1)] + in_slot;
    lse = first + lane < n ? __ldcg(params.partial_lse + partial) : attention::kNegInf;
    load(0);
  }
  StoreMerged(c, job, h, row, max, sum, o);
}

// The same for kRows rows of two partials each, `first` and every `step`-th after it, counted over heads and rows: a row alone waits for
// memory twice and keeps little of it busy. What a row adds up to is the same to the bit.
template <typename Config, int kRows>
__device__ __forceinline__ void MergePairs(const attention::Consumer<Config>& c, const MergeJob& job, int32_t first, int32_t step) {
  constexpr int kColumns = Config::kHeadDim / 32;
  constexpr float kLog2e = 1.4426950408889634f;
  using Vector = std::conditional_t<kColumns == 4, float4, float2>;
  const attention::AttentionParams& params = c.params;
  const int32_t total = job.merge.num_rows * job.merge.num_kv_heads;
  const int32_t slots[2] = {__shfl_sync(0xffffffff, job.my_slot, 0), __shfl_sync(0xffffffff, job.my_slot, 1)};
  const float* columns = params.partial_o + c.ThreadAnew() % 32 * kColumns;
  float lse[kRows][2];
  Vector v[kRows][2];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int32_t row = min(first + r * step, total - 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      lse[r][i] = __ldcg(params.partial_lse + slots[i] + row);
      v[r][i] = __ldcg(reinterpret_cast<const Vector*>(columns + static_cast<int64_t>(slots[i] + row) * Config::kHeadDim));
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int32_t row = first + r * step;
    if (row >= total) break;
    const float max = fmaxf(lse[r][0], lse[r][1]), offset = max == attention::kNegInf ? 0.f : max;
    float sum = 0.f, o[kColumns] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float w = ptx::Exp2((lse[r][i] - offset) * kLog2e);
      sum += w;
      o[0] += w * v[r][i].x;
      o[1] += w * v[r][i].y;
      if constexpr (kColumns == 4) {
        o[2] += w * v[r][i].z;
        o[3] += w * v[r][i].w;
      }
    }
    StoreMerged(c, job, row / job.merge.num_rows, row % job.merge.num_rows, max, sum, o);
  }
}

// The same for kRows rows of up to kFewSlots partials each.
inline constexpr int kFewSlots = 8;
template <typename Config, int kRows>
__device__ __forceinline__ void MergeFew(const attention::Consumer<Config>& c, const MergeJob& job, int32_t first, int32_t step) {
  constexpr int kColumns = Config::kHeadDim / 32;
  constexpr float kLog2e = 1.4426950408889634f;
  using Vector = std::conditional_t<kColumns == 4, float4, float2>;
  const attention::AttentionParams& params = c.params;
  const int32_t lane = c.ThreadAnew() % 32, total = job.merge.num_rows * job.merge.num_kv_heads;
  const float* columns = params.partial_o + lane * kColumns;
  float lse[kRows];  // of this lane's partial
  Vector v[kRows][kFewSlots];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int32_t partial = job.my_slot + min(first + r * step, total - 1);
    lse[r] = lane < job.num_slots ? __ldcg(params.partial_lse + partial) : attention::kNegInf;
#pragma unroll
    for (int i = 0; i < kFewSlots; ++i) {
      v[r][i] =
          __ldcg(reinterpret_cast<const Vector*>(columns + static_cast<int64_t>(__shfl_sync(0xffffffff, partial, i)) * Config::kHeadDim));
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int32_t row = first + r * step;
    if (row >= total) break;
    float max = lse[r];
#pragma unroll
    for (int bit = 16; bit > 0; bit /= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, bit));
    const float weight = ptx::Exp2((lse[r] - (max == attention::kNegInf ? 0.f : max)) * kLog2e);
    float sum = 0.f, o[kColumns] = {};
#pragma unroll
    for (int i = 0; i < kFewSlots; ++i) {
      const float w = __shfl_sync(0xffffffff, weight, i);
      sum += w;
      o[0] += w * v[r][i].x;
      o[1] += w * v[r][i].y;
      if constexpr (kColumns == 4) {
        o[2] += w * v[r][i].z;
        o[3] += w * v[r][i].w;
      }
    }
    StoreMerged(c, job, row / job.merge.num_rows, row % job.merge.num_rows, max, sum, o);
  }
}

// All rows of a merge, shared out among `num_warps` warps. Mostly there are few partials: several rows are on their way at once then.
template <typename Config>
__device__ __forceinline__ void MergeRows(const attention::Consumer<Config>& c, const MergeJob& job, int32_t warp, int32_t num_warps) {
  const int32_t total = job.merge.num_rows * job.merge.num_kv_heads;
  if (job.num_slots == 2) {
    constexpr int kAtOnce = 4;
#pragma unroll 1
    for (int32_t i = warp; i < total; i += kAtOnce * num_warps) MergePairs<Config, kAtOnce>(c, job, i, num_warps);
    return;
  }
  if constexpr (!Config::kHasVariant) {  // NOTE: these have no registers to spare
    constexpr int kAtOnce = 2;
    if (job.num_slots <= kFewSlots) {
#pragma unroll 1
      for (int32_t i = warp; i < total; i += kAtOnce * num_warps) MergeFew<Config, kAtOnce>(c, job, i, num_warps);
      return;
    }
  }
#pragma unroll 1
  for (int32_t i = warp; i < total; i += num_warps) MergeRow(c, job, i / job.merge.num_rows, i % job.merge.num_rows);
}

}  // namespace tvm_infer::kernels
