// 8-bit floats of keys and values in memory: conversion from float, and to float16.
#pragma once

#include <cstdint>

namespace tvm_infer::ptx {

// ToHalves: four elements to two pairs of float16, the lower two first. Every value has its own there, NaN included.
struct E4m3 {
  static constexpr bool kIsE4m3 = true;
  __device__ __forceinline__ static void ToHalves(uint32_t four, uint32_t& low, uint32_t& high) {
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h;}" : "=r"(low), "=r"(high) : "r"(four));
  }
};
struct E5m2 {
  static constexpr bool kIsE4m3 = false;
  // A float16 without the lower half of its bits.
  __device__ __forceinline__ static void ToHalves(uint32_t four, uint32_t& low, uint32_t& high) {
    low = __byte_perm(four, 0, 0x1404);
    high = __byte_perm(four, 0, 0x3424);
  }
};

// Two floats, rounded to nearest even, saturating to the largest finite value; NaN becomes 0x7f. `low` in the lower byte.
template <typename Float8>
__device__ __forceinline__ uint32_t PackFloat8(float low, float high) {
  uint16_t pair;
  if constexpr (Float8::kIsE4m3) {
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

}  // namespace tvm_infer::ptx
