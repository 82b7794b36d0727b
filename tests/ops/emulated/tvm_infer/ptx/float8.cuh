// Stands in for ptx/float8.cuh on the host: e4m3.
#pragma once

#include <cmath>
#include <cstdint>

namespace tvm_infer::ptx {

struct E4m3 {
  // By way of the value; what e4m3 holds fp16 holds.
  static uint32_t ToHalf(uint32_t byte) {
    const uint32_t sign = (byte & 0x80) << 8, exponent = byte >> 3 & 15, mantissa = byte & 7;
    if ((byte & 0x7f) == 0x7f) return sign | 0x7fff;
    if (exponent == 0 && mantissa == 0) return sign;
    const double value = std::ldexp(exponent == 0 ? mantissa : mantissa | 8, static_cast<int>(exponent == 0 ? 1 : exponent) - 10);
    const int power = std::ilogb(value);
    return sign | (power + 15) << 10 | static_cast<uint32_t>(std::ldexp(value, 10 - power) - 1024);
  }
  static void ToHalves(uint32_t four, uint32_t& low, uint32_t& high) {
    low = ToHalf(four & 0xff) | ToHalf(four >> 8 & 0xff) << 16;
    high = ToHalf(four >> 16 & 0xff) | ToHalf(four >> 24) << 16;
  }
};

// By way of the exponent, and nearbyint for the rounding.
inline uint32_t RoundToE4m3(float x) {
  if (x != x) return 0x7f;
  const uint32_t sign = std::signbit(x) ? 0x80 : 0;
  const double magnitude = std::abs(static_cast<double>(x));
  if (magnitude >= 448) return sign | 0x7e;
  int exponent = magnitude == 0 ? -6 : std::ilogb(magnitude);
  if (exponent < -6) exponent = -6;
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));  // of 2^(exponent - 3); 8 … 16, or fewer
  return sign | (units + (static_cast<uint32_t>(exponent + 6) << 3));
}
template <typename Float8>
uint32_t PackFloat8(float low, float high) {
  return RoundToE4m3(low) | RoundToE4m3(high) << 8;
}

}  // namespace tvm_infer::ptx
