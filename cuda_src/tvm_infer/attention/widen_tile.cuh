// A tile of 8-bit keys or values as the tensor cores want it for prefill: float16, panel by panel over the whole tile. It takes two stages
// of the ring; the copy lies in the second.
#pragma once

#include <cstdint>

#include "tvm_infer/ptx/load_store.cuh"
#include "tvm_infer/ptx/sync.cuh"
#include "tvm_infer/tile/swizzle.cuh"

namespace tvm_infer::attention {

template <typename Config>
class WidenTile {
 public:
  // By the threads that widen, each its part; from `from`, the second stage, to `to`, the first. Keys outside [begin, end) become 0: they
  // may be NaN, and a weight of 0 times NaN is NaN.
  __device__ __forceinline__ static void Run(uint32_t from, uint32_t to, uint32_t thread, int32_t begin, int32_t end) {
    const bool is_whole = begin <= 0 && end >= Config::kTileKeys;
    // The wide tile covers the copy: of each part all is read before anything is written.
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      uint4 words[kChunks];
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const Place at = PlaceOf(thread, part * kChunks + i);
        words[i] = ptx::LoadShared16(from + at.from);
        const int32_t key = static_cast<int32_t>(at.key);
        if (!is_whole && (key < begin || key >= end)) words[i] = {};
      }
      ptx::BarrierSync(Config::kBarrierWiden, Config::kWidenerThreads);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const uint32_t row = to + PlaceOf(thread, part * kChunks + i).to;
        ptx::StoreShared16(row, ToHalves(words[i].x, words[i].y));
        ptx::StoreShared16(row ^ 16, ToHalves(words[i].z, words[i].w));  // the chunk beside it
      }
    }
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

  __device__ __forceinline__ static uint4 ToHalves(uint32_t low, uint32_t high) {
    uint32_t x[4];
    Config::KvElement::ToHalves(low, x[0], x[1]);
    Config::KvElement::ToHalves(high, x[2], x[3]);
    return make_uint4(x[0], x[1], x[2], x[3]);
  }
};

}  // namespace tvm_infer::attention
