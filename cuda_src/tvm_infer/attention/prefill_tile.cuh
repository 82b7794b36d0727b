// The prefill class: 128 packed rows, 64 for each of two warpgroups, against tiles of 128 or 64 keys; both products on wgmma.
//
// Two overlaps keep the tensor cores busy during the exponentials (FlashAttention-3, arXiv 2407.08608, sections 3.1 and 3.2): the
// warpgroups take turns issuing products, so that one's softmax runs under the other's products; and within a warpgroup the logits of
// tile t + 1 are issued before the values of tile t.
#pragma once

#include <cstdint>

#include "tvm_infer/attention/change_rows.cuh"
#include "tvm_infer/attention/consumer.cuh"
#include "tvm_infer/attention/half_queries.cuh"
#include "tvm_infer/attention/mask.cuh"
#include "tvm_infer/attention/output.cuh"
#include "tvm_infer/attention/prefill_products.cuh"
#include "tvm_infer/attention/prefill_store.cuh"
#include "tvm_infer/attention/softmax.cuh"
#include "tvm_infer/ptx/wgmma.cuh"

namespace tvm_infer::attention {

template <typename Config>
class PrefillTile : private PrefillProducts<Config> {
 public:
  using Element = typename Config::Element;
  using Ring = typename Config::Ring;
  using Variant = typename Config::Variant;
  static constexpr int kHeadDim = Config::kHeadDim, kHeadDimVo = Config::kHeadDimVo, kTileKeys = Config::kTileKeys;
  static constexpr int kRows = Config::kPanelRows;
  static constexpr int kOutputs = kHeadDimVo / 2;  // fp32 accumulators a thread
  static constexpr int kLogits = kTileKeys / 2;    // the same of a tile

  __device__ __forceinline__ explicit PrefillTile(Consumer<Config>& c) : PrefillProducts<Config>(c) {}

  // Executes works from `index` on (the first is `work`) up to one that was cut, or the last before one of another class or without
  // keys; returns the index of the last one done.
  //
  // One stream of tiles, across heads and works: nothing drains at a head's end, the next head's first logits are under way before this
  // head's last values. With one query buffer a stream ends with its head.
  __device__ __forceinline__ int32_t Run(const WorkQueue& queue, int32_t index, Work work) {
    if constexpr (Config::kQueryBuffers > 1) return RunStream(queue, index, work, 0);
#pragma unroll 1
    for (int32_t head = 0; head < work.num_kv_heads; ++head) RunStream(queue, index, work, head);
    return index;
  }
  // A work whose rows see no key: O = 0, LSE = -inf.
  __device__ __forceinline__ void RunEmpty(const Work& work) {
    const float zero[2] = {0.f, 0.f};
    for (int32_t h = 0; h < work.num_kv_heads; ++h) {
      c_.ReleaseQuery(c_.WaitQuery());
#pragma unroll 1
      for (int32_t row = c_.Warp(); row < work.num_rows; row += Config::kConsumerWarps) {
        const OutputRow out = RowOf(work, h, row);
#pragma unroll 1
        for (int32_t column = 2 * c_.Lane(); column < kHeadDimVo; column += 64) {
          StoreColumns<Element>(out, work.out == kFinalRows, column, zero);
        }
        if (c_.Lane() == 0 && out.lse != nullptr) *out.lse = kNegInf;
      }
    }
  }

  // Before the first work: warpgroup 0 has the first turn.
  __device__ __forceinline__ void GiveFirstTurn() {
    if (warpgroup_ == 1) ptx::BarrierArrive(Config::kBarrierTurn + 0, Config::kConsumerThreads);
  }

 private:
  using Products = PrefillProducts<Config>;
  using Products::c_, Products::warpgroup_;
  using Products::WaitTurn, Products::PassTurn, Products::IssueLogits, Products::IssueValues, Products::PackWeights, Products::CleanValues;
  using typename Products::Operand;
  using Tiles = KeyTiles<Config::kTileAlign, kTileKeys>;

