// Shape of the sm_90a attention kernel: tiles, roles, shared memory.
#pragma once

#include <cstdint>

#include "tvm_infer/attention/variant.cuh"
#include "tvm_infer/ptx/element.cuh"
#include "tvm_infer/tile/ring.cuh"
#include "tvm_infer/tile/swizzle.cuh"

namespace tvm_infer::attention {

// Work::tile_class, an index into the tile table that the plans for this kernel are made with.
inline constexpr int kDecodeClass = 0;   // up to 16 packed rows: bound by the bytes of K and V
inline constexpr int kPrefillClass = 1;  // up to 128 packed rows: bound by the tensor cores

// In place of a page size: keys are rows of one tensor [kv_tokens, num_kv_heads, head_dim], those of a list in a run.
inline constexpr int kRagged = 0;

template <typename Element_, int kHeadDim_, int kPageSize_, VariantConcept Variant_ = NoVariant>
struct ConfigSm90 {
  using Element = Element_;
  using Variant = Variant_;
  static constexpr bool kChangesQueries = attention::kChangesQueries<Variant>, kChangesKeys = attention::kChangesKeys<Variant>;
  static constexpr bool kHasVariant = Variant::kHasLogits || Variant::kHasMask || Variant::kHasOutput || kChangesQueries || kChangesKeys;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kPageSize = kPageSize_;
  static_assert(kHeadDim == 64 || kHeadDim == 128, "head_dim 64 or 128");
  static constexpr bool kIsRagged = kPageSize == kRagged;
  static constexpr bool kIsGather = !kIsRagged && kPageSize < 8;  // by cp.async, since a swizzled box holds whole groups of 8 tokens
  static_assert(kIsRagged || (kPageSize <= 64 && (kPageSize & (kPageSize - 1)) == 0), "pages of 1, 2, 4, 8, 16, 32 or 64 tokens");

  static constexpr int kTileKeys = 128;
  static constexpr int kTileAlign = kIsRagged || kIsGather ? 1 : kPageSize;        // where in its list a tile may start
  static constexpr int kBoxKeys = kIsRagged || kIsGather ? kTileKeys : kPageSize;  // keys at one stride in shared memory
  static constexpr int kDecodeRows = 16;
  static constexpr int kPrefillRows = 128;
  static constexpr int kPanelRows = 64;  // of queries in shared memory: a warpgroup's

  // Warpgroup 0 loads (warp 0, gather also warp 3: K and V; warps 1, 2: queries), warpgroups 1 and 2 compute.
  static constexpr int kConsumerWarpgroups = 2;
  static constexpr int kConsumerWarps = 4 * kConsumerWarpgroups;
  static constexpr int kConsumerThreads = 32 * kConsumerWarps;
  static constexpr int kThreads = kConsumerThreads + 128;
  // 128 * 40 + 256 * 232 registers of the 65536; the compiler gives each role what setmaxnreg says. Who changes queries needs more to load.
  static constexpr int kProducerRegisters = kIsGather || kChangesQueries ? 56 : 40;
  static constexpr int kConsumerRegisters = kIsGather || kChangesQueries ? 224 : 232;

  static constexpr int kPanels = kHeadDim / tile::kPanelElements;
  using Boxes = tile::PageBoxes<kBoxKeys, kHeadDim>;
  static constexpr int kBoxesPerTile = kTileKeys / kBoxKeys;

  // Queries of the next head arrive while the last tiles of this one are computed.
  static constexpr int kQueryBuffers = 2;
  static constexpr int kQueryBytes = kPrefillRows * kHeadDim * 2;
  // One stage is a tile of K or of V of one head. Prefill takes all the room there is, since its tiles of K and V pass in bursts. Decode
  // keeps 128 KB in flight: 64 KB hide the latency at this SM's share of the memory bandwidth, and more than 128 KB is slower (64
  // requests of 8192 keys: 484 us with 128 KB, 488 with 160), since SMs share unequally.
  static constexpr int kStageBytes = kTileKeys * kHeadDim * 2;
  static constexpr int kStages = (229376 - kQueryBuffers * kQueryBytes) / kStageBytes;
  static constexpr int kDecodeStages = 131072 / kStageBytes;
  static_assert(kDecodeStages < kStages);
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

  struct SharedMemory {
    alignas(1024) uint8_t ring[kStages * kStageBytes];
    // Prefill: queries, for each warpgroup its panels of 64 rows. Decode: O of the eight warps, 8 rows at a time, fp32.
    alignas(1024) uint8_t query[kQueryBuffers][kQueryBytes];
    // Beside each query buffer, and its owner's. Decode: state of the eight warps. Prefill: where the rows' results go; looking that up
    // when they are stored would be a chain of loads and divisions that nothing covers.
    union {
      struct {
        float warp_max[kConsumerWarps][kDecodeRows];
        float warp_sum[kConsumerWarps][kDecodeRows];
      };
      int2 rows[kPrefillRows];  // offset in O, in units of 16 bytes (an uint32_t); index in LSE
    } scratch[kQueryBuffers];
    int2 decode_rows[kQueryBuffers][kDecodeRows];  // what `rows` is to prefill
    int2 head[kQueryBuffers];                      // first partial row or kFinalRows, number of rows
    tile::RingBarriers<kStages> ring_barriers;
    uint64_t query_full[kQueryBuffers];   // 64 arrivals: the loader warps
    uint64_t query_empty[kQueryBuffers];  // kConsumerThreads arrivals
    uint32_t last_arrivals;               // a bit for each merge of the work at hand that this CTA was the last to arrive at
  };
  static constexpr uint32_t kQueryOffset = kStages * kStageBytes;  // of `query` in it
  static_assert(kConsumerWarps * 8 * kHeadDim * 4 <= kQueryBytes, "decode's O fits where prefill's queries are");
  static_assert(sizeof(SharedMemory) <= 232448, "227 KB of shared memory");
};

}  // namespace tvm_infer::attention
