// Vectors of 4 floats in the compiler's own vector types: SSE2, NEON or plain code. The same names as vec_avx512.h.
#pragma once

#include "tvm_infer/cpu/kernels.h"

#define TVM_INFER_INLINE static inline __attribute__((always_inline))

namespace tvm_infer::cpu::TVM_INFER_ISA {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));
typedef uint32_t WordVec __attribute__((vector_size(16)));
inline constexpr int kWidth = 4;
inline constexpr int kTileRows = 4;
#if defined(__aarch64__)
inline constexpr int kTileVecs = 4;  // 16 accumulators of 32 registers
#else
inline constexpr int kTileVecs = 2;  // 8 of 16
#endif

TVM_INFER_INLINE Vec Zero() { return Vec{}; }
TVM_INFER_INLINE Vec Set1(float x) { return Vec{x, x, x, x}; }
TVM_INFER_INLINE Vec Add(Vec a, Vec b) { return a + b; }
TVM_INFER_INLINE Vec Sub(Vec a, Vec b) { return a - b; }
TVM_INFER_INLINE Vec Mul(Vec a, Vec b) { return a * b; }
TVM_INFER_INLINE Vec Fma(Vec a, Vec b, Vec c) { return a * b + c; }  // fused where the machine has it
TVM_INFER_INLINE Vec Select(IntVec mask, Vec a, Vec b) {
  return reinterpret_cast<Vec>((mask & reinterpret_cast<IntVec>(a)) | (~mask & reinterpret_cast<IntVec>(b)));
}
TVM_INFER_INLINE Vec Max(Vec a, Vec b) { return Select(a > b, a, b); }  // b where a or b is NaN

TVM_INFER_INLINE Vec Load(const float* p) {
  Vec a;
  __builtin_memcpy(&a, p, sizeof(a));
  return a;
}
TVM_INFER_INLINE Vec Load(const BFloat* p) {
  const WordVec words{p[0].bits, p[1].bits, p[2].bits, p[3].bits};
  return reinterpret_cast<Vec>(words << 16);
}
// Exponent and mantissa move into place; a multiplication by 2^112 re-biases, denormals included; 31 means infinite or NaN.
TVM_INFER_INLINE Vec Load(const Half* p) {
  const WordVec words{p[0].bits, p[1].bits, p[2].bits, p[3].bits};
  const WordVec magnitude = words & 0x7fff;
  const Vec finite = reinterpret_cast<Vec>(magnitude << 13) * 0x1p112f;
  const Vec special = reinterpret_cast<Vec>((magnitude << 13) | 0x7f800000u);
  const Vec value = Select(reinterpret_cast<IntVec>(magnitude) >= 0x7c00, special, finite);
  return reinterpret_cast<Vec>(reinterpret_cast<WordVec>(value) | ((words & 0x8000u) << 16));
}

// The same of 8 bits: exponents are 2^120 and 2^112 too small. E4M3 has a NaN and no infinity.
TVM_INFER_INLINE Vec Load(const Float8E4M3* p) {
  const WordVec bytes{p[0].bits, p[1].bits, p[2].bits, p[3].bits};
  const WordVec magnitude = bytes & 0x7f;
  const Vec finite = reinterpret_cast<Vec>(magnitude << 20) * 0x1p120f;
  const Vec nan = reinterpret_cast<Vec>(WordVec{} + 0x7fc00000u);
  const Vec value = Select(reinterpret_cast<IntVec>(magnitude) == 0x7f, nan, finite);
  return reinterpret_cast<Vec>(reinterpret_cast<WordVec>(value) | ((bytes & 0x80u) << 24));
}
TVM_INFER_INLINE Vec Load(const Float8E5M2* p) {
  const WordVec bytes{p[0].bits, p[1].bits, p[2].bits, p[3].bits};
  const WordVec magnitude = bytes & 0x7f;
  const Vec finite = reinterpret_cast<Vec>(magnitude << 21) * 0x1p112f;
  const Vec special = reinterpret_cast<Vec>((magnitude << 21) | 0x7f800000u);
  const Vec value = Select(reinterpret_cast<IntVec>(magnitude) >= 0x7c, special, finite);
  return reinterpret_cast<Vec>(reinterpret_cast<WordVec>(value) | ((bytes & 0x80u) << 24));
}

