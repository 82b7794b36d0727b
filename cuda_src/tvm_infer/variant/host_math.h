// exp, exp2, tanh, the logistic function and rotations for processors. libm's are called for one number at a time, which for a soft cap
// costs more than the products do; these have neither a branch nor a call, so that compilers make vectors of them.
//
// The first four rest on e^y = 2^n * e^f with an integer n and |f| <= ln(2)/2. Relative errors are below 2e-6 where results are normal
// numbers; NaN gives NaN, as each `x > limit ? limit : x` lets it through. Compile with -fno-trapping-math: else choices stay branches.
#pragma once

#include <cstdint>

#include "tvm_infer/variant/mark.h"

namespace tvm_infer::variant::host_math {

TVM_INFER_VARIANT float Clamp(float x, float low, float high) {
  const float y = x > high ? high : x;
  return y < low ? low : y;
}

// x, |x| < 2^22, to the nearest integer: 1.5 * 2^23 leaves the sum no bits for a fraction, and the integer in its lowest ones.
// (rintf is a call before SSE4.1.)
struct Rounded {
  float value;
  int32_t integer;
};
TVM_INFER_VARIANT Rounded Round(float x) {
  constexpr float kShift = 12582912.f;
  const float shifted = x + kShift;
  int32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  return {shifted - kShift, bits - 0x4b400000};
}

// 2^n, -126 <= n <= 127.
TVM_INFER_VARIANT float PowerOf2(int32_t n) {
  const int32_t bits = static_cast<int32_t>(static_cast<uint32_t>(n + 127) << 23);
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// y - n * ln(2). The first part of ln(2) has nine bits, so that its product is exact.
TVM_INFER_VARIANT float Remainder(float y, float n) { return (y - n * 0.693359375f) + n * 2.12194440e-4f; }

// e^f - 1, |f| <= ln(2)/2: f times the polynomial of degree 5 whose largest relative error is the least, 1.1e-8.
TVM_INFER_VARIANT float ExpMinus1(float f) {
  float p = 0x1.6c16a6p-10f;
  p = p * f + 0x1.123e0ap-7f;
  p = p * f + 0x1.555654p-5f;
  p = p * f + 0x1.55547cp-3f;
  p = p * f + 0x1.fffffep-2f;
  p = p * f + 1.f;
  return p * f;
}

// 2^n * e^f, -152 <= n <= 128: in two steps, each by a power that a float has. Overflows to infinity, underflows through subnormals to 0.
TVM_INFER_VARIANT float Scaled(int32_t n, float f) {
  const int32_t half = n >> 1;
  return (1.f + ExpMinus1(f)) * PowerOf2(half) * PowerOf2(n - half);
}

TVM_INFER_VARIANT float Exp(float x) {
  const float y = Clamp(x, -105.f, 89.f);  // e^-105 rounds to 0, e^89 to infinity
  const Rounded n = Round(y * 1.44269504f);
  return Scaled(n.integer, Remainder(y, n.value));
}

TVM_INFER_VARIANT float Exp2(float x) {
  const float y = Clamp(x, -151.f, 128.f);
  const Rounded n = Round(y);
  return Scaled(n.integer, (y - n.value) * 0.693147181f);
}

// t / (t + 2), t = e^2x - 1 = 2^n (e^f - 1) + (2^n - 1), which cancels nowhere: n is 0 where x is small.
TVM_INFER_VARIANT float Tanh(float x) {
  const float y = 2.f * Clamp(x, -10.f, 10.f);  // 1 - tanh(10) is 4e-9: 1 in floats
  const Rounded n = Round(y * 1.44269504f);
  const float power = PowerOf2(n.integer);
  const float t = power * ExpMinus1(Remainder(y, n.value)) + (power - 1.f);
  return t / (t + 2.f);
}

struct CosSin {
  float cos, sin;
};

// Of position * rate radians, |product| < 2^28: in quarter turns in double, whose whole part falls away; polynomials on half a quarter turn
// to either side, least squares at Chebyshev nodes, with absolute errors below 1.3e-9 (sine) and 6e-11 (cosine) before rounding.
TVM_INFER_VARIANT CosSin CosSinOf(int32_t position, float rate) {
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52, as in Round
  const double quarters = static_cast<double>(position) * static_cast<double>(rate) * 0.63661977236758134;
  const double shifted = quarters + kShift;
  int64_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  const uint32_t quadrant = static_cast<uint32_t>(bits);
  const float x = static_cast<float>(quarters - (shifted - kShift)), square = x * x;
  const float sine =
      x * (1.570796251296997f + square * (-0.6459629535675049f + square * (0.07967589795589447f - square * 0.004592275246977806f)));
  const float cosine =
      1.f + square * (-1.2337005138397217f +
                      square * (0.25366923213005066f + square * (-0.02086026407778263f + square * 0.0009039754513651133f)));
  const bool is_odd = (quadrant & 1) != 0;
  const float cos = is_odd ? sine : cosine, sin = is_odd ? cosine : sine;
  return {((quadrant + 1) & 2) != 0 ? -cos : cos, (quadrant & 2) != 0 ? -sin : sin};
}

TVM_INFER_VARIANT float Sigmoid(float x) { return 1.f / (1.f + Exp(-x)); }

}  // namespace tvm_infer::variant::host_math
