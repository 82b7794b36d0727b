// Results of the prefill class: a warp's 16 rows of a head, final ones through shared memory, partial ones from registers.
#pragma once

#include <cstdint>

#include "tvm_infer/attention/consumer.cuh"
#include "tvm_infer/attention/output.cuh"
#include "tvm_infer/attention/softmax.cuh"
#include "tvm_infer/attention/variant.cuh"

namespace tvm_infer::attention {

// Stores a head's rows and gives its query buffer back, through which final rows pass. `kv_head`: for its values' scale.
template <typename Config>
__device__ __forceinline__ void StoreHead(Consumer<Config>& c, uint32_t query, const VariantRows& at, int32_t kv_head,
                                          SoftmaxState<typename Config::Variant> softmax, float (&o)[Config::kHeadDimVo / 2]) {
  using Element = typename Config::Element;
  using Variant = typename Config::Variant;
  constexpr int kHeadDimVo = Config::kHeadDimVo, kRows = Config::kPanelRows, kOutputs = kHeadDimVo / 2;
  softmax.SumOverQuad();
  const float scale = c.SoftmaxScale(), value_scale = c.ValueScale(kv_head);
  float factor[2] = {Normaliser<Variant>(softmax.sum[0]) * value_scale, Normaliser<Variant>(softmax.sum[1]) * value_scale};
  const int32_t thread = c.ThreadAnew(), lane = thread % 32, first_row = thread / 32 * 16;  // of this warp's 16
  const int2 head = c.shared.head[query];
  const int32_t num_rows = head.y - first_row;
  const int2* rows = c.shared.scratch[query].rows + first_row;
  float lse[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) lse[i] = StateLse<Variant>(softmax.max[i], softmax.sum[i], scale);
  if (head.x == kFinalRows) {
    if constexpr (Variant::kHasOutput) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (lse[i] == kNegInf) continue;
#pragma unroll
        for (int j = 0; j < kOutputs / 4; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = o[4 * j + 2 * i + e];
            x = Variant::Output(c.variant, at.rows[i], lse[i], x * factor[i]);
          }
        }
        factor[i] = 1.f;
      }
    }
    const uint32_t staging =
        c.PrefillQuery(query) + first_row / kRows * kRows * Config::kRowWidth * 2 + first_row % kRows * tile::kPanelRowBytes;
    StageRows<Element, kHeadDimVo, kRows>(lane, staging, o, factor);
    int32_t at[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) at[i] = rows[lane / 4 + 8 * i].y;
    __syncwarp();
    using Staged = StagedRows<kHeadDimVo, kRows>;
#pragma unroll
    for (int first = 0; first < 16; first += Staged::kRowsHeld) {
      const Staged staged(lane, staging, ptx::SharedAddress(rows), first);
      if (first + Staged::kRowsHeld == 16) c.ReleaseQuery(query);
      staged.Store(lane, c.params.o, first, num_rows);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (lane % 4 == 0 && lane / 4 + 8 * i < num_rows && c.params.lse != nullptr) c.params.lse[at[i]] = lse[i];
    }
    return;
  }
  c.ReleaseQuery(query);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int32_t row = lane / 4 + 8 * i;
    if (row >= num_rows) continue;
    const OutputRow partial = PartialRow<kHeadDimVo>(c.params, head.x + first_row + row);
    if (lane % 4 == 0) *partial.lse = lse[i];
#pragma unroll
    for (int j = 0; j < kOutputs / 4; ++j) {
      const float x[2] = {o[4 * j + 2 * i] * factor[i], o[4 * j + 2 * i + 1] * factor[i]};
      StoreColumns<Element>(partial, false, 8 * j + lane % 4 * 2, x);
    }
  }
}

}  // namespace tvm_infer::attention
