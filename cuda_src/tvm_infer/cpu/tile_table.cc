// What a tile costs on one thread of this executor: tests/cpu/measure_tiles.py prints it (docs/cpu.md has a run).
#include "tvm_infer/cpu/attention.h"

namespace tvm_infer::cpu {
namespace {

// One thread of an AMD Zen 5 (AVX-512) at head_dim 128, keys from memory. Up to 64 rows a work runs dot products, above outer products.
// 4: one token of a group of 4; 192: a multiple of the 6 rows of a register tile. Other machines differ in scale more than in proportion,
// and only proportions matter to a plan.
struct Measured {
  int32_t rows;
  int64_t fixed, row, kv;  // picoseconds
};
constexpr int kNumClasses = 6;
constexpr Measured kFloat32[kNumClasses] = {{4, 48'000, 22'000, 46'000},   {8, 48'000, 22'000, 53'000},   {16, 48'000, 23'000, 84'000},
                                            {32, 46'000, 26'000, 130'000}, {64, 44'000, 31'000, 215'000}, {192, 44'000, 31'000, 524'000}};
constexpr Measured kSixteenBit[kNumClasses] = {{4, 54'000, 15'000, 26'000},   {8, 54'000, 18'000, 36'000},
                                               {16, 52'000, 20'000, 60'000},  {32, 50'000, 21'000, 105'000},
                                               {64, 48'000, 24'000, 191'000}, {192, 48'000, 25'000, 477'000}};
// Keys and values of 8 bits cost as much: bytes that are saved are spent on widening (per key of 4 rows 27 ns from bfloat16, 27 from e5m2,
// 31 from e4m3; of 64 rows 188, 180, 184).
// A merge of shared keys takes 0.1 to 0.7 us for 4 and 8 rows. Of such numbers 0.7 and 2 us chose best between the plans with and without
// shared keys of 2 to 64 requests, groups of 1, 4 and 8, both types: 1 % slower than always the faster one (2.7 and 9 us: 5 %).
constexpr SharedMergeCost kSharedMerge = {.each = 700'000, .once = 2'000'000, .again = 1000};
constexpr int32_t kKvGranule = 64;  // cuts between blocks of keys

// Work per key grows with head_dim, but for the softmax, which weighs as much as 16 of it.
struct Scaled {
  TileClass classes[kNumClasses];
  SharedMergeCost shared_merge;
};
Scaled Scale(const Measured (&measured)[kNumClasses], int32_t head_dim) {
  Scaled scaled;
  for (int i = 0; i < kNumClasses; ++i) {
    const Measured& m = measured[i];
    scaled.classes[i] = {m.rows, kKvGranule, m.fixed, m.row * head_dim / 128, m.kv * (head_dim + 16) / 144};
  }
  scaled.shared_merge = {kSharedMerge.each * head_dim / 128, kSharedMerge.once, kSharedMerge.again};
  return scaled;
}

// One table for each multiple of 8 up to 256.
struct Tables {
  Scaled of[2][32];
  Tables() {
    for (int i = 0; i < 32; ++i) {
      of[0][i] = Scale(kFloat32, 8 * (i + 1));
      of[1][i] = Scale(kSixteenBit, 8 * (i + 1));
    }
  }
};

}  // namespace

TileCosts TileTable(DType dtype, DType kv_dtype, int32_t head_dim, int32_t head_dim_vo) {
  static const Tables tables;
  const int32_t width = (head_dim + head_dim_vo) / 2;  // one product is over keys, the other over values
  const int32_t index = width < 8 ? 0 : width > 256 ? 31 : (width + 7) / 8 - 1;
  const Scaled& scaled = tables.of[dtype == DType::kFloat32 && !IsScaled(kv_dtype) ? 0 : 1][index];
  return {scaled.classes, kNumClasses, scaled.shared_merge};
}

}  // namespace tvm_infer::cpu
