// 8-bit floats of keys and values in memory: conversion from float.
#pragma once

#include <cstdint>

namespace tvm_infer::ptx {

struct E4m3 {
  static constexpr bool kIsE4m3 = true;
};
struct E5m2 {
  static constexpr bool kIsE4m3 = false;
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
