// Elements of tensors: the two 16-bit floats, packed in pairs, and float. Tags instead of CUDA's classes: kernels only move and convert
// them, and compile faster.
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
struct Fp32 {
  float value;
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

// The two values of a pair; x is the lower half.
template <typename Element>
__device__ __forceinline__ float2 Unpack(uint32_t pair) {
  if constexpr (Element::kIsBf16) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
  } else {
    float low, high;
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(low), "=f"(high) : "r"(pair));
    return make_float2(low, high);
  }
}

// The lesser and the greater of two pairs, each half for itself; NaN where either is. -0 is below 0.
template <typename Element>
__device__ __forceinline__ uint32_t PairMin(uint32_t a, uint32_t b) {
  uint32_t pair;
  if constexpr (Element::kIsBf16) {
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  } else {
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  }
  return pair;
}
template <typename Element>
__device__ __forceinline__ uint32_t PairMax(uint32_t a, uint32_t b) {
  uint32_t pair;
  if constexpr (Element::kIsBf16) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  }
  return pair;
}
// The greater; NaN where either is.
__device__ __forceinline__ float MaxNan(float a, float b) {
  float x;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
  return x;
}

// 2^x; 0 for -inf.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Of radians; absolute errors 2^-20.9 within half a turn.
__device__ __forceinline__ float Cos(float x) {
  float y;
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float Sin(float x) {
  float y;
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float Reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float Log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace tvm_infer::ptx
