// Vectors of 8 floats (AVX2, FMA, F16C). The same names as vec_avx512.h; head_dim is a multiple of 8, so nothing is ever partial.
#pragma once

#include <immintrin.h>

#include "tvm_infer/cpu/kernels.h"

#define TVM_INFER_INLINE static inline __attribute__((always_inline))

namespace tvm_infer::cpu::TVM_INFER_ISA {

using Vec = __m256;
inline constexpr int kWidth = 8;
// 6 x 2 accumulators, 2 loads and 1 broadcast: 15 of 16 registers.
inline constexpr int kTileRows = 6;
inline constexpr int kTileVecs = 2;

TVM_INFER_INLINE Vec Zero() { return _mm256_setzero_ps(); }
TVM_INFER_INLINE Vec Set1(float x) { return _mm256_set1_ps(x); }
TVM_INFER_INLINE Vec Add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
TVM_INFER_INLINE Vec Sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
TVM_INFER_INLINE Vec Mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
TVM_INFER_INLINE Vec Fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
TVM_INFER_INLINE Vec Max(Vec a, Vec b) { return _mm256_max_ps(a, b); }  // b where a or b is NaN

TVM_INFER_INLINE Vec Load(const float* p) { return _mm256_loadu_ps(p); }
TVM_INFER_INLINE Vec Load(const BFloat* p) {
  const __m128i half_words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half_words), 16));
}
TVM_INFER_INLINE Vec Load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
// By way of half, as in vec_avx512.h.
TVM_INFER_INLINE Vec Load(const Float8E5M2* p) {
  return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 8));
}
TVM_INFER_INLINE Vec Load(const Float8E4M3* p) {
  const __m128i words = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i half = _mm_and_si128(_mm_slli_epi16(words, 7), _mm_set1_epi16(static_cast<int16_t>(0xbf80)));
  const __m128i is_nan = _mm_cmpeq_epi16(_mm_and_si128(half, _mm_set1_epi16(0x7fff)), _mm_set1_epi16(0x3f80));
  return Mul(_mm256_cvtph_ps(_mm_blendv_epi8(half, _mm_set1_epi16(0x7e00), is_nan)), Set1(256.f));
}

TVM_INFER_INLINE void Store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
TVM_INFER_INLINE void Store(BFloat* p, Vec a) {  // round to nearest even; a NaN stays a NaN
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  const __m256 chosen = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), quiet, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i words = _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
TVM_INFER_INLINE void Store(Half* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Lanes [begin, end) of a; -inf elsewhere.
TVM_INFER_INLINE Vec KeepLanes(Vec a, int begin, int end) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i before_end = _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane);
  const __m256i before_begin = _mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane);
  return _mm256_blendv_ps(_mm256_set1_ps(-__builtin_inff()), a, _mm256_castsi256_ps(_mm256_andnot_si256(before_begin, before_end)));
}

// 2^x for x <= 0, 0 below 2^-126 and at -inf, NaN at NaN. The polynomial of vec_avx512.h.
TVM_INFER_INLINE Vec Exp2(Vec x) {
  const Vec floor = Set1(-126.f);
  const Vec is_tiny = _mm256_cmp_ps(x, floor, _CMP_LT_OQ);
  x = _mm256_max_ps(floor, x);
  const Vec n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec f = Sub(x, n);
  Vec p = Fma(Set1(0x1.5bba14p-10f), f, Set1(0x1.3cea88p-7f));
  p = Fma(p, f, Set1(0x1.c6b752p-5f));
  p = Fma(p, f, Set1(0x1.ebf9bcp-3f));
  p = Fma(p, f, Set1(0x1.62e42ap-1f));
  p = Fma(p, f, Set1(1.f));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_andnot_ps(is_tiny, Mul(p, _mm256_castsi256_ps(power)));
}

TVM_INFER_INLINE float ReduceMax(Vec a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
TVM_INFER_INLINE float ReduceAdd(Vec a) {
  __m128 m = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  m = _mm_add_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
}

TVM_INFER_INLINE Vec UnpackLo64(Vec a, Vec b) { return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b))); }
TVM_INFER_INLINE Vec UnpackHi64(Vec a, Vec b) { return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b))); }

// Lane i of the result is the sum of a[i]'s lanes, added in one order whatever i.
TVM_INFER_INLINE Vec ReduceAddEach(const Vec (&a)[8]) {
  Vec half[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Vec u = Add(_mm256_unpacklo_ps(a[4 * i], a[4 * i + 1]), _mm256_unpackhi_ps(a[4 * i], a[4 * i + 1]));
    const Vec w = Add(_mm256_unpacklo_ps(a[4 * i + 2], a[4 * i + 3]), _mm256_unpackhi_ps(a[4 * i + 2], a[4 * i + 3]));
    half[i] = Add(UnpackLo64(u, w), UnpackHi64(u, w));
  }
  return Add(_mm256_permute2f128_ps(half[0], half[1], 0x20), _mm256_permute2f128_ps(half[0], half[1], 0x31));
}

TVM_INFER_INLINE void Transpose(Vec (&a)[8]) {
  Vec b[8];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {  // 4 x 4 blocks within every 128 bits
    const Vec t0 = _mm256_unpacklo_ps(a[4 * i], a[4 * i + 1]), t1 = _mm256_unpackhi_ps(a[4 * i], a[4 * i + 1]);
    const Vec t2 = _mm256_unpacklo_ps(a[4 * i + 2], a[4 * i + 3]), t3 = _mm256_unpackhi_ps(a[4 * i + 2], a[4 * i + 3]);
    b[4 * i] = UnpackLo64(t0, t2);
    b[4 * i + 1] = UnpackHi64(t0, t2);
    b[4 * i + 2] = UnpackLo64(t1, t3);
    b[4 * i + 3] = UnpackHi64(t1, t3);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    a[j] = _mm256_permute2f128_ps(b[j], b[4 + j], 0x20);
    a[4 + j] = _mm256_permute2f128_ps(b[j], b[4 + j], 0x31);
  }
}

}  // namespace tvm_infer::cpu::TVM_INFER_ISA
