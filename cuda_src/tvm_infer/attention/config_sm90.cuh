// Shape of the sm_90a attention kernel: tiles, roles, shared memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "tvm_infer/attention/variant.cuh"
#include "tvm_infer/cuda/params.h"
#include "tvm_infer/ptx/element.cuh"
#include "tvm_infer/tile/ring.cuh"
#include "tvm_infer/tile/swizzle.cuh"

namespace tvm_infer::attention {

// Work::tile_class, an index into the tile table that the plans for this kernel are made with.
inline constexpr int kDecodeClass = 0;   // up to 16 packed rows: bound by the bytes of K and V
inline constexpr int kPrefillClass = 1;  // up to 128 packed rows: bound by the tensor cores

// In place of a page size: keys are rows of one tensor [kv_tokens, num_kv_heads, head_dim], those of a list in a run.
inline constexpr int kRagged = 0;

// Element: of queries and results. KvElement: of keys and values, the same or one of 8 bits. kHeadDim is of queries and keys, kHeadDimVo of
// values and results.
template <typename Element_, int kHeadDim_, int kPageSize_, VariantConcept Variant_ = NoVariant, typename KvElement_ = Element_,
          int kHeadDimVo_ = kHeadDim_>
struct ConfigSm90 {
  using Element = Element_;
  using KvElement = KvElement_;
  static constexpr bool kIsScaled = !std::is_same_v<Element, KvElement>;
  using Variant = Variant_;
  static constexpr bool kChangesQueries = attention::kChangesQueries<Variant>, kChangesKeys = attention::kChangesKeys<Variant>;
  static constexpr bool kHasVariant = Variant::kHasLogits || Variant::kHasMask || Variant::kHasOutput || kChangesQueries || kChangesKeys;
  static constexpr int kHeadDim = kHeadDim_, kHeadDimVo = kHeadDimVo_;
  static constexpr int kPageSize = kPageSize_;
  static_assert(kHeadDim % 16 == 0 && kHeadDim <= 256, "products of 16 columns, accumulators of 256");
  static_assert(kHeadDimVo == kHeadDim || (kHeadDimVo < kHeadDim && kHeadDimVo % 64 == 0 && kHeadDim % 64 == 0),
                "values are as wide as keys, or both are whole panels and results fit where queries were");
  static constexpr bool kIsRagged = kPageSize == kRagged;
  static constexpr bool kIsGather = !kIsRagged && kPageSize < 8;  // by cp.async, since a swizzled box holds whole groups of 8 tokens
  static_assert(kIsRagged || (kPageSize <= 64 && (kPageSize & (kPageSize - 1)) == 0), "pages of 1, 2, 4, 8, 16, 32 or 64 tokens");

  // Wide heads take half the keys: 128 logits, 128 weights and 256 columns of O do not fit a thread's registers. With narrower values they
  // would, but then shared memory has room for one query buffer, and prefill would drain at the end of each head.
  static constexpr int kTileKeys = kHeadDim <= 128 ? 128 : 64;
  static constexpr int kTileAlign = kIsRagged || kIsGather ? 1 : kPageSize;        // where in its list a tile may start
  static constexpr int kBoxKeys = kIsRagged || kIsGather ? kTileKeys : kPageSize;  // keys at one stride in shared memory
  static constexpr int kDecodeRows = 16;
  static constexpr int kDecodeColumns = kHeadDimVo * kTileKeys / 128;  // of O, a warp's in decode (attention/decode_tile.cuh)
  static constexpr int kPrefillRows = 128;
  static constexpr int kPanelRows = 64;  // of queries in shared memory: a warpgroup's

