// Tiles of 8-bit keys or values as the tensor cores want them for prefill: in the queries' type, panel by panel over the whole tile.
#pragma once

#include <cstdint>

#include "tvm_infer/ptx/load_store.cuh"
#include "tvm_infer/tile/swizzle.cuh"

namespace tvm_infer::attention {

// All computing threads, `thread` of them each its part; from a stage of the ring to `to`. Keys outside [begin, end) become 0: they may be
// NaN, and a weight of 0 times NaN is NaN.
//
// NOTE: eight lanes have four chunks each of keys k and k ^ 5: neither their loads nor their stores meet in a bank.
template <typename Config>
__device__ __forceinline__ void WidenTile(uint32_t from, uint32_t to, int32_t thread, int32_t begin, int32_t end) {
  using Source = typename Config::Boxes;
  using Target = tile::PageBoxes<Config::kTileKeys, Config::kHeadDim>;
  constexpr int kGroups = Config::kHeadDim / 64;  // of four chunks of a key
  constexpr int kSteps = Config::kTileKeys * Config::kHeadDim / 16 / Config::kConsumerThreads;
  uint4 words[kSteps];
  int32_t key[kSteps];
  const auto chunk = [&](int step) { return (thread + step * Config::kConsumerThreads) / 8 % kGroups * 4 + thread % 4; };
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    key[i] = (thread + i * Config::kConsumerThreads) / (8 * kGroups) * 2 ^ thread % 8 / 4 * 5;
    words[i] = ptx::LoadShared16(from + Source::Offset(key[i], chunk(i)));
    if (key[i] < begin || key[i] >= end) words[i] = {};
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t two[2] = {half == 0 ? words[i].x : words[i].z, half == 0 ? words[i].y : words[i].w};
      uint32_t wide[4];
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        Config::KvElement::ToHalves(two[w], wide[2 * w], wide[2 * w + 1]);
        if constexpr (Config::Element::kIsBf16) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float2 x = ptx::Unpack<ptx::Fp16>(wide[2 * w + e]);
            wide[2 * w + e] = ptx::Pack<ptx::Bf16>(x.x, x.y);
          }
        }
      }
      ptx::StoreShared16(to + Target::Offset(key[i], 2 * chunk(i) + half), {wide[0], wide[1], wide[2], wide[3]});
    }
  }
}

}  // namespace tvm_infer::attention
