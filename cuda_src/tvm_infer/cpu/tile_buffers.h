// What a tile keeps in scratch, and what moves between it and the tensors: queries in, key addresses per block, outputs out.
#pragma once

#include <stddef.h>

#include "tvm_infer/cpu/kernels.h"
#include "tvm_infer/cpu/tile_scores.h"
#include "tvm_infer/cpu/tile_softmax.h"
#include "tvm_infer/cpu/tile_variant.h"
#include "tvm_infer/cpu/vec_partial.h"

namespace tvm_infer::cpu::TVM_INFER_ISA {

inline constexpr int kBlockKeys = 64;                 // at most
inline constexpr int kScoreStride = kBlockKeys + 16;  // DotScores writes up to kWidth columns of garbage
// Up to here dot products are faster: packing K^T and widening V cost 60 ns a key, a row saves 0.4 ns of 2.7 (AVX-512, head_dim 128).
inline constexpr int kMaxDotRows = 64;
inline constexpr int kDotRows = 4;

// Elements that a scale turns into values. A block of them is widened once, keys and values, and then treated as float: widening costs more
// than a store and a load, and the group's rows share it.
template <typename T>
inline constexpr bool kIsScaled = sizeof(T) == 1;

// Keys a block. Decode wants them few, so that what is prefetched is used soon: 8 KiB of keys read 15 % faster than 32 KiB.
TVM_INFER_INLINE int BlockKeys(int num_rows, int head_dim, int element_size) {
  constexpr int kDecodeRows = 8;
  if (num_rows > kDecodeRows) return kBlockKeys;
  int keys = kBlockKeys;
  while (keys > 16 && keys * head_dim * element_size > 8192) keys /= 2;
  return keys;
}

// Queries and running results of one head's rows.
struct HeadState {
  float* q;  // [num_rows][q_stride], times q_scale
  float* o;  // [num_rows][o_stride]
  SoftmaxState* softmax;
  int kv_head;  // of the work's
};

template <typename T>
struct TileBuffers {
  int q_stride;  // head_dim rounded up to vectors; floats
  int o_stride;  // head_dim_vo, the same
  int num_rows;
  HeadState first;        // of heads_at_once heads, one behind the other
  float* s;               // [kMaxDotRows][kScoreStride]
  float* kt;              // [head_dim][kBlockKeys]
  float* v;               // [kBlockKeys][o_stride]
  const T** k_rows[2];    // of this block and the next
  const T** v_rows[2];    //
  const float** widened;  // rows of v
  // Where a variant changes keys, or they are scaled: [kBlockKeys][q_stride] in float, their rows, and [kBlockKeys][2][num_pairs] cosines
  // and sines.
  float* keys;
  const float** key_rows;
  float* turns;