  // Warpgroup 0 loads (warp 0, gather also warp 3: K and V; warps 1, 2: queries), warpgroups 1 and 2 compute; warpgroup 3, where there is
  // one, makes 16 bits of 8 for prefill.
  static constexpr int kConsumerWarpgroups = 2;
  static constexpr int kConsumerWarps = 4 * kConsumerWarpgroups;
  static constexpr int kConsumerThreads = 32 * kConsumerWarps;
  static constexpr int kWidenerThreads = kIsScaled ? 128 : 0;
  static constexpr int kThreads = kConsumerThreads + 128 + kWidenerThreads;
  // 128 * 40 + 256 * 232 registers of the 65536; the compiler gives each role what setmaxnreg says. Who changes queries needs more to load.
  // Beside a warpgroup that widens it is 40, 216 and 40, or 40, 208 and 56: a tile of wide heads is in its registers at once.
  static constexpr int kWidenerRegisters = kHeadDim <= 128 ? 40 : 56;
  static constexpr int kProducerRegisters = kIsGather || kChangesQueries ? 56 : 40;
  static constexpr int kConsumerRegisters = kIsScaled ? (472 - kWidenerRegisters) / 2 : kIsGather || kChangesQueries ? 224 : 232;
  static_assert(128 * kProducerRegisters + kConsumerThreads * kConsumerRegisters + kWidenerThreads * kWidenerRegisters <= 65536);

  static constexpr int kPanels = tile::Panels(kHeadDim);
  static constexpr int kRowWidth =
      kPanels * tile::kPanelElements;  // elements of a row in shared memory; those behind kHeadDim are not used
  static constexpr bool kIsPadded = !kIsScaled && kRowWidth != kHeadDim;  // copies fill whole panels, one by one
  static constexpr int kLoadLanes = tile::RowLanes(kHeadDim);
  // Keys and values in the ring: 8-bit rows lie as 16-bit rows of half as many columns. Those of 64 and 192 are whole panels of 64 bytes,
  // those of 80 and 96 begin one panel of 128, whose end arrives as zeros.
  static constexpr int kKvColumns = kIsScaled ? kHeadDim / 2 : kHeadDim;
  static constexpr int kValueColumns = kIsScaled ? kHeadDimVo / 2 : kHeadDimVo;
  static constexpr int kKvPanelBytes = cuda::KvPanelBytes(kHeadDim, kIsScaled ? 1 : 2);
  using Boxes = tile::PageBoxes<kBoxKeys, kKvColumns, kKvPanelBytes>;          // of K
  using ValueBoxes = tile::PageBoxes<kBoxKeys, kValueColumns, kKvPanelBytes>;  // of V, from the start of its stage
  static_assert(!kIsScaled || (kHeadDimVo == kHeadDim && kPageSize >= 16), "8-bit elements: in pages, as wide as each other");
  static_assert(!kIsScaled || (!kChangesQueries && !kChangesKeys), "8-bit elements: variants of logits, mask and output");
  static constexpr int kBoxesPerTile = kTileKeys / kBoxKeys;

  // Queries of the next head arrive while the last tiles of this one are computed: heads take turns. With heads of 256, and of 192 in 8
  // bits, the room is better used for tiles, and prefill drains at the end of a head. Decode has two places even there, rows 0 … 15 and 16
  // … 31 of the one buffer.
  static constexpr int kQueryTurns = 2;
  static constexpr int kQueryBuffers = kHeadDim > 192 || (kIsScaled && kHeadDim > 128) ? 1 : 2;
  static constexpr int kQueryBytes = kPrefillRows * kRowWidth * 2;
  // From one turn's queries to the next one's.
  static constexpr int kPrefillQueryStride = kQueryBuffers == 2 ? kQueryBytes : 0;
  static constexpr int kDecodeQueryStride = kQueryBuffers == 2 ? kQueryBytes : kDecodeRows * tile::kPanelRowBytes;
  // One stage is a tile of K or of V of one head (of narrower values not all of it). Prefill takes all the room there is, since its tiles
  // of K and V pass in bursts. Decode keeps 128 KB in flight: 64 KB hide the latency at this SM's share of the memory bandwidth, and more
  // than 128 KB is slower (64 requests of 8192 keys: 484 us with 128 KB, 488 with 160), since SMs share unequally.
  static constexpr int kStageBytes = kBoxesPerTile * Boxes::kPageBytes;
  static constexpr int kPrefillStages = kIsScaled ? 2 : 1;  // that a tile of prefill takes: 8-bit ones are widened over two
  static constexpr int kDecodeOutputBytes = kTileKeys / 16 * 8 * kRowWidth * 4;
  static constexpr int kMaxStages = 20;  // barriers have to fit, too
  static constexpr int kRoomForStages = (229376 - kQueryBuffers * kQueryBytes) / (kPrefillStages * kStageBytes) * kPrefillStages;
  static constexpr int kStages = kRoomForStages < kMaxStages ? kRoomForStages : kMaxStages;
  static constexpr int kDecodeBytes = 131072;
  static constexpr int kDecodeStages = kDecodeBytes / kStageBytes < kStages ? kDecodeBytes / kStageBytes : kStages;
  static_assert(kStages >= 3 * kPrefillStages, "prefill holds K of a tile and V of the one before, while the next arrives");
  using Ring = tile::Ring<kStages, kStageBytes>;
  static constexpr int kFullArrivals = kIsGather ? 64 : 1;  // of a stage: the threads that gather, or one that expects bytes
  // NOTE: where threads write what threads read, all of them arrive. One lane after a __syncwarp would do for the memory model, but
  // compute-sanitizer's racecheck does not see that the other lanes are done, and no time is lost.
  static constexpr int kEmptyArrivals = kIsGather ? kConsumerThreads : kConsumerWarps;

