// The two 16-bit floats, packed in pairs. Tags instead of CUDA's classes: kernels only move and convert them, and compile faster.
#pragma once

#include <cstdint>

namespace tvm_infer::ptx {

struct Bf16 {
  static constexpr bool kIsBf16 = true;
  uint16_t bits;
};
struct Fp16 {
  static constexpr bool kIsBf16 = false;
  uint16_t bits;
};

// Two floats, rounded to nearest even; `low` in the lower half.
template <typename Element>
__device__ __forceinline__ uint32_t Pack(float low, float high) {
  uint32_t pair;
  if constexpr (Element::kIsBf16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

// 2^x; 0 for -inf.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float Log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace tvm_infer::ptx
