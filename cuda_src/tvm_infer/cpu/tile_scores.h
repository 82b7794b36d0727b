// Scores of a tile: S = Q K^T for rows of Q in fp32 scratch, by dot products (few rows) or by outer products over packed K^T (many).
// A score's arithmetic does not depend on which rows and keys are computed together with it.
#pragma once

#include "tvm_infer/cpu/kernels.h"
#include "tvm_infer/cpu/vec_partial.h"

namespace tvm_infer::cpu::TVM_INFER_ISA {

// Addresses of a block's keys or values for one head: column c is rows[c] + offset, and offset is where the head lies.
template <typename T>
struct KeyRows {
  const T* const* rows;  // nullptr: nothing to fetch
  int64_t offset;        // elements
  const T* operator[](int c) const { return rows[c] + offset; }
};

// s[r][c] = q[r] . k_rows[c] for R <= 4 rows and columns [begin, end); may write garbage up to kWidth columns further.
// kWidth dot products run at once and are reduced together. With kFetch, the rows of `prefetch` are fetched on the way, a line per load
// (in bursts they fill the queue of misses and stop everything): the values that will be needed next.
template <typename T, int R, bool kFetch>
void DotScores(const float* q, int q_stride, KeyRows<T> k_rows, KeyRows<T> prefetch, int begin, int end, int head_dim, float* s,
               int s_stride) {
  constexpr int kKeys = kWidth / R;
  for (int c = begin; c < end; c += kKeys) {
    const T* k[kKeys];
    const T* fetch[kKeys];
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) {
      const int column = c + j < end ? c + j : end - 1;
      k[j] = k_rows[column];
      if constexpr (kFetch) fetch[j] = prefetch[column];
    }
    Vec acc[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) acc[i] = Zero();
    for (int d = 0; d < head_dim; d += kWidth) {
      Vec qv[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) qv[r] = Load(q + r * q_stride + d);
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) {
        const Vec kv = LoadUpTo(k[j] + d, head_dim - d);
        if constexpr (kFetch) __builtin_prefetch(fetch[j] + d, 0, 3);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r * kKeys + j] = Fma(qv[r], kv, acc[r * kKeys + j]);
      }
    }
    float sums[kWidth];
    Store(sums, ReduceAddEach(acc));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) __builtin_memcpy(s + r * s_stride + c, sums + r * kKeys, kKeys * sizeof(float));
  }
}

// kt[d][c] = k_rows[c][d] for columns [begin, end) and up to the next multiples of kWidth around them, where kt is 0.
template <typename T>
void PackKeys(KeyRows<T> k_rows, int begin, int end, int head_dim, float* kt, int kt_stride) {
  for (int c = begin - begin % kWidth; c < end; c += kWidth) {
    for (int d = 0; d < head_dim; d += kWidth) {
      Vec block[kWidth];
#pragma GCC unroll 16
      for (int j = 0; j < kWidth; ++j) {
        block[j] = c + j >= begin && c + j < end ? LoadUpTo(k_rows[c + j] + d, head_dim - d) : Zero();
      }
      Transpose(block);
      const int rows = head_dim - d < kWidth ? head_dim - d : kWidth;
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        if (i < rows) Store(kt + (d + i) * kt_stride + c, block[i]);
      }
    }
  }
}

// s[r][0 … N * kWidth) = sum over d of q[r][d] * kt[d][…], d ascending.
template <int R, int N>
void OuterScores(const float* q, int q_stride, const float* kt, int kt_stride, int head_dim, float* s, int s_stride) {
  Vec acc[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[r][n] = Zero();
  }
  for (int d = 0; d < head_dim; ++d) {
    Vec k[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) k[n] = Load(kt + d * kt_stride + n * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec qv = Set1(q[r * q_stride + d]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = Fma(qv, k[n], acc[r][n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) Store(s + r * s_stride + n * kWidth, acc[r][n]);
  }
}

}  // namespace tvm_infer::cpu::TVM_INFER_ISA
