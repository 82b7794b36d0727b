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

// A lane's columns of a row.
template <typename Config>
using Columns = attention::LaneColumns<Config::kHeadDimVo>;

// Those of a row of a partial result, from L2; 0 where a lane has none.
template <typename Config>
struct PartialColumns {
  using Vector = std::conditional_t<Columns<Config>::kVector == 4, float4, float2>;
  Vector v[Columns<Config>::kPieces];

  __device__ __forceinline__ void Load(const float* row, int32_t lane) {
#pragma unroll
    for (int p = 0; p < Columns<Config>::kPieces; ++p) {
      v[p] = {};
      if (Columns<Config>::Has(lane, p)) v[p] = __ldcg(reinterpret_cast<const Vector*>(row + Columns<Config>::First(lane, p)));
    }
  }
  __device__ __forceinline__ void AddTo(float (&o)[Columns<Config>::kPieces][Columns<Config>::kVector], float weight) const {
#pragma unroll
    for (int p = 0; p < Columns<Config>::kPieces; ++p) {
      o[p][0] += weight * v[p].x;
      o[p][1] += weight * v[p].y;
      if constexpr (Columns<Config>::kVector == 4) {
        o[p][2] += weight * v[p].z;
        o[p][3] += weight * v[p].w;
      }
    }
  }
};

// A lane's columns of the weighted sum of a row's partials, whose largest LSE is `max`, to the final row.
template <typename Config, int kPieces, int kVector>
__device__ __forceinline__ void StoreMerged(const attention::Consumer<Config>& c, const MergeJob& job, int32_t h, int32_t row, float max,
                                            float sum, float (&o)[kPieces][kVector]) {
  using Element = typename Config::Element;
  using Variant = typename Config::Variant;
  const PlanView& plan = c.plan;
  const int32_t lane = c.ThreadAnew() % 32;
  const float factor = attention::Normaliser<Variant>(sum);
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) o[p][i] *= factor;
  }
  const float merged_lse = sum == 0.f ? attention::kNegInf : Variant::kHasSoftmax ? max + ptx::Log2(sum) * attention::kLn2 : 0.f;
  if constexpr (Variant::kHasOutput) {
    const variant::Row at = attention::VariantRowOf(plan, job.merge.row_begin + row, job.merge.kv_head_begin + h);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) attention::ApplyOutput<Variant>(o[p], c.variant, at, merged_lse);
  }
  const attention::OutputRow out = attention::FinalRow<Element>(c.params, plan, job.merge.row_begin + row, job.merge.kv_head_begin + h);
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    if (Columns<Config>::Has(lane, p)) attention::StoreColumns<Element>(out, true, Columns<Config>::First(lane, p), o[p]);
  }
  if (lane == 0 && out.lse != nullptr) *out.lse = merged_lse;
}

// One warp merges row `row` of KV head number `h` of a merge. Partials were written by other CTAs of this launch: they are read from L2,
// after an acquire of the caller's.
template <typename Config>
__device__ __forceinline__ void MergeRow(const attention::Consumer<Config>& c, const MergeJob& job, int32_t h, int32_t row) {
  constexpr int kHeadDimVo = Config::kHeadDimVo;
  const attention::AttentionParams& params = c.params;
  constexpr int kLoads = kHeadDimVo <= 128 ? 8 : 4;  // partials in flight; divides 32
  constexpr float kLog2e = 1.4426950408889634f;
  // NOTE: read anew where variants do not decide what is short: the compiler would keep it, and spill, on small pages.
  const int32_t lane = Config::kHasVariant ? threadIdx.x % 32 : c.ThreadAnew() % 32;
  const int32_t in_slot = h * job.merge.num_rows + row, n = job.num_slots;
  int32_t partial = job.my_slot + in_slot;  // this lane's of 32
  PartialColumns<Config> v[kLoads];
  const auto load = [&](int32_t i) {
#pragma unroll
    for (int32_t u = 0; u < kLoads; ++u) {
      v[u].Load(params.partial_o + static_cast<int64_t>(__shfl_sync(0xffffffff, partial, i + u)) * kHeadDimVo, lane);
    }
  };
  float lse = lane < n ? __ldcg(params.partial_lse + partial) : attention::kNegInf;
  load(0);
  float max = lse;
  for (int32_t i = lane + 32; i < n; i += 32) max = fmaxf(max, __ldcg(params.partial_lse + job.slots[i] + in_slot));
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, bit));
  const float offset = max == attention::kNegInf ? 0.f : max;

  float sum = 0.f, o[Columns<Config>::kPieces][Columns<Config>::kVector] = {};
