// The band mask on a thread's two rows of logits, and the same for values in shared memory.
#pragma once

#include <cstdint>

#include "tvm_infer/attention/rows.cuh"
#include "tvm_infer/attention/softmax.cuh"
#include "tvm_infer/ptx/sync.cuh"
#include "tvm_infer/tile/swizzle.cuh"

namespace tvm_infer::attention {

// Logits outside their row's keys become -inf. `tile_key` is the key of column 0. Without kHasBegin all rows begin before it: the usual
// case, at two instead of three instructions a logit.
template <bool kHasBegin, int kCount>
__device__ __forceinline__ void MaskLogits(float (&s)[kCount], const KeyRange (&keys)[2], int32_t tile_key) {
  const int32_t column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    // Column 8 * j + column + e is visible when begin <= 8 * j + e < end: compile-time constants on one side.
    const int32_t begin = keys[i].begin - tile_key - column, end = keys[i].end - tile_key - column;
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int32_t k = 8 * j + e;
        float& x = s[4 * j + 2 * i + e];
        x = (!kHasBegin || k >= begin) && k < end ? x : kNegInf;
      }
    }
  }
}

// Zeroes keys [begin, end) of a tile of V: slots without a key of this work may hold NaN, and a weight of 0 times NaN is NaN. By the
// threads of one warpgroup; both warpgroups of a CTA may do it to the same tile, each before it reads.
template <int kBoxKeys, int kHeadDimVo>
__device__ __forceinline__ void ZeroValues(uint32_t tile, int32_t begin, int32_t end, int32_t thread) {
  constexpr int kChunks = kHeadDimVo / 8;
#pragma unroll 1
  for (int i = begin * kChunks + thread; i < end * kChunks; i += 128) {
    const uint32_t address = tile + tile::PageBoxes<kBoxKeys, kHeadDimVo>::Offset(i / kChunks, i % kChunks);
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
  }
}

}  // namespace tvm_infer::attention
