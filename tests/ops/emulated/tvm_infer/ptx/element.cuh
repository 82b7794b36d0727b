// Stands in for ptx/element.cuh on the host: bf16 and fp32.
#pragma once

#include <cmath>
#include <cstdint>

namespace tvm_infer::ptx {

struct Bf16 {
  static constexpr bool kIsBf16 = true;
  uint16_t bits;
};
struct Fp32 {
  float value;
};

inline uint32_t RoundToBf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
template <typename Element>
uint32_t Pack(float low, float high) {
  return RoundToBf16(low) | RoundToBf16(high) << 16;
}
template <typename Element>
float2 Unpack(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
}
inline float Exp2(float x) { return std::exp2(x); }
inline float Log2(float x) { return std::log2(x); }

}  // namespace tvm_infer::ptx
