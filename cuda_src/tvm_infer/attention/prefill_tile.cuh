// The prefill class: 128 packed rows, 64 for each of two warpgroups, against tiles of 128 keys; both products on wgmma.
//
// Two overlaps keep the tensor cores busy during the exponentials (FlashAttention-3, arXiv 2407.08608, sections 3.1 and 3.2): the
// warpgroups take turns issuing products, so that one's softmax runs under the other's products; and within a warpgroup the logits of
// tile t + 1 are issued before the values of tile t.
#pragma once

#include <cstdint>

#include "tvm_infer/attention/consumer.cuh"
#include "tvm_infer/attention/mask.cuh"
#include "tvm_infer/attention/output.cuh"
#include "tvm_infer/attention/softmax.cuh"
#include "tvm_infer/ptx/wgmma.cuh"
#include "tvm_infer/tile/descriptor.cuh"

namespace tvm_infer::attention {

template <typename Config>
class PrefillTile {
 public:
  using Element = typename Config::Element;
  using Ring = typename Config::Ring;
  static constexpr int kHeadDim = Config::kHeadDim, kTileKeys = Config::kTileKeys, kRows = 64;
  static constexpr int kOutputs = kHeadDim / 2;  // fp32 accumulators a thread

  __device__ __forceinline__ explicit PrefillTile(Consumer<Config>& c) : c_(c), warpgroup_(c.thread / 128) {}

  // All KV heads of a work.
  __device__ __forceinline__ void Run(const Work& work) {
    const Tiles tiles(work);
    const Band band = c_.plan.header->band;
    const int32_t group = c_.plan.header->group_size, last_row = work.num_rows - 1;
    const int32_t first = warpgroup_ * kRows, row = first + c_.warp % 4 * 16 + c_.lane / 4;
    const KeyRange keys[2] = {VisibleKeys(work, band, group, row), VisibleKeys(work, band, group, row + 8)};
    // Keys that all rows of this warpgroup see: tiles inside need no mask.
    const KeyRange seen_by_all{VisibleKeys(work, band, group, min(first + kRows - 1, last_row)).begin,
                               VisibleKeys(work, band, group, min(first, last_row)).end};
    for (int32_t h = 0; h < work.num_kv_heads; ++h) RunHead(work, tiles, keys, seen_by_all, h);
  }

  // Before the first work: warpgroup 0 has the first turn.
  __device__ __forceinline__ void GiveFirstTurn() {
    if (warpgroup_ == 1) ptx::BarrierArrive(Config::kBarrierTurn + 0, Config::kConsumerThreads);
  }

 private:
  using Tiles = KeyTiles<Config::kPageSize, kTileKeys>;

  __device__ __forceinline__ void WaitTurn() { ptx::BarrierSync(Config::kBarrierTurn + warpgroup_, Config::kConsumerThreads); }
  __device__ __forceinline__ void PassTurn() { ptx::BarrierArrive(Config::kBarrierTurn + 1 - warpgroup_, Config::kConsumerThreads); }

  // s = Q @ K^T, asynchronous.
  __device__ __forceinline__ void IssueLogits(float (&s)[64], uint32_t k_stage) {
    const uint64_t q =
        tile::MatrixDescriptor(ptx::SharedAddress(c_.shared.query) + warpgroup_ * kRows * kHeadDim * 2, 0, tile::kSwizzleAtomBytes);
    const uint64_t k = tile::MatrixDescriptor(k_stage, 0, tile::kSwizzleAtomBytes);
    ptx::PinRegisters(s);
    ptx::WgmmaFence();
#pragma unroll
    for (int d = 0; d < kHeadDim; d += 16) {
      const int panel = d / tile::kPanelElements, bytes = d % tile::kPanelElements * 2;
      ptx::Wgmma64x128x16<Element>(s, tile::Advance(q, panel * kRows * tile::kPanelRowBytes + bytes),
                                   tile::Advance(k, panel * kTileKeys * tile::kPanelRowBytes + bytes), d > 0);
    }
    ptx::WgmmaCommit();
    ptx::PinRegisters(s);
  }

  // o (+)= P @ V, asynchronous.
  __device__ __forceinline__ void IssueValues(float (&o)[kOutputs], uint32_t (&p)[32], uint32_t v_stage, bool accumulate) {
    using Boxes = typename Config::Boxes;
    // Pages of 8 tokens: the next 8 keys are the next page.
    constexpr uint32_t kNext8Keys = Config::kPageSize == 8 ? Boxes::kPageBytes : tile::kSwizzleAtomBytes;
    const uint64_t v = tile::MatrixDescriptor(v_stage, Boxes::kPanelBytes, kNext8Keys);
    ptx::PinRegisters(o);
    ptx::PinRegisters(p);
    ptx::WgmmaFence();
#pragma unroll
    for (int key = 0; key < kTileKeys; key += 16) {
      const uint32_t bytes = key / Config::kPageSize * Boxes::kPageBytes + key % Config::kPageSize * tile::kPanelRowBytes;
      ptx::WgmmaRegisterA<Element>(o, p + key / 4, tile::Advance(v, bytes), key > 0 || accumulate);
    }
    ptx::WgmmaCommit();
    ptx::PinRegisters(o);
  }

