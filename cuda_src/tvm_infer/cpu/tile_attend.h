// One tile: rows against a range of keys, for each of a run of KV heads, block of keys by block.
//
// Few rows (decode) are bound by memory: dot products straight from the pages, each key loaded once for all rows of a group, the next
// rows prefetched. Many rows (prefill) are bound by FMA: K^T is packed and V widened once per block, and every six rows run outer products
// over them. Blocks lie at multiples of BlockKeys() of the list and every reduction runs in an order that depends on the key's place in
// its block alone, so a row's result does not depend on which rows are computed with it, only on which of the two ways their number takes.
#pragma once

#include "tvm_infer/cpu/kernels.h"
#include "tvm_infer/cpu/tile_buffers.h"
#include "tvm_infer/cpu/tile_scores.h"
#include "tvm_infer/cpu/tile_softmax.h"
#include "tvm_infer/cpu/tile_values.h"
#include "tvm_infer/cpu/tile_variant.h"

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
using AddValuesFn = void (*)(const float*, int, KeyRows<T>, KeyRows<T>, int, int, int, float*, int);
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

// A block of keys: the list's key `block` is column 0, the tile sees columns [begin, end).
struct Block {
  int block, begin, end;
};

// Logits and softmax of `rows` rows over columns c, then O += P V. With kFetch, `prefetch` is fetched along the values.
template <typename V, bool kFetch>
void UpdateRows(const TileJob& job, const HeadState& head, int o_stride, int row, int rows, int block, Columns c, float* s, KeyRows<V> v,
                KeyRows<V> prefetch) {
  const bool has_logits = job.variant != nullptr && job.variant->logits != nullptr;
  const bool has_softmax = job.variant == nullptr || job.variant->has_softmax;
  for (int r = 0; r < rows; ++r) {
    if (has_logits) ApplyLogits(job, head.kv_head, row + r, block, c.begin, c.end, s + r * kScoreStride);
    if (!has_softmax) {
      WeightBlock(s + r * kScoreStride, c.begin, c.end, job.visible_begin[row + r] - block, job.visible_end[row + r] - block,
                  &head.softmax[row + r]);
      continue;
    }
    const float rescale = SoftmaxBlock(s + r * kScoreStride, c.begin, c.end, job.visible_begin[row + r] - block,
                                       job.visible_end[row + r] - block, &head.softmax[row + r]);
    if (rescale != 1.f) ScaleRow(head.o + (row + r) * o_stride, o_stride, rescale);
  }
  WithRows<kTileRows>(rows, [&]<int R>() {
    for (int d = 0; d < o_stride; d += kTileVecs * kWidth) {
      const int vecs = (o_stride - d) / kWidth < kTileVecs ? (o_stride - d) / kWidth : kTileVecs;
      AddValuesOf<V, R, kFetch>(vecs)(s, kScoreStride, v, prefetch, d, c.begin, c.end, head.o + row * o_stride + d, o_stride);
    }
  });
}

// Scores of all rows by dot products; the block's values are prefetched along the first rows, if `v` has any.
template <typename K, typename T>
void DotBlock(const TileJob& job, const HeadState& head, const TileBuffers<T>& b, Block at, KeyRows<K> k, KeyRows<K> v) {
  for (int row = 0; row < job.num_rows; row += kDotRows) {
    const int rows = job.num_rows - row < kDotRows ? job.num_rows - row : kDotRows;
    const Columns c = VisibleColumns(job, row, rows, at.block, at.begin, at.end);
    if (c.begin >= c.end) continue;
    WithRows<kDotRows>(rows, [&]<int R>() {
      const auto dot_scores = row == 0 && v.rows != nullptr ? DotScores<K, R, true> : DotScores<K, R, false>;
      dot_scores(head.q + row * b.q_stride, b.q_stride, k, v, c.begin, c.end, job.head_dim, b.s + row * kScoreStride, kScoreStride);
    });
  }
}

