// e4m3 by its definition: every value by its code, the nearest of them to a number.
#pragma once

#include <cmath>
#include <cstdint>

namespace float8 {

inline double Value(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return code & 0x80 ? -magnitude : magnitude;
}

// The code of the finite value nearest to x, of two the even one; 0x7f for a NaN.
inline uint8_t Nearest(float x) {
  if (x != x) return 0x7f;
  const double magnitude = std::abs(static_cast<double>(x));
  uint8_t best = 0;
  for (int code = 1; code < 0x7f; ++code) {
    const double off = std::abs(Value(static_cast<uint8_t>(code)) - magnitude), least = std::abs(Value(best) - magnitude);
    if (off < least || (off == least && code % 2 == 0)) best = static_cast<uint8_t>(code);
  }
  return static_cast<uint8_t>(best | (std::signbit(x) ? 0x80 : 0));
}

}  // namespace float8
