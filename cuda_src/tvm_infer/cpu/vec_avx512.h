// Vectors of 16 floats. The same names in every vec_*.h: tile code is written once against them.
#pragma once

#include <immintrin.h>

#include "tvm_infer/cpu/kernels.h"

// GCC 12 warns of _mm512_undefined_ps() inside its own headers (PR 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define TVM_INFER_INLINE static inline __attribute__((always_inline))

namespace tvm_infer::cpu::TVM_INFER_ISA {

using Vec = __m512;
inline constexpr int kWidth = 16;
// Outer-product tile: 6 x 4 accumulators, 4 loads and 1 broadcast fill 29 of 32 registers; 24 FMA a step hide their 4 cycles twice.
inline constexpr int kTileRows = 6;
inline constexpr int kTileVecs = 4;

TVM_INFER_INLINE Vec Zero() { return _mm512_setzero_ps(); }
TVM_INFER_INLINE Vec Set1(float x) { return _mm512_set1_ps(x); }
TVM_INFER_INLINE Vec Add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
TVM_INFER_INLINE Vec Sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
TVM_INFER_INLINE Vec Mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
TVM_INFER_INLINE Vec Fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
TVM_INFER_INLINE Vec Max(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // b where a or b is NaN

TVM_INFER_INLINE Vec Widen(__m256i half_words, BFloat) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half_words), 16));
}
TVM_INFER_INLINE Vec Widen(__m256i half_words, Half) { return _mm512_cvtph_ps(half_words); }
TVM_INFER_INLINE Vec Load(const float* p) { return _mm512_loadu_ps(p); }
template <typename T>
TVM_INFER_INLINE Vec Load(const T* p) {
  return Widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
// The first n <= 16 elements; the rest are 0 and not read.
TVM_INFER_INLINE Vec LoadPartial(const float* p, int n) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p); }
template <typename T>
TVM_INFER_INLINE Vec LoadPartial(const T* p, int n) {
  return Widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p), T{});
}

// 8-bit floats by way of half: E5M2 is its upper byte. E4M3's exponent and mantissa move to the lower end of half's range, denormals
// included, and 2^8 brings the value back; what is NaN there is a number in half.
TVM_INFER_INLINE Vec Widen(__m128i bytes, Float8E5M2) { return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8)); }
TVM_INFER_INLINE Vec Widen(__m128i bytes, Float8E4M3) {
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7), _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
  const __mmask16 is_nan = _mm256_cmpeq_epi16_mask(_mm256_and_si256(half, _mm256_set1_epi16(0x7fff)), _mm256_set1_epi16(0x3f80));
  return Mul(_mm512_cvtph_ps(_mm256_mask_blend_epi16(is_nan, half, _mm256_set1_epi16(0x7e00))), Set1(256.f));
}
TVM_INFER_INLINE Vec Load(const Float8E4M3* p) { return Widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), Float8E4M3{}); }
TVM_INFER_INLINE Vec Load(const Float8E5M2* p) { return Widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), Float8E5M2{}); }
TVM_INFER_INLINE Vec LoadPartial(const Float8E4M3* p, int n) {
  return Widen(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1), p), Float8E4M3{});
}
TVM_INFER_INLINE Vec LoadPartial(const Float8E5M2* p, int n) {
  return Widen(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1), p), Float8E5M2{});
}

// Round to nearest even; a NaN stays a NaN.
TVM_INFER_INLINE __m256i Narrow(Vec a, BFloat) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan, rounded, _mm512_set1_epi32(0x7fc00000)), 16));
}
TVM_INFER_INLINE __m256i Narrow(Vec a, Half) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
TVM_INFER_INLINE void Store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
template <typename T>
TVM_INFER_INLINE void Store(T* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), Narrow(a, T{}));
}
TVM_INFER_INLINE void StorePartial(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a); }
template <typename T>
TVM_INFER_INLINE void StorePartial(T* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), Narrow(a, T{}));
}

