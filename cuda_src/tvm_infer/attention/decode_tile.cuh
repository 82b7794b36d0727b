// The decode class: up to 16 packed rows. Bound by the bytes of K and V, so nothing may wait for anything but them.
//
// The eight warps share a tile of 128 keys, 16 keys each, and never synchronise inside a work: each has its own max, sum and O over its
// keys. With mma.sync the weights stay in registers between the two products (no shared memory, no barrier); a page costs a warp about
// 200 instructions, an eighth of what the schedulers can issue while it arrives. At the end of a head the eight states are merged.
#pragma once

#include <cstdint>

#include "tvm_infer/attention/change_rows.cuh"
#include "tvm_infer/attention/consumer.cuh"
#include "tvm_infer/attention/mask.cuh"
#include "tvm_infer/attention/output.cuh"
#include "tvm_infer/attention/softmax.cuh"
#include "tvm_infer/ptx/mma.cuh"

namespace tvm_infer::attention {

template <typename Config>
class DecodeTile {
 public:
  using Element = typename Config::Element;
  using Ring = typename Config::Ring;
  using Variant = typename Config::Variant;
  using Boxes = typename Config::Boxes;
  static constexpr int kHeadDim = Config::kHeadDim, kTileKeys = Config::kTileKeys, kWarpKeys = 16;
  static_assert(kWarpKeys * Config::kConsumerWarps == kTileKeys);

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
      float o[kHeadDim / 8][4];
      SoftmaxState<Variant> softmax;
      const uint32_t query = c_.WaitQuery();
      RunHead(work, tiles, keys, seen_by_all, rows, query, o, softmax);
      Merge(work, h, query, o, softmax);
      if constexpr (Config::kHasVariant) rows.NextHead(c_.params.expected.group_size);
    }
  }

 private:
  // Queries in registers from tile to tile leave too few to change keys.
  static constexpr bool kReloadsQuery = Config::kChangesKeys;
  using Tiles = KeyTiles<Config::kTileAlign, kTileKeys>;

  // Rows behind the work's last repeat it: their results are not used.
  __device__ __forceinline__ void LoadQuery(uint32_t (&q)[kHeadDim / 16][4], uint32_t query) const {
    const uint32_t row = c_.Lane() % 16, chunk = c_.Lane() / 16;
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      const int panel = d * 16 / tile::kPanelElements * Config::kPanelRows * tile::kPanelRowBytes;
      ptx::LoadMatrixX4(q[d], c_.QueryAddress(query) + panel + tile::SwizzledOffset(row, d * 2 % 8 + chunk));
    }
  }

  __device__ __forceinline__ void RunHead(const Work& work, const Tiles& tiles, const KeyRange (&keys)[2], const KeyRange& seen_by_all,
                                          const VariantRows& rows, uint32_t query, float (&o)[kHeadDim / 8][4],
                                          SoftmaxState<Variant>& softmax) {
    uint32_t q[kHeadDim / 16][4];
    if constexpr (!kReloadsQuery) LoadQuery(q, query);
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0.f;

    // ldmatrix: lane l addresses row l % 8 of 8x8 block l / 8 of 16 columns. K blocks: (keys, columns) = (0, 0) (0, 1) (1, 0) (1, 1); V
    // blocks, transposed while loading: (0, 0) (1, 0) (0, 1) (1, 1).
    const uint32_t block = c_.Lane() / 8, first = c_.Warp() * kWarpKeys + c_.Lane() % 8;
    const uint32_t k_offset = Boxes::Offset(first + block / 2 * 8, block % 2), v_offset = Boxes::Offset(first + block % 2 * 8, block / 2);
    for (int32_t t = 0; t < tiles.count; ++t) {
      const int32_t key = tiles.base + t * kTileKeys + c_.Warp() * kWarpKeys;
      const bool has_keys = key < work.kv_end && key + kWarpKeys > work.kv_begin;
      float s[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
      c_.ring.WaitFull(c_.cursor);
      if constexpr (Config::kChangesKeys) {
        if (has_keys) ChangeOwnKeys(rows, tiles.base + t * kTileKeys);
      }
      if constexpr (kReloadsQuery) LoadQuery(q, query);
      if (has_keys) Logits(s, q, c_.ring.Data(c_.cursor) + k_offset);
      __syncwarp();
      c_.Release(c_.cursor);
      c_.cursor.Advance();
      uint32_t p[4];
      if (has_keys) {
        if constexpr (Variant::kHasLogits || Variant::kHasMask) {
          ApplyVariant<Variant>(s, c_.variant, rows, key, c_.params.sm_scale);
        }
        if (key < seen_by_all.begin || key + kWarpKeys > seen_by_all.end) MaskLogits<true>(s, keys, key);
        float rescale[2];
        softmax.Update(s, c_.SoftmaxScale(), rescale);
#pragma unroll
        for (int i = 0; i < 4; ++i) p[i] = ptx::Pack<Element>(s[2 * i], s[2 * i + 1]);
        if (__any_sync(0xffffffff, rescale[0] != 1.f || rescale[1] != 1.f)) {
#pragma unroll
          for (int j = 0; j < kHeadDim / 8; ++j) {
            o[j][0] *= rescale[0];
            o[j][1] *= rescale[0];
            o[j][2] *= rescale[1];
            o[j][3] *= rescale[1];
          }
        }
      }
      c_.ring.WaitFull(c_.cursor);
      if (has_keys) Values(o, p, c_.ring.Data(c_.cursor) + v_offset, work.kv_begin - key, work.kv_end - key);
      __syncwarp();
      c_.Release(c_.cursor);
      c_.cursor.Advance();
    }
    softmax.SumOverQuad();
  }

  // This warp's keys of the tile at the cursor, whose key 0 is at position `kv_pos`.
  __device__ __forceinline__ void ChangeOwnKeys(const VariantRows& rows, int32_t kv_pos) const {
    ChangeKeys<Config, Boxes, 2>(c_.variant, rows.rows[0], c_.ring.Data(c_.cursor), c_.Warp(), kv_pos);
    // NOTE: the next copy into this stage is the async proxy's, and must not pass these stores.
    if constexpr (!Config::kIsGather) ptx::FenceProxyAsyncShared();
    __syncwarp();
  }

  // s[0 … 3]: keys 0 … 7 of this warp, s[4 … 7]: keys 8 … 15.
  __device__ __forceinline__ static void Logits(float (&s)[8], const uint32_t (&q)[kHeadDim / 16][4], uint32_t address) {
    float s0[4] = {0.f, 0.f, 0.f, 0.f}, s1[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      uint32_t k[4];
      ptx::LoadMatrixX4(k, Boxes::Columns(address, 16 * d));
      ptx::Mma16x8x16<Element>(s0, q[d], k[0], k[1]);
      ptx::Mma16x8x16<Element>(s1, q[d], k[2], k[3]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[i] = s0[i];
      s[4 + i] = s1[i];
    }
  }

  // Keys outside [begin, end) may hold NaN in V, and 0 * NaN is NaN: their values become 0.
  __device__ __forceinline__ static void Values(float (&o)[kHeadDim / 8][4], const uint32_t (&p)[4], uint32_t address, int32_t begin,
                                                int32_t end) {
    uint32_t keep[2] = {0xffffffff, 0xffffffff};
    const bool is_edge = begin > 0 || end < kWarpKeys;
    if (is_edge) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int32_t k = 8 * i + threadIdx.x % 4 * 2;
        keep[i] = (k >= begin && k < end ? 0xffffu : 0u) | (k + 1 >= begin && k + 1 < end ? 0xffff0000u : 0u);
      }
    }
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      uint32_t v[4];
      ptx::LoadMatrixX4Transposed(v, Boxes::Columns(address, 16 * d));
      if (is_edge) {
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] &= keep[i % 2];
      }
      ptx::Mma16x8x16<Element>(o[2 * d], p, v[0], v[1]);
      ptx::Mma16x8x16<Element>(o[2 * d + 1], p, v[2], v[3]);
    }
  }

  // The states of the eight warps into one, eight rows at a time through the query buffer; warp w merges and stores row w. Then the
  // buffer goes back.
  __device__ __forceinline__ void Merge(const Work& work, int32_t h, uint32_t query, const float (&o)[kHeadDim / 8][4],
                                        const SoftmaxState<Variant>& softmax) {
    auto& shared = c_.shared;
    auto* scratch = reinterpret_cast<float*>(shared.query[query]);  // [warp][8 rows][kHeadDim], blocks of 8 columns at block ^ row
    const int32_t thread = c_.ThreadAnew(), warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
    if (t == 0) {
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
        float* mine = scratch + (warp * 8 + g) * kHeadDim + 2 * t;
#pragma unroll
        for (int j = 0; j < kHeadDim / 8; ++j) {
          *reinterpret_cast<float2*>(mine + (j ^ g) * 8) = make_float2(o[j][2 * pass], o[j][2 * pass + 1]);
        }
      }
      ptx::BarrierSync(Config::kBarrierConsumers, Config::kConsumerThreads);
      const int32_t row = 8 * pass + warp;
      if (row < head.y) MergeRow(work, h, head.x, row, query, scratch + warp * kHeadDim);
    }
    c_.ReleaseQuery(query);
  }

  // `first_partial`: the head's first partial row, or kFinalRows.
  __device__ __forceinline__ void MergeRow(const Work& work, int32_t h, int32_t first_partial, int32_t row, uint32_t query,
                                           const float* scratch) {
    constexpr int kColumns = kHeadDim / 32;  // a lane's
    const auto& shared = c_.shared;
    const float scale = c_.SoftmaxScale();
    float max = kNegInf;
#pragma unroll
    for (int w = 0; w < Config::kConsumerWarps; ++w) max = fmaxf(max, shared.scratch[query].warp_max[w][row]);
    const float offset = max == kNegInf ? 0.f : max * scale;
    const int32_t lane = c_.ThreadAnew() % 32, column = lane * kColumns, at = (column / 8 ^ row % 8) * 8 + column % 8;
    float sum = 0.f, o[kColumns] = {};
#pragma unroll
    for (int w = 0; w < Config::kConsumerWarps; ++w) {
      const float weight = ptx::Exp2(shared.scratch[query].warp_max[w][row] * scale - offset);
      sum += weight * shared.scratch[query].warp_sum[w][row];
      const float* part = scratch + w * 8 * kHeadDim + at;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) o[i] += weight * part[i];
    }
    const float factor = Normaliser<Variant>(sum);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) o[i] *= factor;
    const bool is_final = first_partial == kFinalRows;
    if constexpr (Variant::kHasOutput) {
      if (is_final) {
        const variant::Row at = VariantRowOf(c_.plan, work.row_begin + row, work.kv_head_begin + h);
        ApplyOutput<Variant>(o, c_.variant, at, StateLse<Variant>(max, sum, scale));
      }
    }
    OutputRow out;
    if (is_final) {
      const int2 at = shared.decode_rows[query][row];
      out.o = static_cast<char*>(c_.params.o) + static_cast<uint64_t>(static_cast<uint32_t>(at.x)) * 16;
      out.lse = c_.params.lse == nullptr ? nullptr : c_.params.lse + at.y;
    } else {
      out = PartialRow<kHeadDim>(c_.params, first_partial + row);
    }
    StoreColumns<Element>(out, is_final, column, o);
    if (lane == 0 && out.lse != nullptr) *out.lse = StateLse<Variant>(max, sum, scale);
  }

  Consumer<Config>& c_;
};

}  // namespace tvm_infer::attention
