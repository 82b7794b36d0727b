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
  int32_t my_slot;  // slots[lane], or the last

  __device__ __forceinline__ MergeJob(const PlanView& plan, int32_t index) {
    const int32_t* indptr = plan.merge_indptr() + index;
    const int32_t first = __ldg(indptr);
    num_slots = __ldg(indptr + 1) - first;
    slots = plan.merge_slots() + first;
    my_slot = __ldg(slots + min(static_cast<int32_t>(threadIdx.x % 32), num_slots - 1));
    const int4 words = __ldg(reinterpret_cast<const int4*>(plan.merges() + index));
    merge = {words.x, words.y, words.z, words.w};
  }
  __device__ __forceinline__ MergeJob(const Merge& merge, const int32_t* slots, int32_t num_slots)
      : merge(merge),
        slots(slots),
        num_slots(num_slots),
        my_slot(__ldg(slots + min(static_cast<int32_t>(threadIdx.x % 32), num_slots - 1))) {}
};

// A lane's columns of a row of a partial result, from L2; 0 where a lane has none.
template <typename Columns>
struct PartialColumns {
  using Vector = std::conditional_t<Columns::kVector == 4, float4, float2>;
  Vector v[Columns::kPieces];

  __device__ __forceinline__ void Load(const float* row, int32_t lane) {
#pragma unroll
    for (int p = 0; p < Columns::kPieces; ++p) {
      v[p] = {};
      if (Columns::Has(lane, p)) v[p] = __ldcg(reinterpret_cast<const Vector*>(row + Columns::First(lane, p)));
    }
  }
  __device__ __forceinline__ void AddTo(float (&o)[Columns::kPieces][Columns::kVector], float weight) const {
#pragma unroll
    for (int p = 0; p < Columns::kPieces; ++p) {
      o[p][0] += weight * v[p].x;
      o[p][1] += weight * v[p].y;
      if constexpr (Columns::kVector == 4) {
        o[p][2] += weight * v[p].z;
        o[p][3] += weight * v[p].w;
      }
    }
  }
};

// A lane's columns of the weighted sum of a row's partials, whose largest LSE is `max`, to the final row. `lane`: of those that have the
// row.
template <typename Config, typename Columns>
__device__ __forceinline__ void StoreMerged(const attention::Consumer<Config>& c, const MergeJob& job, int32_t h, int32_t row, int32_t lane,
                                            float max, float sum, float (&o)[Columns::kPieces][Columns::kVector]) {
  using Element = typename Config::Element;
  using Variant = typename Config::Variant;
  const PlanView& plan = c.plan;
  const float factor = attention::Normaliser<Variant>(sum);
#pragma unroll
  for (int p = 0; p < Columns::kPieces; ++p) {
#pragma unroll
    for (int i = 0; i < Columns::kVector; ++i) o[p][i] *= factor;
  }
  const float merged_lse = sum == 0.f ? attention::kNegInf : Variant::kHasSoftmax ? max + ptx::Log2(sum) * attention::kLn2 : 0.f;
  if constexpr (Variant::kHasOutput) {
    const variant::Row at = attention::VariantRowOf(plan, job.merge.row_begin + row, job.merge.kv_head_begin + h);
#pragma unroll
    for (int p = 0; p < Columns::kPieces; ++p) attention::ApplyOutput<Variant>(o[p], c.variant, at, merged_lse);
  }
  const attention::OutputRow out = attention::FinalRow<Element>(c.params, plan, job.merge.row_begin + row, job.merge.kv_head_begin + h);
#pragma unroll
  for (int p = 0; p < Columns::kPieces; ++p) {
    if (Columns::Has(lane, p)) attention::StoreColumns<Element>(out, true, Columns::First(lane, p), o[p]);
  }
  if (lane == 0 && out.lse != nullptr) *out.lse = merged_lse;
}

