// Cosine and sine of position * frequency, to float's precision at any position that a cache has.
//
// A float product would not do: at position 131,072 and frequency 1 its rounding error alone is up to 2^-8 radians, and a library's sincosf
// keeps the digits of 2 / pi for large arguments on the stack. So the angle is kept in quarter turns as an unevaluated sum of two floats
// (48 bits), whose whole part falls away exactly: what is left is off by less than 2^-25 quarter turns, 5e-8 radians, while
// |position * frequency| stays below 2^23 radians; polynomials on [-1/2, 1/2] quarter turns and the last roundings add 1e-7.
// Positions are exact as floats up to 2^24.
#pragma once

#include <cstdint>

namespace tvm_infer::kernels {

struct CosSin {
  float cos, sin;
};

// In [0, 1) turns where the caller does not care: position * inv_freq radians, any sign.
__device__ __forceinline__ CosSin CosSinOf(float position, float inv_freq) {
  constexpr float kQuartersHigh = 0x1.45f306p-1f, kQuartersLow = 0x1.b9391p-26f;  // 2 / pi
  // NOTE: __fmul_rn, because a product that the compiler fuses with what follows no longer has the error that the next fmaf takes from it.
  const float rate = __fmul_rn(inv_freq, kQuartersHigh);
  const float rate_low = fmaf(inv_freq, kQuartersLow, fmaf(inv_freq, kQuartersHigh, -rate));
  const float quarters = __fmul_rn(position, rate);
  const float quarters_low = fmaf(position, rate_low, fmaf(position, rate, -quarters));
  const float whole = rintf(quarters);
  float x = (quarters - whole) + quarters_low;  // the difference is exact
  const float carry = rintf(x);                 // quarters_low is not small where quarters is large: 0.25 at 2^22
  x -= carry;
  const uint32_t quadrant = static_cast<uint32_t>(static_cast<int32_t>(whole) + static_cast<int32_t>(carry));
  // Least squares at Chebyshev nodes of x^2, weighted for the absolute error: below 1.3e-9 (sine) and 6e-11 (cosine) before rounding.
  const float square = x * x;
  const float sine =
      x * fmaf(square, fmaf(square, fmaf(square, -0.004592275246977806f, 0.07967589795589447f), -0.6459629535675049f), 1.570796251296997f);
  const float cosine = fmaf(
      square,
      fmaf(square, fmaf(square, fmaf(square, 0.0009039754513651133f, -0.02086026407778263f), 0.25366923213005066f), -1.2337005138397217f),
      1.f);
  const uint32_t is_odd = quadrant & 1;
  const float cos = is_odd ? sine : cosine, sin = is_odd ? cosine : sine;
  return {__uint_as_float(__float_as_uint(cos) ^ ((quadrant + 1) & 2) << 30), __uint_as_float(__float_as_uint(sin) ^ (quadrant & 2) << 30)};
}

}  // namespace tvm_infer::kernels
