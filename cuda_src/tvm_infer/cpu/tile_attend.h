// One tile: rows of one KV head against a range of keys, block of kBlockKeys by block.
//
// Few rows (decode) are bound by memory: dot products straight from the pages, each key loaded once for all rows of a group, the next
// rows prefetched. Many rows (prefill) are bound by FMA: K^T is packed and V widened once per block, and every six rows run outer products
// over them. Blocks lie at multiples of kBlockKeys of the list and every reduction runs in an order that depends on the key's place in
// its block alone, so a row's result does not depend on the rows computed with it.
#pragma once

#include <stddef.h>

#include "tvm_infer/cpu/kernels.h"

namespace tvm_infer::cpu::TVM_INFER_ISA {

inline constexpr int kBlockKeys = 64;
inline constexpr int kScoreStride = kBlockKeys + 16;  // DotScores writes up to kWidth columns of garbage
// Packing K^T costs about as much as the dot products of this many rows.
inline constexpr int kMaxDotRows = 16;
inline constexpr int kDotRows = 4;

template <typename T>
struct TileBuffers {
  int q_stride;  // head_dim rounded up to vectors; floats
  float* q;      // [num_rows][q_stride], times scale_log2
  float* o;      // [num_rows][q_stride]
  float* s;      // [kTileRows or kMaxDotRows][kScoreStride]
  SoftmaxState* state;
  float* kt;              // [head_dim][kBlockKeys]
  float* v;               // [kBlockKeys][q_stride]
  const T** k_rows[2];    // of this block and the next
  const T** v_rows[2];    //
  const float** widened;  // rows of v
};

template <typename T>
TileBuffers<T> Layout(const TileJob& job, Scratch* scratch) {
  TileBuffers<T> b;
  b.q_stride = (job.head_dim + kWidth - 1) / kWidth * kWidth;
  size_t bytes = 0;
  const auto take = [&bytes](size_t n) {
    const size_t at = bytes;
    bytes += (n + 63) / 64 * 64;
    return at;
  };
  const size_t rows = static_cast<size_t>(job.num_rows);
  const size_t q = take(rows * b.q_stride * sizeof(float));
  const size_t o = take(rows * b.q_stride * sizeof(float));
  const size_t s = take(static_cast<size_t>(kMaxDotRows) * kScoreStride * sizeof(float));
  const size_t state = take(rows * sizeof(SoftmaxState));
  const size_t kt = take(static_cast<size_t>(job.head_dim) * kBlockKeys * sizeof(float));
  const size_t v = take(static_cast<size_t>(kBlockKeys) * b.q_stride * sizeof(float));
  const size_t pointers = take(5 * kBlockKeys * sizeof(void*));
  char* base = scratch->Reserve(bytes);
  b.q = reinterpret_cast<float*>(base + q);
  b.o = reinterpret_cast<float*>(base + o);
  b.s = reinterpret_cast<float*>(base + s);
  b.state = reinterpret_cast<SoftmaxState*>(base + state);
  b.kt = reinterpret_cast<float*>(base + kt);
  b.v = reinterpret_cast<float*>(base + v);
  const T** rows_of = reinterpret_cast<const T**>(base + pointers);
  for (int i = 0; i < 2; ++i) {
    b.k_rows[i] = rows_of + 2 * i * kBlockKeys;
    b.v_rows[i] = rows_of + (2 * i + 1) * kBlockKeys;
  }
  b.widened = reinterpret_cast<const float**>(rows_of + 4 * kBlockKeys);
  return b;
}

// Rows of keys [begin, end) of the list into columns from begin % kBlockKeys on; the keys lie in one block.
template <typename T>
void LocateKeys(const TileJob& job, int begin, int end, const T** k_rows, const T** v_rows) {
  int c = begin % kBlockKeys;
  if (job.pages == nullptr) {
    for (int j = begin; j < end; ++j, ++c) {
      k_rows[c] = reinterpret_cast<const T*>(job.k + (job.first_row + j) * job.k_token_stride);
      v_rows[c] = reinterpret_cast<const T*>(job.v + (job.first_row + j) * job.v_token_stride);
    }
    return;
  }
  int page = begin / job.page_size, slot = begin % job.page_size;
  for (int j = begin; j < end; ++page, slot = 0) {
    const int64_t index = job.pages[page];
    const char* k = job.k + index * job.k_page_stride + slot * job.k_token_stride;
    const char* v = job.v + index * job.v_page_stride + slot * job.v_token_stride;
    for (; slot < job.page_size && j < end; ++slot, ++j, ++c) {
      k_rows[c] = reinterpret_cast<const T*>(k);
      v_rows[c] = reinterpret_cast<const T*>(v);
      k += job.k_token_stride;
      v += job.v_token_stride;
    }
  }
}

template <typename T>
void LoadQueries(const TileJob& job, const TileBuffers<T>& b) {
  const Vec scale = Set1(job.scale_log2);
  for (int r = 0; r < job.num_rows; ++r) {
    const T* q = static_cast<const T*>(job.q_rows[r]);
    for (int d = 0; d < job.head_dim; d += kWidth) {
      Store(b.q + r * b.q_stride + d, Mul(LoadUpTo(q + d, job.head_dim - d), scale));
      Store(b.o + r * b.q_stride + d, Zero());
    }
    b.state[r].max = -__builtin_inff();
    Store(b.state[r].sum, Zero());
  }
}

template <typename T>
void StoreRow(const float* o, int head_dim, float factor, T* out) {
  const Vec f = Set1(factor);
  for (int d = 0; d < head_dim; d += kWidth) StoreUpTo(out + d, Mul(Load(o + d), f), head_dim - d);
}

template <typename T>
void StoreOutputs(const TileJob& job, const TileBuffers<T>& b) {
  for (int r = 0; r < job.num_rows; ++r) {
    const float sum = ReduceAdd(Load(b.state[r].sum));
    const bool is_empty = sum == 0.f;  // no visible key, or none with a score above -inf
    const float factor = is_empty ? 0.f : 1.f / sum;
    const float* o = b.o + r * b.q_stride;
    if (job.is_partial) {
      StoreRow(o, job.head_dim, factor, static_cast<float*>(job.o_rows[r]));
    } else {
      StoreRow(o, job.head_dim, factor, static_cast<T*>(job.o_rows[r]));
    }
    if (job.lse_rows != nullptr) {
      *job.lse_rows[r] = is_empty ? -__builtin_inff() : b.state[r].max * 0x1.62e43p-1f + __builtin_logf(sum);
    }
  }
}

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
void DotBlock(const TileBuffers<T>& b, int num_rows, int begin, int end, int head_dim, const T* const* k_rows, const T* const* v_rows) {
  for (int row = 0; row < num_rows; row += kDotRows) {
    WithRows<kDotRows>(num_rows - row < kDotRows ? num_rows - row : kDotRows, [&]<int R>() {
      const auto dot_scores = row == 0 ? DotScores<T, R, true> : DotScores<T, R, false>;
      dot_scores(b.q + row * b.q_stride, b.q_stride, k_rows, v_rows, begin, end, head_dim, b.s + row * kScoreStride, kScoreStride);
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

// A block of keys for many rows, from packed K^T.
template <typename T, typename V>
void OuterBlock(const TileJob& job, const TileBuffers<T>& b, int block, int begin, int end, const V* const* v_rows,
                const NextRows<T>& next) {
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
    UpdateRows<T, V, false>(job, b, row, rows, block, c, b.s, v_rows, nullptr);
  }
}

template <typename T>
void Attend(const TileJob& job, Scratch* scratch) {
  const TileBuffers<T> b = Layout<T>(job, scratch);
  LoadQueries(job, b);
  const bool use_dots = job.num_rows <= kMaxDotRows;
  // Values are read where they lie if that needs no conversion, or if it is done once anyway.
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
      DotBlock(b, job.num_rows, first, last, job.head_dim, k_rows, v_rows);
      if (in_place) {
        UpdateBlock<T, T>(job, b, block, first, last, v_rows, fetch);
      } else {
        WidenValues(v_rows, fetch, first, last, job.head_dim, b.v, b.q_stride, b.widened);
        UpdateBlock<T, float>(job, b, block, first, last, b.widened, nullptr);
      }
    } else {
      const NextRows<T> next{next_k_rows, b.v_rows[current ^ 1], next_end - end};
      PackKeys(k_rows, first, last, job.head_dim, b.kt, kBlockKeys);
      if (in_place) {
        OuterBlock<T, T>(job, b, block, first, last, v_rows, next);
      } else {
        WidenValues<T>(v_rows, nullptr, first, last, job.head_dim, b.v, b.q_stride, b.widened);
        OuterBlock<T, float>(job, b, block, first, last, b.widened, next);
      }
    }
    begin = end;
    current ^= 1;
  }
  StoreOutputs(job, b);
}

}  // namespace tvm_infer::cpu::TVM_INFER_ISA