// One warp merges row `row` of KV head number `h` of a merge. Partials were written by other CTAs of this launch: they are read from L2,
// after an acquire of the caller's.
template <typename Config>
__device__ __forceinline__ void MergeRow(const attention::Consumer<Config>& c, const MergeJob& job, int32_t h, int32_t row) {
  using Columns = attention::LaneColumns<Config::kHeadDimVo>;
  constexpr int kHeadDimVo = Config::kHeadDimVo;
  const attention::AttentionParams& params = c.params;
  constexpr int kLoads = kHeadDimVo <= 128 ? 8 : 4;  // partials in flight; divides 32
  constexpr float kLog2e = 1.4426950408889634f;
  const int32_t lane = c.ThreadAnew() % 32;  // NOTE: the compiler would keep it, and spill
  const int32_t in_slot = h * job.merge.num_rows + row, n = job.num_slots;
  int32_t partial = job.my_slot + in_slot;  // this lane's of 32
  float lse = lane < n ? __ldcg(params.partial_lse + partial) : attention::kNegInf;
  float max = attention::kNegInf, sum = 0.f, o[Columns::kPieces][Columns::kVector] = {};
#pragma unroll 1
  for (int32_t first = 0;;) {
#pragma unroll 1
    for (int32_t i = 0, count = min(32, n - first); i < count; i += kLoads) {
      PartialColumns<Columns> v[kLoads];
#pragma unroll
      for (int32_t u = 0; u < kLoads; ++u) {
        const int32_t of = __shfl_sync(0xffffffff, partial, i + u);
        v[u].Load(params.partial_o + static_cast<int64_t>(of) * kHeadDimVo, lane);
      }
      if (first + i == 0) {  // while these are on their way
        max = lse;
#pragma unroll 1
        for (int32_t j = lane + 32; j < n; j += 32) max = fmaxf(max, __ldcg(params.partial_lse + job.slots[j] + in_slot));
#pragma unroll
        for (int bit = 16; bit > 0; bit /= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, bit));
      }
      const float weight = ptx::Exp2((lse - (max == attention::kNegInf ? 0.f : max)) * kLog2e);
#pragma unroll
      for (int32_t u = 0; u < kLoads; ++u) {
        const float w = __shfl_sync(0xffffffff, weight, i + u);
        sum += w;
        v[u].AddTo(o, w);
      }
    }
    first += 32;
    if (first >= n) break;
    partial = job.slots[min(first + lane, n - 1)] + in_slot;
    lse = first + lane < n ? __ldcg(params.partial_lse + partial) : attention::kNegInf;
  }
  StoreMerged<Config, Columns>(c, job, h, row, lane, max, sum, o);
}

// The same for four rows of at most kFewPartials partials, `first` and those at a distance of `stride` behind it, counted over heads and
// rows; a quarter of the warp has each. A row alone waits for memory as long and keeps little of it busy.
//
// NOTE: small, since a step's other kernels sweep code from the caches, too, and each 128 bytes of it are a trip to memory then.
inline constexpr int kRowsAtOnce = 4, kFewPartials = 16;
template <typename Config>
__device__ __forceinline__ void MergeFew(const attention::Consumer<Config>& c, const MergeJob& job, int32_t first, int32_t stride) {
  constexpr float kLog2e = 1.4426950408889634f;
  constexpr int kLanes = 32 / kRowsAtOnce, kBatch = Config::kHeadDimVo <= 128 ? 4 : 2;  // of a row; partials in flight
  using Columns = attention::LaneColumns<Config::kHeadDimVo, kLanes>;
  const attention::AttentionParams& params = c.params;
  const int32_t total = job.merge.num_rows * job.merge.num_kv_heads, n = job.num_slots;
  const int32_t lane = c.ThreadAnew() % kLanes, quarter = c.ThreadAnew() % 32 / kLanes;
  const int32_t row = first + quarter * stride, at = min(row, total - 1);
  // This lane's LSEs are those of partials `lane` and `lane + 8`.
  float lse[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int32_t own = lane + i * kLanes, slot = __shfl_sync(0xffffffff, job.my_slot, own);
    lse[i] = own < n ? __ldcg(params.partial_lse + slot + at) : attention::kNegInf;
  }
  float max = attention::kNegInf, sum = 0.f, o[Columns::kPieces][Columns::kVector] = {};
#pragma unroll 1
  for (int32_t begin = 0; begin < n; begin += kBatch) {
    PartialColumns<Columns> v[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int32_t slot = __shfl_sync(0xffffffff, job.my_slot, begin + u);
      v[u].Load(params.partial_o + static_cast<int64_t>(slot + at) * Config::kHeadDimVo, lane);
    }
    if (begin == 0) {  // NOTE: here, with these on their way
      max = fmaxf(lse[0], lse[1]);
#pragma unroll
      for (int bit = 1; bit < kLanes; bit *= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, bit));
    }
    const float weight = ptx::Exp2(((begin < kLanes ? lse[0] : lse[1]) - (max == attention::kNegInf ? 0.f : max)) * kLog2e);
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const float w = __shfl_sync(0xffffffff, weight, quarter * kLanes + (begin + u) % kLanes);
      sum += w;
      v[u].AddTo(o, w);
    }
  }
  if (row < total) StoreMerged<Config, Columns>(c, job, row / job.merge.num_rows, row % job.merge.num_rows, lane, max, sum, o);
}

// Rows that a warp takes at once.
__device__ __forceinline__ int32_t RowsAtOnce(int32_t num_slots) { return num_slots <= kFewPartials ? kRowsAtOnce : 1; }

// Rows of a merge: `first` and those behind it at a distance of `stride`, as many as are taken at once; then `hop` times as many further
// on the same, up to its end.
template <typename Config>
__device__ __forceinline__ void MergeRows(const attention::Consumer<Config>& c, const MergeJob& job, int32_t first, int32_t stride,
                                          int32_t hop) {
  const int32_t total = job.merge.num_rows * job.merge.num_kv_heads;
  const bool has_few = __any_sync(0xffffffff, job.num_slots <= kFewPartials);
#pragma unroll 1
  for (int32_t i = first; __any_sync(0xffffffff, i < total); i += RowsAtOnce(job.num_slots) * hop) {
    if (has_few) {
      MergeFew(c, job, i, stride);
    } else {
      MergeRow(c, job, i / job.merge.num_rows, i % job.merge.num_rows);
    }
  }
}

}  // namespace tvm_infer::kernels