  // From head `head` of the first work on.
  __device__ __forceinline__ int32_t RunStream(const WorkQueue& queue, int32_t index, Work work, int32_t head) {
    float s[kLogits], o[kOutputs], rescale[2];
    uint32_t p[kLogits / 2];
    SoftmaxState<Variant> softmax;
    Tiles tiles(work);
    Visible visible = VisibleTo(work);
    VariantRows rows, done_rows;
    EnterVariant(rows, work, head);
    int32_t tile = 0;

    // The first tile: no earlier values to go with its logits.
    uint32_t query = c_.WaitQuery();
    LogitScales scales = ScalesOf(query, work.kv_head_begin + head);
    WaitKeys(c_.cursor, rows, tiles.base);
    WaitTurn();
    IssueLogits(s, query, c_.ring.Data(c_.cursor));
    PassTurn();
    ptx::WgmmaWait<0>();
    ptx::PinRegisters(s);
    Release(c_.cursor);
    c_.cursor.Advance(Config::kPrefillStages);
    Softmax(s, visible, rows, scales, tiles.base, softmax, rescale);
    PackWeights(p, s);

    ptx::ZeroRegisters(o);
    bool accumulate = false;  // o holds earlier values of this head
    int32_t values_begin, values_end, done_index, done_head;
    for (;;) {
      // p holds the weights of `tile` of `head` of work `index`. Step to the tile after it.
      values_begin = work.kv_begin - tiles.base - tile * kTileKeys;
      values_end = work.kv_end - tiles.base - tile * kTileKeys;
      done_index = index;
      done_head = work.kv_head_begin + head;
      done_rows = rows;
      const bool ends_head = ++tile == tiles.count;
      if (ends_head) {
        if constexpr (Config::kQueryBuffers == 1) break;
        tile = 0;
        if constexpr (Config::kHasVariant) rows.NextHead(c_.params.expected.group_size);
        if (++head == work.num_kv_heads) {
          head = 0;
          if (work.merge != kNoMerge || ++index == queue.end) break;
          work = LoadWork(queue.works, index);
          if (work.tile_class == kDecodeClass || work.kv_end <= work.kv_begin) break;
          tiles = Tiles(work);
          visible = VisibleTo(work);
          EnterVariant(rows, work, 0);
        }
        query = c_.WaitQuery();
        scales.Leave(softmax);
        scales = ScalesOf(query, work.kv_head_begin + head);
      }
      const typename Ring::Cursor k = c_.cursor;
      c_.cursor.Advance(Config::kPrefillStages);
      if (ends_head || values_begin > 0) {
        c_.WaitFullForWgmma(c_.cursor);
        CleanValues(c_.ring.Data(c_.cursor), values_begin, values_end);
      }
      WaitKeys(k, rows, tiles.base + tile * kTileKeys);
      WaitTurn();
      IssueLogits(s, query, c_.ring.Data(k));
      c_.WaitFullForWgmma(c_.cursor);
      IssueValues(o, p, c_.ring.Data(c_.cursor), accumulate, values_end);
      PassTurn();
      ptx::WgmmaWait<1>();
      ptx::PinRegisters(s);
      Release(k);
      if (ends_head) {
        // NOTE: before the next head's softmax, so that only one state is kept: the other warpgroup's products cover both.
        ptx::WgmmaWait<0>();
        ptx::PinRegisters(o);
        StoreHead<Config>(c_, query ^ 1, done_rows, done_head, softmax, o);
        softmax = SoftmaxState<Variant>();
      }
      Softmax(s, visible, rows, scales, tiles.base + tile * kTileKeys, softmax, rescale);
      ptx::WgmmaWait<0>();
      ptx::PinRegisters(o);
      Release(c_.cursor);
      c_.cursor.Advance(Config::kPrefillStages);
      PackWeights(p, s);  // NOTE: before the branch, so that it runs between the exponentials
      if (__any_sync(0xffffffff, rescale[0] != 1.f || rescale[1] != 1.f)) {  // maxima seldom move after the first tiles
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) o[i] *= rescale[i / 2 % 2];
      }
      accumulate = !ends_head;
    }

    // The last tile: no later logits to go with its values.
    c_.WaitFullForWgmma(c_.cursor);
    CleanValues(c_.ring.Data(c_.cursor), values_begin, values_end);
    IssueValues(o, p, c_.ring.Data(c_.cursor), accumulate, values_end);
    ptx::WgmmaWait<0>();
    ptx::PinRegisters(o);
    Release(c_.cursor);
    c_.cursor.Advance(Config::kPrefillStages);
    // The rows are stored through the query buffer: no warp of the warpgroup's products reads it any more.
    ptx::BarrierSync(Config::kBarrierWarpgroup + warpgroup_, 128);
    scales.Leave(softmax);
    StoreHead<Config>(c_, query, done_rows, done_head, softmax, o);
    return done_index;
  }

  // Factors on the logits of this thread's rows; 1 but for keys of 8 bits.
  struct LogitScales {
    float of[2] = {1.f, 1.f};

    // A head's state as that of logits which had them.
    __device__ __forceinline__ void Leave(SoftmaxState<Variant>& softmax) const {
      if constexpr (!Config::kIsScaled || Variant::kHasLogits) return;
#pragma unroll
      for (int i = 0; i < 2; ++i) softmax.max[i] *= of[i];
    }
  };
  // A head's queries as the products want them, those of bfloat16 in float16 beside keys of 8 bits; and its scales.
  __device__ __forceinline__ LogitScales ScalesOf(uint32_t query, int32_t kv_head) const {
    LogitScales scales;
    if constexpr (Config::kIsScaled) {
      scales.of[0] = scales.of[1] = c_.KeyScale(kv_head);
      if constexpr (Element::kIsBf16) {
        const int32_t thread = c_.ThreadAnew();
        float* const rows = c_.shared.query_unscale + warpgroup_ * kRows;
        HalfQueries<Config>(c_.PrefillQuery(query) + warpgroup_ * kRows * Config::kRowWidth * 2, rows, thread % 128);
        ptx::FenceProxyAsyncShared();
        ptx::BarrierSync(Config::kBarrierWarpgroup + warpgroup_, 128);
#pragma unroll
        for (int i = 0; i < 2; ++i) scales.of[i] *= rows[thread % 128 / 32 * 16 + thread % 32 / 4 + 8 * i];
      }
      // NOTE: products are below 2^40, and those of a row of zeros with a small scale 0; a factor of 0 would make NaN of a maximum of -inf.
#pragma unroll
      for (int i = 0; i < 2; ++i) scales.of[i] = fmaxf(scales.of[i], 0x1p-90f);
    }
    return scales;
  }
  // Both stages of a widened tile.
  __device__ __forceinline__ void Release(typename Ring::Cursor at) const {
    c_.Release(at);
    if constexpr (Config::kPrefillStages == 2) {
      at.Advance();
      c_.Release(at);
    }
  }

