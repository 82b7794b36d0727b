// The decode class: up to 16 packed rows. Bound by the bytes of K and V, so nothing may wait for anything but them.
//
// The eight warps share a tile of 128 keys, 16 keys each (of 64 keys in tiles of wide heads two warps have the same 16, and each half of
// O's columns), and never synchronise inside a work: each has its own max, sum and O over its keys. With mma.sync the weights stay in
// registers between the two products (no shared memory, no barrier); a page costs a warp about 200 instructions, an eighth of what the
// schedulers can issue while it arrives. At the end of a head the eight states are merged.
#pragma once

#include <cstdint>
#include <type_traits>

#include "tvm_infer/attention/change_rows.cuh"
#include "tvm_infer/attention/consumer.cuh"
#include "tvm_infer/attention/decode_products.cuh"
#include "tvm_infer/attention/decode_products_scaled.cuh"
#include "tvm_infer/attention/mask.cuh"
#include "tvm_infer/attention/output.cuh"
#include "tvm_infer/attention/softmax.cuh"

namespace tvm_infer::attention {

template <typename Config>
class DecodeTile {
 public:
  using Element = typename Config::Element;
  using Ring = typename Config::Ring;
  using Variant = typename Config::Variant;
  using Boxes = typename Config::Boxes;
  static constexpr int kHeadDimVo = Config::kHeadDimVo, kTileKeys = Config::kTileKeys, kWarpKeys = 16;
  static constexpr int kSlices = kTileKeys / kWarpKeys, kColumnGroups = Config::kConsumerWarps / kSlices;
  static_assert(kSlices * kColumnGroups == Config::kConsumerWarps);
  static_assert(kColumnGroups == 1 || !Config::kChangesKeys, "variants that change keys are for head_dim 64 and 128");
  static constexpr int kOwnColumns = Config::kDecodeColumns;  // a warp's, of O
  static_assert(kOwnColumns * kColumnGroups == kHeadDimVo);
  using Products = std::conditional_t<Config::kIsScaled, ScaledDecodeProducts<Config>, DecodeProducts<Config>>;

  __device__ __forceinline__ explicit DecodeTile(Consumer<Config>& c) : c_(c) {}

  // All KV heads of a work.
  __device__ __forceinline__ void Run(const Work& work) {
    const Tiles tiles(work);
    const Band band = c_.plan.header->band;
    const TokenOfRow token(work, c_.params.expected.group_size);
    const int32_t row = c_.ThreadAnew() % 32 / 4;
    const KeyRange keys[2] = {VisibleKeys(work, band, token, row), VisibleKeys(work, band, token, row + 8)};
    const KeyRange seen_by_all{VisibleKeys(work, band, token, work.num_rows - 1).begin, VisibleKeys(work, band, token, 0).end};
    VariantRows rows;
    if constexpr (Config::kHasVariant) rows.Enter(c_.plan, work, c_.params.expected.group_size, row);
    for (int32_t h = 0; h < work.num_kv_heads; ++h) {
      float o[kOwnColumns / 8][4];
      SoftmaxState<Variant> softmax;
      const uint32_t query = c_.WaitQuery();
      RunHead(work, work.kv_head_begin + h, tiles, keys, seen_by_all, rows, query, o, softmax);
      Merge(work, h, query, o, softmax);
      if constexpr (Config::kHasVariant) rows.NextHead(c_.params.expected.group_size);
    }
  }

 private:
  using Tiles = KeyTiles<Config::kTileAlign, kTileKeys>;

