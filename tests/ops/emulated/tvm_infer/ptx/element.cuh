// Stands in for ptx/element.cuh on the host.
#pragma once

#include <algorithm>
#include <cmath>
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

inline uint32_t RoundToBf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
// By way of the exponent, and nearbyint for the rounding; finite numbers in the type's range.
inline uint32_t RoundToHalf(float x) {
  const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  const int exponent = magnitude == 0 ? -14 : std::max(std::ilogb(magnitude), -14);
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));  // 1024 … 2048, or fewer
  return sign | (units + (static_cast<uint32_t>(exponent + 14) << 10));
}
template <typename Element>
uint32_t Pack(float low, float high) {
  if (!Element::kIsBf16) return RoundToHalf(low) | RoundToHalf(high) << 16;
  return RoundToBf16(low) | RoundToBf16(high) << 16;
}
inline float HalfToFloat(uint32_t bits) {
  const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
  if (exponent == 31 && mantissa != 0) return __uint_as_float(0x7fc00000);
  const float magnitude = std::ldexp(static_cast<float>(exponent == 0 ? mantissa : mantissa | 0x400), (exponent == 0 ? 1 : exponent) - 25);
  return exponent == 31 ? ((bits & 0x8000) != 0 ? -INFINITY : INFINITY) : (bits & 0x8000) != 0 ? -magnitude : magnitude;
}
template <typename Element>
float2 Unpack(uint32_t pair) {
  if (!Element::kIsBf16) return make_float2(HalfToFloat(pair & 0xffff), HalfToFloat(pair >> 16));
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
}
// Of two numbers in the halves of pairs the one that goes first; NaN goes before all.
template <typename Element, typename F>
uint32_t PairChoice(uint32_t a, uint32_t b, const F& goes_first) {
  const float2 x = Unpack<Element>(a), y = Unpack<Element>(b);
  const bool low = x.x != x.x || (y.x == y.x && goes_first(x.x, y.x)), high = x.y != x.y || (y.y == y.y && goes_first(x.y, y.y));
  return ((low ? a : b) & 0xffff) | ((high ? a : b) & 0xffff0000);
}
template <typename Element>
uint32_t PairMin(uint32_t a, uint32_t b) {
  return PairChoice<Element>(a, b, [](float x, float y) { return x < y; });
}
template <typename Element>
uint32_t PairMax(uint32_t a, uint32_t b) {
  return PairChoice<Element>(a, b, [](float x, float y) { return x > y; });
}
inline float MaxNan(float a, float b) { return a != a || a > b ? a : b; }
inline float Reciprocal(float x) { return 1 / x; }
inline float Exp2(float x) { return std::exp2(x); }
inline float Log2(float x) { return std::log2(x); }

}  // namespace tvm_infer::ptx
