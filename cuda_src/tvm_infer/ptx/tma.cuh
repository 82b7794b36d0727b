// Bulk tensor copies (TMA). Only the tiled, five-dimensional load: the view of paged K or V has five axes (see attention/params.cuh).
#pragma once

#include <cstdint>

namespace tvm_infer::ptx {

// `map`: a CUtensorMap.
__device__ __forceinline__ void PrefetchTensorMap(const void* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// K and V are read once by one CTA (decode) or soon again by its neighbours (prefill).
inline constexpr uint64_t kEvictFirst = 0x12f0000000000000ull;
inline constexpr uint64_t kEvictNormal = 0x1000000000000000ull;

// Copies one box to shared memory and counts its bytes on `barrier`. Coordinates are those of the tensor map, innermost first.
__device__ __forceinline__ void TmaLoad5d(uint32_t dst, const void* map, uint32_t barrier, uint64_t cache_policy, int32_t c0, int32_t c1,
                                          int32_t c2, int32_t c3, int32_t c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(dst),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "r"(barrier), "l"(cache_policy)
      : "memory");
}

}  // namespace tvm_infer::ptx