  __device__ __forceinline__ void RunHead(const Work& work, int32_t kv_head, const Tiles& tiles, const KeyRange (&keys)[2],
                                          const KeyRange& seen_by_all, const VariantRows& rows, uint32_t query,
                                          float (&o)[kOwnColumns / 8][4], SoftmaxState<Variant>& softmax) {
    typename Products::Query q;
    if constexpr (Config::kIsScaled) {
      Products::PrepareQuery(c_.DecodeQuery(query), c_.shared.query_unscale, c_.Warp());
      ptx::BarrierSync(Config::kBarrierConsumers, Config::kConsumerThreads);
      Products::LoadQuery(q, c_.DecodeQuery(query), c_.shared.query_unscale, c_.KeyScale(kv_head));
    } else {
      Products::LoadQuery(q, c_.DecodeQuery(query));
    }
#pragma unroll
    for (int j = 0; j < kOwnColumns / 8; ++j) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0.f;

    const int32_t warp = c_.Warp() % kSlices, first_column = c_.Warp() / kSlices * kOwnColumns;
    const uint32_t k_offset = Products::KeyOffset(warp * kWarpKeys), v_offset = Products::ValueOffset(warp * kWarpKeys);
    for (int32_t t = 0; t < tiles.count; ++t) {
      const int32_t key = tiles.base + t * kTileKeys + warp * kWarpKeys;
      const bool has_keys = key < work.kv_end && key + kWarpKeys > work.kv_begin;
      float s[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
      c_.ring.WaitFull(c_.cursor);
      if constexpr (Config::kChangesKeys) {
        if (has_keys) ChangeOwnKeys(rows, warp, tiles.base + t * kTileKeys);
      }
      if (has_keys) Products::Logits(s, q, c_.ring.Data(c_.cursor) + k_offset);
      __syncwarp();
      c_.Release(c_.cursor);
      c_.cursor.Advance();
      uint32_t p[4];
      if (has_keys) {
        if constexpr (Variant::kHasLogits || Variant::kHasMask) {
          ApplyVariant<Variant>(s, c_.variant, rows, key, {c_.params.sm_scale, c_.params.sm_scale});
        }
        if (key < seen_by_all.begin || key + kWarpKeys > seen_by_all.end) MaskLogits<true>(s, keys, key);
        float rescale[2];
        softmax.Update(s, c_.SoftmaxScale(), rescale);
#pragma unroll
        for (int i = 0; i < 4; ++i) p[i] = ptx::Pack<typename Products::Weight>(s[2 * i], s[2 * i + 1]);
        if (__any_sync(0xffffffff, rescale[0] != 1.f || rescale[1] != 1.f)) {
#pragma unroll
          for (int j = 0; j < kOwnColumns / 8; ++j) {
            o[j][0] *= rescale[0];
            o[j][1] *= rescale[0];
            o[j][2] *= rescale[1];
            o[j][3] *= rescale[1];
          }
        }
      }
      c_.ring.WaitFull(c_.cursor);
      if (has_keys) Products::Values(o, p, c_.ring.Data(c_.cursor) + v_offset, first_column, work.kv_begin - key, work.kv_end - key);
      __syncwarp();
      c_.Release(c_.cursor);
      c_.cursor.Advance();
    }
    softmax.SumOverQuad();
  }

  // This warp's keys of the tile at the cursor, whose key 0 is at position `kv_pos`.
  __device__ __forceinline__ void ChangeOwnKeys(const VariantRows& rows, int32_t warp, int32_t kv_pos) const {
    ChangeKeys<Config, Boxes, 2>(c_.variant, rows.rows[0], c_.ring.Data(c_.cursor), warp, kv_pos);
    // NOTE: the next copy into this stage is the async proxy's, and must not pass these stores.
    if constexpr (!Config::kIsGather) ptx::FenceProxyAsyncShared();
    __syncwarp();
  }

  // The states of the eight warps into one, eight rows at a time through shared memory; warp w merges and stores row w. Then the
  // turn ends.
  __device__ __forceinline__ void Merge(const Work& work, int32_t h, uint32_t query, const float (&o)[kOwnColumns / 8][4],
                                        const SoftmaxState<Variant>& softmax) {
    auto& shared = c_.shared;
    float* scratch = shared.DecodeOutput(query);  // [slice of keys][8 rows][kRowWidth], blocks of 8 columns at block ^ row
    const int32_t thread = c_.ThreadAnew(), warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
    const int32_t slice = warp % kSlices, first_block = warp / kSlices * (kOwnColumns / 8);
    if (t == 0 && warp < kSlices) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        shared.scratch[query].warp_max[warp][g + 8 * i] = softmax.max[i];
        shared.scratch[query].warp_sum[warp][g + 8 * i] = softmax.sum[i];
      }
    }
    const int2 head = shared.head[query];
    const int32_t passes = head.y > 8 ? 2 : 1;
#pragma unroll
    for (int pass = 0; pass < 2; ++pass) {
      if (pass >= passes) break;
      // NOTE: the first time, too: a warp may be here before another has read its query.
      ptx::BarrierSync(Config::kBarrierConsumers, Config::kConsumerThreads);
      if (8 * pass + g < head.y) {
        Products::StoreRow(scratch + (slice * 8 + g) * Config::kRowWidth, o, pass, first_block, g, t);
      }
      ptx::BarrierSync(Config::kBarrierConsumers, Config::kConsumerThreads);
      const int32_t row = 8 * pass + warp;
      if (row < head.y) MergeRow(work, h, head.x, row, query, scratch + warp * Config::kRowWidth);
    }
    c_.ReleaseQuery(query);
  }

