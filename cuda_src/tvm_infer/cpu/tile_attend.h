// One tile: rows of one KV head against a range of keys, block of kBlockKeys by block.
//
// Few rows (decode) are bound by memory: dot products straight from the pages, each key loaded once for all rows of a group, the next
// rows prefetched. Many rows (prefill) are bound by FMA: K^T is packed and V widened once per block, and every six rows run outer products
// over them. Blocks lie at multiples of kBlockKeys of the list and every reduction runs in an order that depends on the key's place in
// its block alone, so a row's result does not depend on the rows computed with it.
#pragma once

#include "tvm_infer/cpu/kernels.h"
#include "tvm_infer/cpu/tile_buffers.h"
#include "tvm_infer/cpu/tile_scores.h"
#include "tvm_infer/cpu/tile_softmax.h"
#include "tvm_infer/cpu/tile_values.h"

namespace tvm_infer::cpu::TVM_INFER_ISA {

using OuterScoresFn = void (*)(const float*, int, const float*, int, int, float*, int);
template <int R>
OuterScoresFn OuterScoresOf(int n) {
  if constexpr (kTileVecs == 4) {
    if (n == 4) return OuterScores<R, 4>;
    if (n == 3) return OuterScores<R, 3>;
  }
  return n == 2 ? OuterScores<R, 2> : OuterScores<R, 1>;
}

template <typename T>
using AddValuesFn = void (*)(const float*, int, const T* const*, int, int, int, float*, int, const T* const*);
template <typename T, int R, bool kFetch>
AddValuesFn<T> AddValuesOf(int n) {
  if constexpr (kTileVecs == 4) {
    if (n == 4) return AddValues<T, R, 4, kFetch>;
    if (n == 3) return AddValues<T, R, 3, kFetch>;
  }
  return n == 2 ? AddValues<T, R, 2, kFetch> : AddValues<T, R, 1, kFetch>;
}

// Calls f.template operator()<R>() for R = rows in 1 … Max.
template <int Max, typename F>
TVM_INFER_INLINE void WithRows(int rows, F&& f) {
  if constexpr (Max > 1) {
    if (rows < Max) return WithRows<Max - 1>(rows, f);
  }
  f.template operator()<Max>();
}

// Columns that some of `rows` rows from `row` on see in the block that starts at key `block`.
struct Columns {
  int begin, end;
};
TVM_INFER_INLINE Columns VisibleColumns(const TileJob& job, int row, int rows, int block, int begin, int end) {
  Columns c{end, begin};
  for (int r = row; r < row + rows; ++r) {
    if (job.visible_begin[r] >= job.visible_end[r]) continue;
    const int first = job.visible_begin[r] - block, last = job.visible_end[r] - block;
    c.begin = first < c.begin ? first : c.begin;
    c.end = last > c.end ? last : c.end;
  }
  c.begin = c.begin < begin ? begin : c.begin;
  c.end = c.end > end ? end : c.end;
  return c;
}

// Softmax of `rows` rows over columns [c.begin, c.end), then O += P V.
template <typename T, typename V, bool kFetch>
void UpdateRows(const TileJob& job, const TileBuffers<T>& b, int row, int rows, int block, Columns c, float* s, const V* const* v_rows,
                const V* const* prefetch) {
  for (int r = 0; r < rows; ++r) {
    const float rescale = SoftmaxBlock(s + r * kScoreStride, c.begin, c.end, job.visible_begin[row + r] - block,
                                       job.visible_end[row + r] - block, &b.state[row + r]);
    if (rescale != 1.f) ScaleRow(b.o + (row + r) * b.q_stride, b.q_stride, rescale);
  }
  WithRows<kTileRows>(rows, [&]<int R>() {
    for (int d = 0; d < b.q_stride; d += kTileVecs * kWidth) {
      const int vecs = (b.q_stride - d) / kWidth < kTileVecs ? (b.q_stride - d) / kWidth : kTileVecs;
      AddValuesOf<V, R, kFetch>(vecs)(s, kScoreStride, v_rows, d, c.begin, c.end, b.o + row * b.q_stride + d, b.q_stride, prefetch);
    }
  });
}

// Scores of all rows by dot products; the block's values are prefetched along the first rows.
template <typename T>
void DotBlock(const TileJob& job, const TileBuffers<T>& b, int block, int begin, int end, const T* const* k_rows, const T* const* v_rows) {
  for (int row = 0; row < job.num_rows; row += kDotRows) {
    const int rows = job.num_rows - row < kDotRows ? job.num_rows - row : kDotRows;
    const Columns c = VisibleColumns(job, row, rows, block, begin, end);
    if (c.begin >= c.end) continue;
    WithRows<kDotRows>(rows, [&]<int R>() {
      const auto dot_scores = row == 0 ? DotScores<T, R, true> : DotScores<T, R, false>;
      dot_scores(b.q + row * b.q_stride, b.q_stride, k_rows, v_rows, c.begin, c.end, job.head_dim, b.s + row * kScoreStride, kScoreStride);
    });
  }
}

// Softmax and values behind DotBlock. Rows of `prefetch` (or nullptr) are fetched along the first rows.
template <typename T, typename V>
void UpdateBlock(const TileJob& job, const TileBuffers<T>& b, int block, int begin, int end, const V* const* v_rows,
                 const V* const* prefetch) {
  for (int row = 0; row < job.num_rows; row += kTileRows) {
    const int rows = job.num_rows - row < kTileRows ? job.num_rows - row : kTileRows;
    const Columns c = VisibleColumns(job, row, rows, block, begin, end);
    if (c.begin >= c.end) continue;
    const auto update = row == 0 && prefetch != nullptr ? UpdateRows<T, V, true> : UpdateRows<T, V, false>;
    update(job, b, row, rows, block, c, b.s + row * kScoreStride, v_rows, prefetch);
  }
}

// Rows of the next block, fetched into the second-level cache while a block is computed: a share along each group of query rows.
template <typename T>
struct NextRows {
  const T* const* k;
  const T* const* v;
  int count;
};
template <typename T>
TVM_INFER_INLINE void PrefetchShare(const NextRows<T>& next, int head_dim, int share, int num_shares) {
  for (int c = next.count * share / num_shares; c < next.count * (share + 1) / num_shares; ++c) {
    for (int d = 0; d < head_dim; d += 64 / static_cast<int>(sizeof(T))) {
      __builtin_prefetch(next.k[c] + d, 0, 2);
      __builtin_prefetch(next.v[c] + d, 0, 2);
    }
  }
}

// A block of keys for many rows, from packed K^T and widened V.
template <typename T>
void OuterBlock(const TileJob& job, const TileBuffers<T>& b, int block, int begin, int end, const NextRows<T>& next) {
  const int num_shares = (job.num_rows + kTileRows - 1) / kTileRows;
  for (int row = 0; row < job.num_rows; row += kTileRows) {
    PrefetchShare(next, job.head_dim, row / kTileRows, num_shares);
    const int rows = job.num_rows - row < kTileRows ? job.num_rows - row : kTileRows;
    const Columns c = VisibleColumns(job, row, rows, block, begin, end);
    if (c.begin >= c.end) continue;
    WithRows<kTileRows>(rows, [&]<int R>() {
      for (int col = c.begin - c.begin % kWidth; col < c.end; col += kTileVecs * kWidth) {
        const int left = (c.end - col + kWidth - 1) / kWidth;
        OuterScoresOf<R>(left < kTileVecs ? left : kTileVecs)(b.q + row * b.q_stride, b.q_stride, b.kt + col, kBlockKeys, job.head_dim,
                                                              b.s + col, kScoreStride);
      }
    });
    UpdateRows<T, float, false>(job, b, row, rows, block, c, b.s, b.widened, nullptr);
  }
}

template <typename T>
void Attend(const TileJob& job, Scratch* scratch) {
  const TileBuffers<T> b = Layout<T>(job, scratch);
  LoadQueries(job, b);
  const bool use_dots = job.num_rows <= kMaxDotRows;
  // Few rows read values where they lie, if that needs no conversion or if it is done once anyway.
  const bool in_place = b.q_stride == job.head_dim && (sizeof(T) == sizeof(float) || job.num_rows <= kTileRows);
  const auto block_end = [&job](int begin) {
    const int next = (begin / kBlockKeys + 1) * kBlockKeys;
    return next < job.kv_end ? next : job.kv_end;
  };
  int current = 0;
  if (job.kv_begin < job.kv_end) LocateKeys(job, job.kv_begin, block_end(job.kv_begin), b.k_rows[0], b.v_rows[0]);
  for (int begin = job.kv_begin; begin < job.kv_end;) {
    const int end = block_end(begin);
    const int block = begin - begin % kBlockKeys;
    const int first = begin - block, last = end - block;
    const T* const* k_rows = b.k_rows[current];
    const T* const* v_rows = b.v_rows[current];
    const T** next_k_rows = b.k_rows[current ^ 1];
    const int next_end = end < job.kv_end ? block_end(end) : end;
    LocateKeys(job, end, next_end, next_k_rows, b.v_rows[current ^ 1]);
    if (use_dots) {
      // The last block may be shorter: then nothing is prefetched for it.
      const T* const* fetch = next_end - end >= last ? next_k_rows : nullptr;
      DotBlock(job, b, block, first, last, k_rows, v_rows);
      if (in_place) {
        UpdateBlock<T, T>(job, b, block, first, last, v_rows, fetch);
      } else {
        WidenValues(v_rows, fetch, first, last, job.head_dim, b.v, b.q_stride, b.widened);
        UpdateBlock<T, float>(job, b, block, first, last, b.widened, nullptr);
      }
    } else {
      PackKeys(k_rows, first, last, job.head_dim, b.kt, kBlockKeys);
      WidenValues<T>(v_rows, nullptr, first, last, job.head_dim, b.v, b.q_stride, b.widened);
      OuterBlock(job, b, block, first, last, {next_k_rows, b.v_rows[current ^ 1], next_end - end});
    }
    begin = end;
    current ^= 1;
  }
  StoreOutputs(job, b);
}

}  // namespace tvm_infer::cpu::TVM_INFER_ISA