  // Named barriers.
  static constexpr int kBarrierConsumers = 1;
  static constexpr int kBarrierTurn = 2;       // + warpgroup: its turn to issue matrix products
  static constexpr int kBarrierWarpgroup = 4;  // + warpgroup
  static constexpr int kBarrierKeys = 6;       // a tile of keys is changed
  static constexpr int kBarrierWiden = 7;      // of the warpgroup that widens
  static constexpr int kBarrierDecoded = 8;    // where it comes in (attention/kv_widener.cuh)

  struct SharedMemory {
    alignas(1024) uint8_t ring[kStages * kStageBytes];
    // Queries, for each warpgroup its panels of 64 rows, decode's in the first. Once decode has read them, O of the eight warps, 8 rows at
    // a time, fp32; with one buffer that is where no turn's queries are (DecodeOutput).
    alignas(1024) uint8_t query[kQueryBuffers][kQueryBytes];
    // Beside each turn's queries, and their owner's. Decode: state of the eight warps. Prefill: where the rows' results go; looking that up
    // when they are stored would be a chain of loads and divisions that nothing covers.
    union {
      struct {
        float warp_max[kConsumerWarps][kDecodeRows];
        float warp_sum[kConsumerWarps][kDecodeRows];
      };
      int2 rows[kPrefillRows];  // offset in O, in units of 16 bytes (an uint32_t); index in LSE
    } scratch[kQueryTurns];
    int2 decode_rows[kQueryTurns][kDecodeRows];         // what `rows` is to prefill
    float query_unscale[kIsScaled ? kPrefillRows : 1];  // attention/half_queries.cuh
    int2 head[kQueryTurns];                             // first partial row or kFinalRows, number of rows
    tile::RingBarriers<kStages> ring_barriers;
    uint64_t query_full[kQueryTurns];   // 64 arrivals: the loader warps
    uint64_t query_empty[kQueryTurns];  // kConsumerThreads arrivals
    int32_t is_last_arrival;

    __device__ __forceinline__ float* DecodeOutput(uint32_t turn) {
      if constexpr (kQueryBuffers == 2) return reinterpret_cast<float*>(query[turn]);
      return reinterpret_cast<float*>(query[0] + kQueryBytes / 2);
    }
  };
  static constexpr uint32_t kQueryOffset = kStages * kStageBytes;  // of `query` in it
  static_assert(kDecodeOutputBytes <= (kQueryBuffers == 2 ? kQueryBytes : kQueryBytes / 2),
                "decode's O fits where only prefill's queries are");
  static_assert(sizeof(SharedMemory) <= 232448, "227 KB of shared memory");
};

}  // namespace tvm_infer::attention