  HeadState Head(int h) const {
    const int64_t row = static_cast<int64_t>(h) * num_rows;
    return {first.q + row * q_stride, first.o + row * o_stride, first.softmax + row, first.kv_head + h};
  }
};

template <typename T>
TileBuffers<T> Layout(const TileJob& job, int heads_at_once, Scratch* scratch) {
  TileBuffers<T> b;
  b.q_stride = (job.head_dim + kWidth - 1) / kWidth * kWidth;
  b.o_stride = (job.head_dim_vo + kWidth - 1) / kWidth * kWidth;
  b.num_rows = job.num_rows;
  size_t bytes = 0;
  const auto take = [&bytes](size_t n) {
    const size_t at = bytes;
    bytes += (n + 63) / 64 * 64;
    return at;
  };
  const size_t rows = static_cast<size_t>(job.num_rows) * heads_at_once;
  const size_t q = take(rows * b.q_stride * sizeof(float));
  const size_t o = take(rows * b.o_stride * sizeof(float));
  const size_t softmax = take(rows * sizeof(SoftmaxState));
  const size_t s = take(static_cast<size_t>(kMaxDotRows) * kScoreStride * sizeof(float));
  const size_t kt = take(static_cast<size_t>(job.head_dim) * kBlockKeys * sizeof(float));
  const size_t v = take(static_cast<size_t>(kBlockKeys) * b.o_stride * sizeof(float));
  const size_t pointers = take(6 * kBlockKeys * sizeof(void*));
  const bool has_keys = job.variant != nullptr && job.variant->key != nullptr;
  const size_t keys = take(has_keys || kIsScaled<T> ? static_cast<size_t>(kBlockKeys) * b.q_stride * sizeof(float) : 0);
  const size_t turns = take(has_keys ? static_cast<size_t>(kBlockKeys) * 2 * job.variant->num_pairs * sizeof(float) : 0);
  char* base = scratch->Reserve(bytes);
  b.first = {reinterpret_cast<float*>(base + q), reinterpret_cast<float*>(base + o), reinterpret_cast<SoftmaxState*>(base + softmax), 0};
  b.s = reinterpret_cast<float*>(base + s);
  b.kt = reinterpret_cast<float*>(base + kt);
  b.v = reinterpret_cast<float*>(base + v);
  const T** rows_of = reinterpret_cast<const T**>(base + pointers);
  for (int i = 0; i < 2; ++i) {
    b.k_rows[i] = rows_of + 2 * i * kBlockKeys;
    b.v_rows[i] = rows_of + (2 * i + 1) * kBlockKeys;
  }
  b.widened = reinterpret_cast<const float**>(rows_of + 4 * kBlockKeys);
  b.key_rows = reinterpret_cast<const float**>(rows_of + 5 * kBlockKeys);
  b.keys = reinterpret_cast<float*>(base + keys);
  b.turns = reinterpret_cast<float*>(base + turns);
  return b;
}

// Rows of keys [begin, end) of the list, first head, into columns from `column` on.
template <typename T>
void LocateKeys(const TileJob& job, int begin, int end, int column, const T** k_rows, const T** v_rows) {
  int c = column;
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
void WidenRow(const void* from, int head_dim, float* to) {
  for (int d = 0; d < head_dim; d += kWidth) Store(to + d, LoadUpTo(static_cast<const T*>(from) + d, head_dim - d));
}
inline constexpr void (*kWidenRow[kNumFloats])(const void*, int, float*) = {WidenRow<float>, WidenRow<Half>, WidenRow<BFloat>};

inline void LoadQueries(const TileJob& job, int q_stride, int o_stride, const HeadState& head) {
  const Vec scale = Set1(job.q_scale);
  const bool has_hook = job.variant != nullptr && job.variant->query != nullptr;
  for (int r = 0; r < job.num_rows; ++r) {
    float* loaded = head.q + r * q_stride;
    kWidenRow[job.q_type](static_cast<const char*>(job.q_rows[r]) + head.kv_head * job.q_head_stride, job.head_dim, loaded);
    if (has_hook) ApplyQuery(*job.variant, head.kv_head, r, job.head_dim, loaded);
    for (int d = 0; d < job.head_dim; d += kWidth) Store(loaded + d, Mul(Load(loaded + d), scale));
    for (int d = 0; d < job.head_dim_vo; d += kWidth) Store(head.o + r * o_stride + d, Zero());
    head.softmax[r].max = -__builtin_inff();
    Store(head.softmax[r].sum, Zero());
  }
}

// The variant's turn with a key, [head_dim] in float, at column c of the block that starts at key `block`. Angles are those of a position:
// they are computed with the first of the heads.
TVM_INFER_INLINE void ApplyKey(const TileJob& job, int kv_head, bool is_first_head, int block, int c, float* turns, float* key) {
  const VariantJob& variant = *job.variant;
  const variant::Row row = RowOfHead(variant, 0, kv_head);
  float* cos = turns + c * 2 * variant.num_pairs;
  const int position = block + c;
  if (is_first_head && variant.turn != nullptr) variant.turn(*variant.args, row, position, variant.num_pairs, cos, cos + variant.num_pairs);
  variant.key(*variant.args, row, position, job.head_dim, cos, cos + variant.num_pairs, key);
}

// Keys of columns [begin, end) of the block that starts at key `block` in float: times their scale, then changed by the variant. The rows
// of `prefetch`, if it has any, are fetched on the way, a line each 64 bytes.
template <typename T>
KeyRows<float> ChangeKeys(const TileJob& job, const TileBuffers<T>& b, int kv_head, bool is_first_head, int block, int begin, int end,
                          KeyRows<T> k, KeyRows<T> prefetch) {
  constexpr int kLine = 64 / static_cast<int>(sizeof(T));
  const bool has_keys = job.variant != nullptr && job.variant->key != nullptr;
  const Vec scale = Set1(kIsScaled<T> ? job.k_scale[kv_head * job.k_scale_stride] : 1.f);
  for (int c = begin; c < end; ++c) {
    float* key = b.keys + c * b.q_stride;
    for (int d = 0; d < job.head_dim; d += kWidth) {
      if (prefetch.rows != nullptr && d % kLine == 0) __builtin_prefetch(prefetch[c] + d, 0, 3);
      const Vec x = LoadUpTo(k[c] + d, job.head_dim - d);
      Store(key + d, kIsScaled<T> ? Mul(x, scale) : x);
    }
    if (has_keys) ApplyKey(job, kv_head, is_first_head, block, c, b.turns, key);
    b.key_rows[c] = key;
  }
  return {b.key_rows, 0};
}

template <typename T>
void StoreRow(const float* o, int head_dim, float factor, void* out) {
  const Vec f = Set1(factor);
  for (int d = 0; d < head_dim; d += kWidth) StoreUpTo(static_cast<T*>(out) + d, Mul(Load(o + d), f), head_dim - d);
}

inline constexpr void (*kStoreRow[kNumFloats])(const float*, int, float, void*) = {StoreRow<float>, StoreRow<Half>, StoreRow<BFloat>};

inline void StoreOutputs(const TileJob& job, int o_stride, const HeadState& head) {
  for (int r = 0; r < job.num_rows; ++r) {
    const float sum = ReduceAdd(Load(head.softmax[r].sum));
    const bool is_empty = sum == 0.f;  // no visible key, or none with a score above -inf
    const bool has_hook = job.variant != nullptr && job.variant->output != nullptr;
    float* o = head.o + r * o_stride;
    float factor = is_empty ? 0.f : 1.f / sum;
    if (job.lse_rows != nullptr || has_hook) {
      const float lse = is_empty ? -__builtin_inff() : head.softmax[r].max * 0x1.62e43p-1f + __builtin_logf(sum);
      if (job.lse_rows != nullptr) job.lse_rows[r][head.kv_head * job.lse_head_stride] = lse;
      if (has_hook) {
        StoreRow<float>(o, job.head_dim_vo, factor, o);
        ApplyOutput(*job.variant, head.kv_head, r, lse, job.head_dim_vo, o);
        factor = 1.f;
      }
    }
    const auto store_row = job.is_partial ? StoreRow<float> : kStoreRow[job.q_type];
    store_row(o, job.head_dim_vo, factor, static_cast<char*>(job.o_rows[r]) + head.kv_head * job.o_head_stride);
  }
}

}  // namespace tvm_infer::cpu::TVM_INFER_ISA