// Softmax and values behind DotBlock; `prefetch` is fetched along the first rows.
template <typename T, typename V>
void UpdateBlock(const TileJob& job, const HeadState& head, const TileBuffers<T>& b, Block at, KeyRows<V> v, KeyRows<V> prefetch) {
  for (int row = 0; row < job.num_rows; row += kTileRows) {
    const int rows = job.num_rows - row < kTileRows ? job.num_rows - row : kTileRows;
    const Columns c = VisibleColumns(job, row, rows, at.block, at.begin, at.end);
    if (c.begin >= c.end) continue;
    const auto update = row == 0 && prefetch.rows != nullptr ? UpdateRows<V, true> : UpdateRows<V, false>;
    update(job, head, b.o_stride, row, rows, at.block, c, b.s + row * kScoreStride, v, prefetch);
  }
}

// Rows of the next block, fetched into the second-level cache while a block is computed: a share along each group of query rows.
template <typename T>
struct NextRows {
  KeyRows<T> k, v;
  int count;
};
template <typename T>
TVM_INFER_INLINE void PrefetchShare(const NextRows<T>& next, int head_dim, int head_dim_vo, int share, int num_shares) {
  constexpr int kLine = 64 / static_cast<int>(sizeof(T));
  for (int c = next.count * share / num_shares; c < next.count * (share + 1) / num_shares; ++c) {
    for (int d = 0; d < head_dim; d += kLine) __builtin_prefetch(next.k[c] + d, 0, 2);
    for (int d = 0; d < head_dim_vo; d += kLine) __builtin_prefetch(next.v[c] + d, 0, 2);
  }
}

// A block of keys for many rows, from packed K^T and widened V.
template <typename T>
void OuterBlock(const TileJob& job, const HeadState& head, const TileBuffers<T>& b, Block at, const NextRows<T>& next) {
  const int num_shares = (job.num_rows + kTileRows - 1) / kTileRows;
  const KeyRows<float> v{b.widened, 0};
  for (int row = 0; row < job.num_rows; row += kTileRows) {
    PrefetchShare(next, job.head_dim, job.head_dim_vo, row / kTileRows, num_shares);
    const int rows = job.num_rows - row < kTileRows ? job.num_rows - row : kTileRows;
    const Columns c = VisibleColumns(job, row, rows, at.block, at.begin, at.end);
    if (c.begin >= c.end) continue;
    WithRows<kTileRows>(rows, [&]<int R>() {
      for (int col = c.begin - c.begin % kWidth; col < c.end; col += kTileVecs * kWidth) {
        const int left = (c.end - col + kWidth - 1) / kWidth;
        OuterScoresOf<R>(left < kTileVecs ? left : kTileVecs)(head.q + row * b.q_stride, b.q_stride, b.kt + col, kBlockKeys, job.head_dim,
                                                              b.s + col, kScoreStride);
      }
    });
    UpdateRows<float, false>(job, head, b.o_stride, row, rows, at.block, c, b.s, v, {nullptr, 0});
  }
}

