// A row of keys or values to 8-bit floats.
#pragma once

#include "tvm_infer/cpu/kernels.h"
#include "tvm_infer/cpu/vec_partial.h"

namespace tvm_infer::cpu::TVM_INFER_ISA {

// To nearest even, saturating; a NaN becomes the positive one. No branch, so that loops of it become vectors.
template <typename F8>
TVM_INFER_INLINE uint8_t Quantise(float x) {
  constexpr int kShift = 23 - F8::kMantissaBits;
  constexpr uint32_t kSmallestNormal = static_cast<uint32_t>(127 + 1 - F8::kBias) << 23;
  // Its last place is a denormal's: adding it leaves the result, rounded by the adder, in the low bits.
  constexpr uint32_t kMagic = static_cast<uint32_t>(127 + 1 - F8::kBias + kShift) << 23;
  constexpr float kMaxValue = F8::kMax, kMagicValue = __builtin_bit_cast(float, kMagic);
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  uint32_t magnitude = bits & 0x7fffffffu;
  const bool is_nan = magnitude > 0x7f800000u;
  constexpr uint32_t kMaxBits = __builtin_bit_cast(uint32_t, kMaxValue);
  magnitude = magnitude < kMaxBits ? magnitude : kMaxBits;
  const uint32_t rounded = (magnitude + ((1u << (kShift - 1)) - 1) + ((magnitude >> kShift) & 1u)) >> kShift;
  const uint32_t normal = rounded - (static_cast<uint32_t>(127 - F8::kBias) << F8::kMantissaBits);
  const float shifted = __builtin_bit_cast(float, magnitude) + kMagicValue;
  const uint32_t denormal = __builtin_bit_cast(uint32_t, shifted) - kMagic;
  const uint32_t encoded = (magnitude < kSmallestNormal ? denormal : normal) | ((bits >> 24) & 0x80u);
  return static_cast<uint8_t>(is_nan ? 0x7fu : encoded);
}

template <typename T, typename F8>
void QuantiseRow(const QuantiseRowJob& job) {
  alignas(64) float x[kMaxHeadDim];
  const T* const in = static_cast<const T*>(job.in);
  F8* const out = static_cast<F8*>(job.out);
  for (int d = 0; d < job.head_dim; d += kWidth) Store(x + d, LoadUpTo(in + d, job.head_dim - d));
  const float scale = job.scale;
  for (int d = 0; d < job.head_dim; ++d) out[d].bits = Quantise<F8>(x[d] / scale);
}

}  // namespace tvm_infer::cpu::TVM_INFER_ISA