  // `first_partial`: the head's first partial row, or kFinalRows.
  __device__ __forceinline__ void MergeRow(const Work& work, int32_t h, int32_t first_partial, int32_t row, uint32_t query,
                                           const float* scratch) {
    using Columns = LaneColumns<kHeadDimVo>;
    const auto& shared = c_.shared;
    const float scale = c_.SoftmaxScale();
    float max = kNegInf;
#pragma unroll
    for (int w = 0; w < kSlices; ++w) max = fmaxf(max, shared.scratch[query].warp_max[w][row]);
    const float offset = max == kNegInf ? 0.f : max * scale;
    const int32_t lane = c_.ThreadAnew() % 32;
    float sum = 0.f, o[Columns::kPieces][Columns::kVector] = {};
#pragma unroll
    for (int w = 0; w < kSlices; ++w) {
      const float weight = ptx::Exp2(shared.scratch[query].warp_max[w][row] * scale - offset);
      sum += weight * shared.scratch[query].warp_sum[w][row];
#pragma unroll
      for (int p = 0; p < Columns::kPieces; ++p) {
        if (!Columns::Has(lane, p)) continue;
        const int32_t column = Columns::First(lane, p);
        const float* part = scratch + w * 8 * Config::kRowWidth + (column / 8 ^ row % 8) * 8 + column % 8;
#pragma unroll
        for (int i = 0; i < Columns::kVector; ++i) o[p][i] += weight * part[i];
      }
    }
    const float factor = Normaliser<Variant>(sum) * c_.ValueScale(work.kv_head_begin + h);
#pragma unroll
    for (int p = 0; p < Columns::kPieces; ++p) {
#pragma unroll
      for (int i = 0; i < Columns::kVector; ++i) o[p][i] *= factor;
    }
    const bool is_final = first_partial == kFinalRows;
    if constexpr (Variant::kHasOutput) {
      if (is_final) {
        const variant::Row at = VariantRowOf(c_.plan, work.row_begin + row, work.kv_head_begin + h);
#pragma unroll
        for (int p = 0; p < Columns::kPieces; ++p) ApplyOutput<Variant>(o[p], c_.variant, at, StateLse<Variant>(max, sum, scale));
      }
    }
    OutputRow out;
    if (is_final) {
      const int2 at = shared.decode_rows[query][row];
      out.o = static_cast<char*>(c_.params.o) + static_cast<uint64_t>(static_cast<uint32_t>(at.x)) * 16;
      out.lse = c_.params.lse == nullptr ? nullptr : c_.params.lse + at.y;
    } else {
      out = PartialRow<kHeadDimVo>(c_.params, first_partial + row);
    }
#pragma unroll
    for (int p = 0; p < Columns::kPieces; ++p) {
      if (Columns::Has(lane, p)) StoreColumns<Element>(out, is_final, Columns::First(lane, p), o[p]);
    }
    if (lane == 0 && out.lse != nullptr) *out.lse = StateLse<Variant>(max, sum, scale);
  }

  Consumer<Config>& c_;
};

}  // namespace tvm_infer::attention
