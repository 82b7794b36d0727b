// Tiles of 8-bit keys or values as the tensor cores want them for prefill: in the queries' type, panel by panel over the whole tile.
#pragma once

#include <cstdint>

#include "tvm_infer/ptx/load_store.cuh"
#include "tvm_infer/tile/swizzle.cuh"

namespace tvm_infer::attention {

// Eight elements.
template <typename Config>
__device__ __forceinline__ uint4 Widened(uint32_t low, uint32_t high) {
  uint32_t x[4];
  Config::KvElement::ToHalves(low, x[0], x[1]);
  Config::KvElement::ToHalves(high, x[2], x[3]);
  if constexpr (Config::Element::kIsBf16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = ptx::Unpack<ptx::Fp16>(x[i]);
      x[i] = ptx::Pack<ptx::Bf16>(pair.x, pair.y);
    }
  }
  return make_uint4(x[0], x[1], x[2], x[3]);
}

// All computing threads, `thread` of them each its part; from a stage of the ring to `to`. Keys outside [begin, end) become 0: they may be
// NaN, and a weight of 0 times NaN is NaN.
//
// NOTE: eight lanes have four chunks each of keys k and k ^ 5: neither their loads nor their stores meet in a bank. In lines of 128 bytes,
// as both keys differ in bit 2, which the swizzle puts four chunks apart; in lines of two keys, as one of both is odd.
template <typename Config>
__device__ __forceinline__ void WidenTile(uint32_t from, uint32_t to, int32_t thread, int32_t begin, int32_t end) {
  using Source = typename Config::Boxes;
  using Target = tile::PageBoxes<Config::kTileKeys, Config::kHeadDim>;
  constexpr int kGroups = tile::Panels(Config::kHeadDim);  // of four chunks of a key; what lies behind the head's end is widened, too
  constexpr int kSteps = Config::kTileKeys * kGroups * 4 / Config::kConsumerThreads, kAtOnce = kSteps % 2 == 0 ? 2 : 1;
#pragma unroll 1
  for (int first = 0; first < kSteps; first += kAtOnce) {
    uint4 words[kAtOnce];
    int32_t key[kAtOnce], chunk[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t unit = (thread + (first + i) * Config::kConsumerThreads) / 8;
      key[i] = unit / kGroups * 2 ^ thread % 8 / 4 * 5;
      chunk[i] = unit % kGroups * 4 + thread % 4;
      words[i] = ptx::LoadShared16(from + Source::Offset(key[i], chunk[i]));
      if (key[i] < begin || key[i] >= end) words[i] = {};
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      ptx::StoreShared16(to + Target::Offset(key[i], 2 * chunk[i]), Widened<Config>(words[i].x, words[i].y));
      ptx::StoreShared16(to + Target::Offset(key[i], 2 * chunk[i] + 1), Widened<Config>(words[i].z, words[i].w));
    }
  }
}

}  // namespace tvm_infer::attention