#pragma unroll 1
  for (int32_t first = 0;;) {
    const float weight = ptx::Exp2((lse - offset) * kLog2e);
#pragma unroll 1
    for (int32_t i = 0, count = min(32, n - first);;) {
#pragma unroll
      for (int32_t u = 0; u < kLoads; ++u) {
        const float w = __shfl_sync(0xffffffff, weight, i + u);
        sum += w;
        v[u].AddTo(o, w);
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
  constexpr float kLog2e = 1.4426950408889634f;
  const attention::AttentionParams& params = c.params;
  const int32_t total = job.merge.num_rows * job.merge.num_kv_heads;
  const int32_t slots[2] = {__shfl_sync(0xffffffff, job.my_slot, 0), __shfl_sync(0xffffffff, job.my_slot, 1)};
  const int32_t lane = c.ThreadAnew() % 32;
  float lse[kRows][2];
  PartialColumns<Config> v[kRows][2];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int32_t row = min(first + r * step, total - 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      lse[r][i] = __ldcg(params.partial_lse + slots[i] + row);
      v[r][i].Load(params.partial_o + static_cast<int64_t>(slots[i] + row) * Config::kHeadDimVo, lane);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int32_t row = first + r * step;
    if (row >= total) break;
    const float max = fmaxf(lse[r][0], lse[r][1]), offset = max == attention::kNegInf ? 0.f : max;
    float sum = 0.f, o[Columns<Config>::kPieces][Columns<Config>::kVector] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float w = ptx::Exp2((lse[r][i] - offset) * kLog2e);
      sum += w;
      v[r][i].AddTo(o, w);
    }
    StoreMerged(c, job, row / job.merge.num_rows, row % job.merge.num_rows, max, sum, o);
  }
}

// How many partials of a row MergeFew takes. NOTE: of heads that end in a panel eight, since more spill.
template <typename Config>
inline constexpr int kFewPartials = Config::kHeadDimVo % 64 == 0 ? 16 : 8;

// The same for four rows of at most eight partials each, or for two of at most sixteen, each by two quarters of the warp and of the
// registers. Lane 8 * r + i has the LSE of partial i of quarter r.
template <typename Config>
__device__ __forceinline__ void MergeFew(const attention::Consumer<Config>& c, const MergeJob& job, int32_t first, int32_t step) {
  constexpr float kLog2e = 1.4426950408889634f;
  constexpr int kRows = 4, kSlots = 8, kBatch = Config::kHeadDimVo <= 128 ? 4 : 2;  // partials of each quarter in flight
  const attention::AttentionParams& params = c.params;
  const int32_t total = job.merge.num_rows * job.merge.num_kv_heads, n = job.num_slots;
  constexpr bool kMayHalve = kFewPartials<Config> > kSlots;
  const bool halves = kMayHalve && n > kSlots;
  const auto row_of = [&](int32_t quarter) { return first + (halves ? quarter / 2 : quarter) * step; };
  const int32_t lane = c.ThreadAnew() % 32, own = lane % (halves ? 2 * kSlots : kSlots);
  const int32_t slot = __shfl_sync(0xffffffff, job.my_slot, own);
  const float lse = own < n ? __ldcg(params.partial_lse + slot + min(row_of(lane / kSlots), total - 1)) : attention::kNegInf;
  PartialColumns<Config> v[kRows][kBatch];
  const auto load = [&](int32_t begin) {
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      int32_t from = __shfl_sync(0xffffffff, slot, begin + u);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (kMayHalve && r > 0) from = __shfl_sync(0xffffffff, slot, kSlots * r + begin + u);
        v[r][u].Load(params.partial_o + static_cast<int64_t>(from + min(row_of(r), total - 1)) * Config::kHeadDimVo, lane);
      }
    }
  };
  load(0);
  float max = lse;
#pragma unroll
  for (int bit = 1; bit < kSlots; bit *= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, bit));
  if (halves) max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, kSlots));
  const float weight = ptx::Exp2((lse - (max == attention::kNegInf ? 0.f : max)) * kLog2e);
  float sum[kRows] = {}, o[kRows][Columns<Config>::kPieces][Columns<Config>::kVector] = {};
#pragma unroll 1
  for (int32_t begin = 0;;) {
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float w = __shfl_sync(0xffffffff, weight, kSlots * r + begin + u);
        sum[r] += w;
        v[r][u].AddTo(o[r], w);
      }
    }
    begin += kBatch;
    if (begin >= min(n, kSlots)) break;
    load(begin);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (halves && r % 2 == 0) {
      sum[r] += sum[r + 1];
#pragma unroll
      for (int p = 0; p < Columns<Config>::kPieces; ++p) {
#pragma unroll
        for (int i = 0; i < Columns<Config>::kVector; ++i) o[r][p][i] += o[r + 1][p][i];
      }
    }
    const int32_t row = row_of(r);
    const float row_max = __shfl_sync(0xffffffff, max, kSlots * r);
    if (row < total && !(halves && r % 2 == 1)) {
      StoreMerged(c, job, row / job.merge.num_rows, row % job.merge.num_rows, row_max, sum[r], o[r]);
    }
  }
}

// All rows of a merge, shared out among `num_warps` warps. kHasFew: several rows of more than two partials at once.
template <typename Config, bool kHasFew>
__device__ __forceinline__ void MergeRows(const attention::Consumer<Config>& c, const MergeJob& job, int32_t warp, int32_t num_warps) {
  if (job.num_slots == 2) {
    constexpr int kAtOnce = Config::kHeadDimVo <= 128 ? 4 : 2;
#pragma unroll 1
    for (int32_t i = warp; i < job.merge.num_rows * job.merge.num_kv_heads; i += kAtOnce * num_warps) {
      MergePairs<Config, kAtOnce>(c, job, i, num_warps);
    }
    return;
  }
  if constexpr (kHasFew) {
    if (job.num_slots <= kFewPartials<Config>) {
      const int32_t step = (job.num_slots <= 8 ? 4 : 2) * num_warps;
#pragma unroll 1
      for (int32_t i = warp; i < job.merge.num_rows * job.merge.num_kv_heads; i += step) MergeFew(c, job, i, num_warps);
      return;
    }
  }
#pragma unroll 1
  for (int32_t i = warp; i < job.merge.num_rows * job.merge.num_kv_heads; i += num_warps) {
    MergeRow(c, job, i / job.merge.num_rows, i % job.merge.num_rows);
  }
}

}  // namespace tvm_infer::kernels