  __device__ __forceinline__ static void PackWeights(uint32_t (&p)[32], const float (&s)[64]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) p[i] = ptx::Pack<Element>(s[2 * i], s[2 * i + 1]);
  }

  // Slots of a tile of V without a key of this work may hold NaN.
  __device__ __forceinline__ void CleanValues(const Work& work, int32_t tile_key, uint32_t v_stage) {
    if (tile_key >= work.kv_begin && tile_key + kTileKeys <= work.kv_end) return;
    ZeroInvisibleValues<Config::kPageSize, kHeadDim, kTileKeys>(v_stage, work.kv_begin - tile_key, work.kv_end - tile_key, c_.thread % 128);
    ptx::BarrierSync(Config::kBarrierWarpgroup + warpgroup_, 128);
  }

  __device__ __forceinline__ void RunHead(const Work& work, const Tiles& tiles, const KeyRange (&keys)[2], const KeyRange& seen_by_all,
                                          int32_t h) {
    const float scale = c_.params.sm_scale_log2;
    float s[64], o[kOutputs], rescale[2];
    uint32_t p[32];
    OnlineSoftmax softmax;
    auto mask = [&](int32_t tile_key) {
      if (tile_key < seen_by_all.begin || tile_key + kTileKeys > seen_by_all.end) MaskLogits(s, keys, tile_key);
    };

    c_.WaitQuery();
    if (tiles.count > 0) {
      c_.ring.WaitFull(c_.cursor);
      WaitTurn();
      IssueLogits(s, c_.ring.Data(c_.cursor));
      PassTurn();
      ptx::WgmmaWait<0>();
      ptx::PinRegisters(s);
      c_.Release(c_.cursor);
      c_.cursor.Advance();
      mask(tiles.base);
      softmax.Update(s, scale, rescale);
      PackWeights(p, s);

      int32_t tile_key = tiles.base;  // of the tile whose weights are in p
      for (int32_t t = 1; t < tiles.count; ++t) {
        const auto k = c_.cursor;
        c_.cursor.Advance();
        const auto v = c_.cursor;
        c_.cursor.Advance();
        if (tile_key < work.kv_begin) {
          c_.ring.WaitFull(v);
          CleanValues(work, tile_key, c_.ring.Data(v));
        }
        c_.ring.WaitFull(k);
        WaitTurn();
        IssueLogits(s, c_.ring.Data(k));
        c_.ring.WaitFull(v);
        IssueValues(o, p, c_.ring.Data(v), t > 1);
        PassTurn();
        ptx::WgmmaWait<1>();
        ptx::PinRegisters(s);
        c_.Release(k);
        tile_key += kTileKeys;
        mask(tile_key);
        softmax.Update(s, scale, rescale);
        ptx::WgmmaWait<0>();
        ptx::PinRegisters(o);
        c_.Release(v);
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) o[i] *= rescale[i / 2 % 2];
        PackWeights(p, s);
      }
      c_.ring.WaitFull(c_.cursor);
      CleanValues(work, tile_key, c_.ring.Data(c_.cursor));
      IssueValues(o, p, c_.ring.Data(c_.cursor), tiles.count > 1);
      c_.ReleaseQuery();
      softmax.SumOverQuad();
      ptx::WgmmaWait<0>();
      ptx::PinRegisters(o);
      c_.Release(c_.cursor);
      c_.cursor.Advance();
    } else {
      c_.ReleaseQuery();
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) o[i] = 0.f;
    }
    Store(work, h, softmax, o);
  }

  __device__ __forceinline__ void Store(const Work& work, int32_t h, const OnlineSoftmax& softmax, const float (&o)[kOutputs]) {
    const bool is_final = work.out == kFinalRows;
    const float factor[2] = {InverseSum(softmax.sum[0]), InverseSum(softmax.sum[1])};
    OutputRow rows[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t row = warpgroup_ * kRows + c_.warp % 4 * 16 + c_.lane / 4 + 8 * i;
      rows[i] = {nullptr, nullptr};
      if (row >= work.num_rows) continue;
      rows[i] = is_final ? FinalRow<Element>(c_.params, c_.plan, work.row_begin + row, work.kv_head_begin + h)
                         : PartialRow<kHeadDim>(c_.params, work.out + static_cast<int64_t>(h) * work.num_rows + row);
      if (c_.lane % 4 == 0 && rows[i].lse != nullptr) {
        *rows[i].lse = LogSumExp(softmax.max[i], softmax.sum[i], c_.params.sm_scale_log2);
      }
    }
    if (is_final) {
      StoreFinalFragment<Element>(rows, o, factor);
      return;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (rows[i].o == nullptr) continue;
#pragma unroll
      for (int j = 0; j < kOutputs / 4; ++j) {
        const float x[2] = {o[4 * j + 2 * i] * factor[i], o[4 * j + 2 * i + 1] * factor[i]};
        StoreColumns<Element>(rows[i], false, 8 * j + c_.lane % 4 * 2, x);
      }
    }
  }

  Consumer<Config>& c_;
  const int32_t warpgroup_;
};

}  // namespace tvm_infer::attention