// num_heads heads from b.first.kv_head on, block by block and head by head within a block: tokens whose heads lie together (NHD) are
// read together, and a page's keys are looked up once.
template <typename T>
void AttendHeads(const TileJob& job, const TileBuffers<T>& b, int num_heads) {
  const int head_begin = b.first.kv_head;
  const bool use_dots = job.num_rows <= kMaxDotRows;
  const bool changes_keys = kIsScaled<T> || (job.variant != nullptr && job.variant->key != nullptr);
  // Few rows read values where they lie, if that needs no conversion or if it is done once anyway.
  const bool in_place = !kIsScaled<T> && b.o_stride == job.head_dim_vo && (sizeof(T) == sizeof(float) || job.num_rows <= kTileRows);
  const int64_t k_stride = job.k_head_stride / static_cast<int64_t>(sizeof(T)),
                v_stride = job.v_head_stride / static_cast<int64_t>(sizeof(T));
  const int block_keys = BlockKeys(job.num_rows, job.head_dim, sizeof(T));
  const auto block_end = [&job, block_keys](int begin) {
    const int next = (begin / block_keys + 1) * block_keys;
    return next < job.kv_end ? next : job.kv_end;
  };
  for (int h = 0; h < num_heads; ++h) LoadQueries(job, b.q_stride, b.o_stride, b.Head(h));
  int current = 0;
  if (job.kv_begin < job.kv_end)
    LocateKeys(job, job.kv_begin, block_end(job.kv_begin), job.kv_begin % block_keys, b.k_rows[0], b.v_rows[0]);
  for (int begin = job.kv_begin; begin < job.kv_end;) {
    const int end = block_end(begin);
    const int block = begin - begin % block_keys;
    const Block at{block, begin - block, end - block};
    const int next_count = end < job.kv_end ? block_end(end) - end : 0;
    LocateKeys(job, end, end + next_count, 0, b.k_rows[current ^ 1], b.v_rows[current ^ 1]);
    for (int h = 0; h < num_heads; ++h) {
      const int64_t k_at = (head_begin + h) * k_stride, v_at = (head_begin + h) * v_stride;
      const KeyRows<T> k{b.k_rows[current], k_at}, v{b.v_rows[current], v_at};
      const float v_scale = kIsScaled<T> ? job.v_scale[(head_begin + h) * job.v_scale_stride] : 1.f;
      if (use_dots) {
        // Next come the following head's keys, behind the last head the next block's; a shorter last block is not prefetched.
        const bool is_last = h + 1 == num_heads;
        const T* const* next_rows = !is_last ? b.k_rows[current] : next_count >= at.end ? b.k_rows[current ^ 1] : nullptr;
        const KeyRows<T> fetch{next_rows, is_last ? head_begin * k_stride : k_at + k_stride};
        if (changes_keys) {
          const KeyRows<T> values = kIsScaled<T> ? v : KeyRows<T>{nullptr, 0};
          DotBlock<float>(job, b.Head(h), b, at, ChangeKeys(job, b, head_begin + h, h == 0, block, at.begin, at.end, k, values),
                          {nullptr, 0});
        } else if constexpr (!kIsScaled<T>) {
          DotBlock<T>(job, b.Head(h), b, at, k, v);
        }
        if (in_place) {
          if constexpr (!kIsScaled<T>) UpdateBlock<T, T>(job, b.Head(h), b, at, v, fetch);
        } else {
          WidenValues(v, fetch, v_scale, at.begin, at.end, job.head_dim_vo, b.v, b.o_stride, b.widened);
          UpdateBlock<T, float>(job, b.Head(h), b, at, {b.widened, 0}, {nullptr, 0});
        }
      } else {
        if (changes_keys) {
          PackKeys(ChangeKeys(job, b, head_begin + h, h == 0, block, at.begin, at.end, k, {nullptr, 0}), at.begin, at.end, job.head_dim,
                   b.kt, kBlockKeys);
        } else if constexpr (!kIsScaled<T>) {
          PackKeys(k, at.begin, at.end, job.head_dim, b.kt, kBlockKeys);
        }
        WidenValues<T>(v, {nullptr, 0}, v_scale, at.begin, at.end, job.head_dim_vo, b.v, b.o_stride, b.widened);
        OuterBlock<T>(job, b.Head(h), b, at, {{b.k_rows[current ^ 1], k_at}, {b.v_rows[current ^ 1], v_at}, next_count});
      }
    }
    begin = end;
    current ^= 1;
  }
  for (int h = 0; h < num_heads; ++h) StoreOutputs(job, b.o_stride, b.Head(h));
}

// T: of keys and values in memory; queries and outputs are of job.q_type.
template <typename T>
void Attend(const TileJob& job, Scratch* scratch) {
  // As many heads at once as leave the second-level cache to the keys; many rows fill it with one.
  constexpr int64_t kStateBytes = 128 * 1024;
  const int64_t head_bytes = static_cast<int64_t>(job.num_rows) * (job.head_dim + job.head_dim_vo) * sizeof(float);
  const int64_t fitting = job.num_rows <= kMaxDotRows ? kStateBytes / head_bytes : 1;
  const int heads_at_once = fitting < 1 ? 1 : fitting < job.num_kv_heads ? static_cast<int>(fitting) : job.num_kv_heads;
  TileBuffers<T> b = Layout<T>(job, heads_at_once, scratch);
  for (int h = 0; h < job.num_kv_heads; h += heads_at_once) {
    b.first.kv_head = h;
    AttendHeads(job, b, job.num_kv_heads - h < heads_at_once ? job.num_kv_heads - h : heads_at_once);
  }
}

}  // namespace tvm_infer::cpu::TVM_INFER_ISA