TVM_INFER_INLINE void Store(float* p, Vec a) { __builtin_memcpy(p, &a, sizeof(a)); }
// Round to nearest even; a NaN stays a NaN.
TVM_INFER_INLINE void Store(BFloat* p, Vec a) {
  const WordVec bits = reinterpret_cast<WordVec>(a);
  const WordVec rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const WordVec words =
      reinterpret_cast<WordVec>(Select(a == a, reinterpret_cast<Vec>(rounded), reinterpret_cast<Vec>(WordVec{} + 0x7fc00000u))) >> 16;
  for (int i = 0; i < kWidth; ++i) p[i].bits = static_cast<uint16_t>(words[i]);
}
TVM_INFER_INLINE uint16_t HalfBits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {  // denormal: adding 0.5 leaves the result, rounded by the adder, in the low bits
    float positive;
    __builtin_memcpy(&positive, &magnitude, sizeof(positive));
    positive += 0.5f;
    __builtin_memcpy(&bits, &positive, sizeof(bits));
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
TVM_INFER_INLINE void Store(Half* p, Vec a) {
  for (int i = 0; i < kWidth; ++i) p[i].bits = HalfBits(a[i]);
}

// Lanes [begin, end) of a; -inf elsewhere.
TVM_INFER_INLINE Vec KeepLanes(Vec a, int begin, int end) {
  const IntVec lane{0, 1, 2, 3};
  return Select((lane >= begin) & (lane < end), a, Set1(-__builtin_inff()));
}

// 2^x for x <= 0, 0 below 2^-126 and at -inf, NaN at NaN. The polynomial of vec_avx512.h.
TVM_INFER_INLINE Vec Exp2(Vec x) {
  const IntVec is_tiny = x < -126.f;
  x = Max(Set1(-126.f), x);
  const Vec shifter = Set1(0x1.8p23f);  // adding it rounds to an integer, which then is the low bits
  const Vec shifted = x + shifter;
  const Vec f = x - (shifted - shifter);
  Vec p = Fma(Set1(0x1.5bba14p-10f), f, Set1(0x1.3cea88p-7f));
  p = Fma(p, f, Set1(0x1.c6b752p-5f));
  p = Fma(p, f, Set1(0x1.ebf9bcp-3f));
  p = Fma(p, f, Set1(0x1.62e42ap-1f));
  p = Fma(p, f, Set1(1.f));
  const WordVec power = (reinterpret_cast<WordVec>(shifted) - 0x4b400000u + 127u) << 23;
  return Select(is_tiny, Zero(), p * reinterpret_cast<Vec>(power));
}

TVM_INFER_INLINE float ReduceMax(Vec a) {
  const float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
  return x > y ? x : y;
}
TVM_INFER_INLINE float ReduceAdd(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }

// Lane i of the result is the sum of a[i]'s lanes, added in one order whatever i.
TVM_INFER_INLINE Vec ReduceAddEach(const Vec (&a)[4]) {
  const Vec u = __builtin_shufflevector(a[0], a[1], 0, 4, 1, 5) + __builtin_shufflevector(a[0], a[1], 2, 6, 3, 7);
  const Vec w = __builtin_shufflevector(a[2], a[3], 0, 4, 1, 5) + __builtin_shufflevector(a[2], a[3], 2, 6, 3, 7);
  return __builtin_shufflevector(u, w, 0, 1, 4, 5) + __builtin_shufflevector(u, w, 2, 3, 6, 7);
}

TVM_INFER_INLINE void Transpose(Vec (&a)[4]) {
  const Vec t0 = __builtin_shufflevector(a[0], a[1], 0, 4, 1, 5), t1 = __builtin_shufflevector(a[0], a[1], 2, 6, 3, 7);
  const Vec t2 = __builtin_shufflevector(a[2], a[3], 0, 4, 1, 5), t3 = __builtin_shufflevector(a[2], a[3], 2, 6, 3, 7);
  a[0] = __builtin_shufflevector(t0, t2, 0, 1, 4, 5);
  a[1] = __builtin_shufflevector(t0, t2, 2, 3, 6, 7);
  a[2] = __builtin_shufflevector(t1, t3, 0, 1, 4, 5);
  a[3] = __builtin_shufflevector(t1, t3, 2, 3, 6, 7);
}

}  // namespace tvm_infer::cpu::TVM_INFER_ISA
