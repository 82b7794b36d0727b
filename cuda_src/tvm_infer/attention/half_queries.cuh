// Queries of bfloat16 as float16, which products with keys and values of 8 bits run in: scaled by a power of two for each row, into that
// type's range. What is lost lies 2^27 below the row's largest.
#pragma once

#include <cstdint>

#include "tvm_infer/ptx/element.cuh"
#include "tvm_infer/ptx/load_store.cuh"
#include "tvm_infer/tile/swizzle.cuh"

namespace tvm_infer::attention {

// A lane's 8 of a row's elements, which `lanes` lanes share, to float16, times a power of two by which the largest is at least 2^13 and
// less than 2^14; returns what takes that back.
__device__ __forceinline__ float ToHalf(uint32_t (&x)[4], uint32_t lanes) {
  uint32_t largest = 0;  // bfloat16 without sign, which sorts as integers do
#pragma unroll
  for (int i = 0; i < 4; ++i) largest = max(largest, max(x[i] & 0x7fff, x[i] >> 16 & 0x7fff));
#pragma unroll
  for (uint32_t lane = 1; lane < lanes; lane *= 2) largest = max(largest, __shfl_xor_sync(0xffffffff, largest, lane));
  const uint32_t exponent = max(largest >> 7, 14u);
  const float scale = __uint_as_float((267 - exponent) << 23);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = ptx::Unpack<ptx::Bf16>(x[i]);
    x[i] = ptx::Pack<ptx::Fp16>(pair.x * scale, pair.y * scale);
  }
  return __uint_as_float((exponent - 13) << 23);
}

// A warpgroup's rows at `panels`, in place; `thread` of its 128. `unscale`: what each row's logits are to be multiplied by.
template <typename Config>
__device__ __forceinline__ void HalfQueries(uint32_t panels, float* unscale, uint32_t thread) {
  constexpr uint32_t kChunks = Config::kHeadDim / 8, kLanes = Config::kLoadLanes, kRowsAtOnce = 128 / kLanes;
  const uint32_t chunk = thread % kLanes;
#pragma unroll 1
  for (uint32_t row = thread / kLanes; row < Config::kPanelRows; row += kRowsAtOnce) {
    const uint32_t at = panels + chunk / 8 * Config::kPanelRows * tile::kPanelRowBytes + tile::SwizzledOffset(row, chunk % 8);
    uint4 words{};
    if (kChunks == kLanes || chunk < kChunks) words = ptx::LoadShared16(at);
    uint32_t x[4] = {words.x, words.y, words.z, words.w};
    const float factor = ToHalf(x, kLanes);
    if (kChunks == kLanes || chunk < kChunks) ptx::StoreShared16(at, make_uint4(x[0], x[1], x[2], x[3]));
    if (chunk == 0) unscale[row] = factor;
  }
}

}  // namespace tvm_infer::attention