  // Which keys this thread's rows see, and which all rows of the warpgroup see: tiles inside need no mask.
  struct Visible {
    KeyRange keys[2];
    KeyRange all;
  };
  __device__ __forceinline__ Visible VisibleTo(const Work& work) const {
    const Band band = c_.plan.header->band;
    const TokenOfRow token(work, c_.params.expected.group_size);
    const int32_t last = work.num_rows - 1;
    const int32_t thread = c_.ThreadAnew(), first = thread / 128 * kRows, row = thread / 32 * 16 + thread % 32 / 4;
    return {{VisibleKeys(work, band, token, row), VisibleKeys(work, band, token, row + 8)},
            {VisibleKeys(work, band, token, min(first + kRows - 1, last)).begin, VisibleKeys(work, band, token, min(first, last)).end}};
  }

  // This thread's rows, as the variant sees them.
  __device__ __forceinline__ void EnterVariant(VariantRows& rows, const Work& work, int32_t head) const {
    const int32_t thread = c_.ThreadAnew(), group = c_.params.expected.group_size;
    if constexpr (Config::kHasVariant) {
      rows.template Enter<Variant>(c_.plan, work, group, thread / 32 * 16 + thread % 32 / 4);
      if constexpr (Config::kQueryBuffers == 1) {
        for (int32_t h = 0; h < head; ++h) rows.NextHead(group);
      }
    }
  }

  // Until the tile of keys at `k`, whose first is at position `kv_pos`, is there, and is what the variant makes of it: each warp
  // changes 16.
  __device__ __forceinline__ void WaitKeys(const typename Ring::Cursor& k, const VariantRows& rows, int32_t kv_pos) const {
    if constexpr (Config::kChangesKeys) {
      c_.ring.WaitFull(k);
      using Panels = tile::PageBoxes<kTileKeys, kHeadDim>;  // as the copies for wgmma leave keys
      if (c_.Warp() < kTileKeys / 16) ChangeKeys<Config, Panels, 2>(c_.variant, rows.rows[0], c_.ring.Data(k), c_.Warp(), kv_pos);
      ptx::FenceProxyAsyncShared();
      ptx::BarrierSync(Config::kBarrierKeys, Config::kConsumerThreads);
    } else {
      c_.WaitFullForWgmma(k);
    }
  }

  // Logits of one tile to weights.
  __device__ __forceinline__ void Softmax(float (&s)[kLogits], const Visible& visible, const VariantRows& rows, const LogitScales& scales,
                                          int32_t tile_key, SoftmaxState<Variant>& softmax, float (&rescale)[2]) {
    const float scale = c_.SoftmaxScale();
    if constexpr (Variant::kHasLogits || Variant::kHasMask) {
      // NOTE: a value of its own: what variant and band mask compute of the same one would be kept for both, and spill.
      int32_t kv_pos = tile_key;
      asm volatile("" : "+r"(kv_pos));
      const float sm_scale = c_.params.sm_scale;
      ApplyVariant<Variant>(s, c_.variant, rows, kv_pos, {sm_scale * scales.of[0], sm_scale * scales.of[1]});
    }
    if (tile_key < visible.all.begin) {
      MaskLogits<true>(s, visible.keys, tile_key);
    } else if (tile_key + kTileKeys > visible.all.end) {
      MaskLogits<false>(s, visible.keys, tile_key);
    }
    if constexpr (Variant::kHasSmallLogits && Variant::kHasSoftmax && Operand::kIsBf16) {
      softmax.UpdateSmall(s, scale, rescale);
    } else {
      const bool lacks_scales = !Variant::kHasLogits;  // a variant's logits have had them
      softmax.Update(s, {lacks_scales ? scale * scales.of[0] : scale, lacks_scales ? scale * scales.of[1] : scale}, rescale);
    }
  }

  __device__ __forceinline__ OutputRow RowOf(const Work& work, int32_t head, int32_t row) const {
    return work.out == kFinalRows ? FinalRow<Element>(c_.params, c_.plan, work.row_begin + row, work.kv_head_begin + head)
                                  : PartialRow<kHeadDimVo>(c_.params, work.out + static_cast<int64_t>(head) * work.num_rows + row);
  }
};

}  // namespace tvm_infer::attention
