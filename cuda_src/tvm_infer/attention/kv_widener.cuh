// A warpgroup that makes of tiles of 8-bit keys and values what the tensor cores want for prefill: float16, panel by panel over the whole
// tile. It is a link between the copies and the warpgroups that compute: a tile takes two stages of the ring, the copy fills the second,
// and widened it fills both. The second's barrier says that the copy is there, the first's that the tile is.
//
// Decode reads the elements as they are, a stage each, and passes this by (MeetAfterDecode).
#pragma once

#include <cstdint>

#include "tvm_infer/attention/config_sm90.cuh"
#include "tvm_infer/attention/rows.cuh"
#include "tvm_infer/ptx/load_store.cuh"
#include "tvm_infer/ptx/mbarrier.cuh"
#include "tvm_infer/ptx/sync.cuh"
#include "tvm_infer/tile/swizzle.cuh"

namespace tvm_infer::attention {

// Before work `i`, by those that compute and those that widen: these, who run ahead through works of decode, wait behind them. A barrier of
// the ring tells its phases apart by one bit, so nobody may look at one that is two turns away.
template <typename Config>
__device__ __forceinline__ void MeetAfterDecode(const WorkQueue& queue, int32_t i, const Work& work) {
  if (work.tile_class == kDecodeClass || i == queue.begin || __ldg(&queue.works[i - 1].tile_class) != kDecodeClass) return;
  ptx::BarrierSync(Config::kBarrierDecoded, Config::kConsumerThreads + Config::kWidenerThreads);
}

template <typename Config>
class KvWidener {
 public:
  using Ring = typename Config::Ring;
  using Tiles = KeyTiles<Config::kTileAlign, Config::kTileKeys>;

  __device__ __forceinline__ explicit KvWidener(const Ring& ring) : ring_(ring) {}

  // The tiles of a work, in the order in which they are copied (KvProducer).
  __device__ __forceinline__ void Run(const Work& work) {
    const Tiles tiles(work);
    const bool is_prefill = work.tile_class != kDecodeClass;
    if (!is_prefill || tiles.count == 0) Flush();
    if (!is_prefill) {
      cursor_.Skip(2 * tiles.count * work.num_kv_heads);
      return;
    }
#pragma unroll 1
    for (int32_t head = 0; head < work.num_kv_heads; ++head) {
#pragma unroll 1
      for (int32_t first = 0; first < tiles.count * Config::kTileKeys; first += Config::kTileKeys) {
        Widen(0, Config::kTileKeys);
        Flush();
        pending_begin_ = work.kv_begin - tiles.base - first;
        pending_end_ = work.kv_end - tiles.base - first;
      }
      if (Config::kQueryBuffers == 1) Flush();
    }
    if (work.merge != kNoMerge) Flush();
  }

  // A tile of values that was left.
  __device__ __forceinline__ void Flush() {
    if (pending_end_ == 0) return;
    Widen(pending_begin_, pending_end_);
    pending_end_ = 0;
  }

 private:
  using Source = typename Config::Boxes;
  using Target = tile::PageBoxes<Config::kTileKeys, Config::kHeadDim>;
  static constexpr uint32_t kGroups = Config::kPanels;  // of four chunks of 16 elements of a key; what lies behind the head's end as well
  // A tile at once takes 32 registers, half of it 16. In halves where no key of the first becomes what covers the copy of one of the
  // second: a copied key is one panel, of 128 bytes, and lies where the key's second wide panel goes, or of 64, and keys go to higher
  // addresses as they come.
  static constexpr int kParts = Config::kHeadDim <= 128 ? 2 : 1;
  static constexpr int kChunks = Config::kTileKeys * kGroups * 4 / Config::kWidenerThreads / kParts;  // of a thread, a part
  static_assert(Config::kTileKeys * kGroups * 4 % (Config::kWidenerThreads * kParts) == 0);

  // Chunk `i` of this thread: its key, and where it is in the copy and, as the first of two, in the wide tile.
  // NOTE: eight lanes have four chunks each of keys k and k ^ 5: neither their loads nor their stores meet in a bank. In lines of 128
  // bytes, as both keys differ in bit 2, which the swizzle puts four chunks apart; in lines of two keys, as one of both is odd.
  struct Place {
    uint32_t key, from, to;
  };
  __device__ __forceinline__ static Place PlaceOf(uint32_t thread, uint32_t i) {
    constexpr uint32_t kUnits = Config::kWidenerThreads / 8;
    const uint32_t unit = thread / 8 + (kUnits % kGroups == 0 ? 0 : i * kUnits), lane = thread % 8;
    const uint32_t key = unit / kGroups * 2 ^ lane / 4 * 5, chunk = unit % kGroups * 4 + lane % 4;
    const Place first{key, Source::Offset(key, chunk), Target::Offset(key, 2 * chunk)};
    if constexpr (kUnits % kGroups != 0) return first;
    // So many whole keys further on, which changes neither swizzle.
    const uint32_t step = i * (kUnits / kGroups * 2);
    return {key + step, first.from + Source::Offset(step, 0), first.to + Target::Offset(step, 0)};
  }

  // The tile at the cursor. Keys outside [begin, end) of it become 0: they may be NaN, and a weight of 0 times NaN is NaN.
  __device__ __forceinline__ void Widen(int32_t begin, int32_t end) {
    typename Ring::Cursor copy = cursor_;
    copy.Advance();
    ring_.WaitFull(copy);
    // NOTE: read anew, so that no address is kept from tile to tile.
    uint32_t thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    thread %= Config::kWidenerThreads;
    const bool is_whole = begin <= 0 && end >= Config::kTileKeys;
    // The wide tile covers the copy: of each part all is read before anything is written.
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      uint4 words[kChunks];
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const Place at = PlaceOf(thread, part * kChunks + i);
        words[i] = ptx::LoadShared16(ring_.Data(copy) + at.from);
        const int32_t key = static_cast<int32_t>(at.key);
        if (!is_whole && (key < begin || key >= end)) words[i] = {};
      }
      ptx::BarrierSync(Config::kBarrierWiden, Config::kWidenerThreads);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const Place at = PlaceOf(thread, part * kChunks + i);
        const uint32_t to = ring_.Data(cursor_) + at.to;
        ptx::StoreShared16(to, ToHalves(words[i].x, words[i].y));
        ptx::StoreShared16(to ^ 16, ToHalves(words[i].z, words[i].w));  // the chunk beside it
      }
    }
    ptx::FenceProxyAsyncShared();
    ptx::BarrierSync(Config::kBarrierWiden, Config::kWidenerThreads);
    if (thread == 0) ptx::MbarrierArrive(ring_.FullBarrier(cursor_));
    cursor_.Advance(Config::kPrefillStages);
  }

  __device__ __forceinline__ static uint4 ToHalves(uint32_t low, uint32_t high) {
    uint32_t x[4];
    Config::KvElement::ToHalves(low, x[0], x[1]);
    Config::KvElement::ToHalves(high, x[2], x[3]);
    return make_uint4(x[0], x[1], x[2], x[3]);
  }

  const Ring& ring_;
  typename Ring::Cursor cursor_;
  int32_t pending_begin_ = 0, pending_end_ = 0;  // keys of a tile of values, from its first on; its end is above 0
};

}  // namespace tvm_infer::attention