// Lanes [begin, end) of a; -inf elsewhere.
TVM_INFER_INLINE Vec KeepLanes(Vec a, int begin, int end) {
  begin = begin < 0 ? 0 : (begin > 16 ? 16 : begin);
  end = end < 0 ? 0 : (end > 16 ? 16 : end);
  const unsigned keep = ((1u << end) - 1) & ~((1u << begin) - 1);
  return _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), static_cast<__mmask16>(keep), a);
}

// 2^x for x <= 0, 0 at -inf, NaN at NaN. 1 + f q(f) on |f| <= 1/2: relative error 9.2e-8 before rounding, exactly 1 at 0.
TVM_INFER_INLINE Vec Exp2(Vec x) {
  x = _mm512_max_ps(_mm512_set1_ps(-1000.f), x);
  const Vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec f = Sub(x, n);
  Vec p = Fma(Set1(0x1.5bba14p-10f), f, Set1(0x1.3cea88p-7f));
  p = Fma(p, f, Set1(0x1.c6b752p-5f));
  p = Fma(p, f, Set1(0x1.ebf9bcp-3f));
  p = Fma(p, f, Set1(0x1.62e42ap-1f));
  p = Fma(p, f, Set1(1.f));
  return _mm512_scalef_ps(p, n);
}

TVM_INFER_INLINE float ReduceMax(Vec a) { return _mm512_reduce_max_ps(a); }
TVM_INFER_INLINE float ReduceAdd(Vec a) { return _mm512_reduce_add_ps(a); }

TVM_INFER_INLINE Vec UnpackLo64(Vec a, Vec b) { return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); }
TVM_INFER_INLINE Vec UnpackHi64(Vec a, Vec b) { return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); }

// Lane i of the result is the sum of a[i]'s lanes, added in one order whatever i.
TVM_INFER_INLINE Vec ReduceAddEach(const Vec (&a)[16]) {
  Vec quarter[4];  // per 128 bits: the partial sums of four vectors
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec u = Add(_mm512_unpacklo_ps(a[4 * i], a[4 * i + 1]), _mm512_unpackhi_ps(a[4 * i], a[4 * i + 1]));
    const Vec w = Add(_mm512_unpacklo_ps(a[4 * i + 2], a[4 * i + 3]), _mm512_unpackhi_ps(a[4 * i + 2], a[4 * i + 3]));
    quarter[i] = Add(UnpackLo64(u, w), UnpackHi64(u, w));
  }
  const Vec x = Add(_mm512_shuffle_f32x4(quarter[0], quarter[1], 0x88), _mm512_shuffle_f32x4(quarter[0], quarter[1], 0xdd));
  const Vec y = Add(_mm512_shuffle_f32x4(quarter[2], quarter[3], 0x88), _mm512_shuffle_f32x4(quarter[2], quarter[3], 0xdd));
  return Add(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
}

TVM_INFER_INLINE void Transpose(Vec (&a)[16]) {
  Vec b[16];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // 4 x 4 blocks within every 128 bits
    const Vec t0 = _mm512_unpacklo_ps(a[4 * i], a[4 * i + 1]), t1 = _mm512_unpackhi_ps(a[4 * i], a[4 * i + 1]);
    const Vec t2 = _mm512_unpacklo_ps(a[4 * i + 2], a[4 * i + 3]), t3 = _mm512_unpackhi_ps(a[4 * i + 2], a[4 * i + 3]);
    b[4 * i] = UnpackLo64(t0, t2);
    b[4 * i + 1] = UnpackHi64(t0, t2);
    b[4 * i + 2] = UnpackLo64(t1, t3);
    b[4 * i + 3] = UnpackHi64(t1, t3);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // 128-bit blocks across
    const Vec x0 = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88), x1 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
    const Vec y0 = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd), y1 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
    a[j] = _mm512_shuffle_f32x4(x0, x1, 0x88);
    a[8 + j] = _mm512_shuffle_f32x4(x0, x1, 0xdd);
    a[4 + j] = _mm512_shuffle_f32x4(y0, y1, 0x88);
    a[12 + j] = _mm512_shuffle_f32x4(y0, y1, 0xdd);
  }
}

}  // namespace tvm_infer::cpu::TVM_INFER_ISA
