// O += P V for a tile, outer products over the keys in ascending order. An element's arithmetic does not depend on the tile around it.
#pragma once

#include "tvm_infer/cpu/kernels.h"
#include "tvm_infer/cpu/tile_scores.h"
#include "tvm_infer/cpu/vec_partial.h"

namespace tvm_infer::cpu::TVM_INFER_ISA {

// o[r][0 … N * kWidth) += sum over columns c in [begin, end) of p[r][c] * v_rows[c][col …]. With kFetch, the same elements of the rows
// of `prefetch` are fetched on the way: the keys that will be needed next.
template <typename T, int R, int N, bool kFetch>
void AddValues(const float* p, int p_stride, KeyRows<T> v_rows, KeyRows<T> prefetch, int col, int begin, int end, float* o, int o_stride) {
  Vec acc[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[r][n] = Load(o + r * o_stride + n * kWidth);
  }
  for (int c = begin; c < end; ++c) {
    const T* row = v_rows[c] + col;
    Vec v[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      v[n] = Load(row + n * kWidth);
      if constexpr (kFetch) __builtin_prefetch(prefetch[c] + col + n * kWidth, 0, 3);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec pv = Set1(p[r * p_stride + c]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = Fma(pv, v[n], acc[r][n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) Store(o + r * o_stride + n * kWidth, acc[r][n]);
  }
}

// v[c][0 … padded) = v_rows[c] widened, times `scale` where elements are of 8 bits, zeros behind head_dim; and pointers to its rows.
// Prefetches like AddValues.
template <typename T>
void WidenValues(KeyRows<T> v_rows, KeyRows<T> prefetch, float scale, int begin, int end, int head_dim, float* v, int v_stride,
                 const float** rows) {
  const Vec factor = Set1(scale);
  for (int c = begin; c < end; ++c) {
    rows[c] = v + c * v_stride;
    for (int d = 0; d < head_dim; d += kWidth) {
      if (prefetch.rows != nullptr) __builtin_prefetch(prefetch[c] + d, 0, 3);
      const Vec x = LoadUpTo(v_rows[c] + d, head_dim - d);
      Store(v + c * v_stride + d, sizeof(T) == 1 ? Mul(x, factor) : x);
    }
  }
}

TVM_INFER_INLINE void ScaleRow(float* o, int padded_dim, float factor) {
  const Vec f = Set1(factor);
  for (int d = 0; d < padded_dim; d += kWidth) Store(o + d, Mul(Load(o + d), f));
}

}  // namespace tvm_infer::cpu::TVM_INFER_ISA
