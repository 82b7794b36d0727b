#include "tvm_infer/cuda/tile_table.h"

#include "tvm_infer/error.h"

namespace tvm_infer::cuda {
namespace {

// kernels/attention_sm90.cuh on an H200: decode class, prefill class (attention/config_sm90.cuh). A key costs the decode class 15.2 ns of
// one CTA when every SM decodes, less beside prefill, which leaves the bandwidth to it: 13.5 balances both. Of the fixed costs 0.2 to 1 us
// of a decode work were tried: at 0.6 64 requests of 2048 keys are cut best (124.7 us; 127.4 at 1, 126.7 at 0.4), longer ones do not care.
constexpr int32_t kNumSm90Classes = 2;
constexpr TileClass kSm90HeadDim128[kNumSm90Classes] = {{16, 128, 600'000, 10'000, 13'500}, {128, 128, 3'600'000, 0, 14'000}};
// The others relative to that: decode by the bytes of a key, prefill by what 8192 tokens took. Heads of 80 and 96 fill the tiles of 128.
constexpr TileClass kSm90HeadDim64[kNumSm90Classes] = {{16, 128, 600'000, 10'000, 6'900}, {128, 128, 2'800'000, 0, 11'000}};
constexpr TileClass kSm90HeadDim192[kNumSm90Classes] = {{16, 64, 800'000, 15'000, 20'000}, {128, 64, 5'000'000, 0, 22'000}};
constexpr TileClass kSm90HeadDim256[kNumSm90Classes] = {{16, 64, 900'000, 20'000, 27'000}, {128, 64, 6'000'000, 0, 27'500}};
// Keys wider than values: what lies between 128 and 192 by bytes and by products, not measured yet.
constexpr TileClass kSm90HeadDim192Vo128[kNumSm90Classes] = {{16, 64, 700'000, 12'500, 16'900}, {128, 64, 4'300'000, 0, 18'500}};

// Keys and values of 8 bits: half the bytes; prefill by what 8192 tokens took on an H100 beside 16 bits (head_dim 64, 96, 128, 192,
// 256: 1.22, 1.11, 1.19, 1.31 and 1.25 times as long), and 16 x 512, 1.41 times, a third warpgroup coming in between. Heads of 80 are
// copied as 96.
constexpr TileClass kSm90EightBits64[kNumSm90Classes] = {{16, 128, 600'000, 10'000, 4'000}, {128, 128, 4'400'000, 0, 13'400}};
constexpr TileClass kSm90EightBits96[kNumSm90Classes] = {{16, 128, 600'000, 10'000, 6'200}, {128, 128, 5'600'000, 0, 15'600}};
constexpr TileClass kSm90EightBits128[kNumSm90Classes] = {{16, 128, 600'000, 10'000, 7'425}, {128, 128, 5'600'000, 0, 16'700}};
constexpr TileClass kSm90EightBits192[kNumSm90Classes] = {{16, 64, 800'000, 15'000, 12'700}, {128, 64, 7'600'000, 0, 28'900}};
constexpr TileClass kSm90EightBits256[kNumSm90Classes] = {{16, 64, 900'000, 20'000, 18'000}, {128, 64, 9'000'000, 0, 34'400}};

// Of 4 bits, for which there are no kernels yet: decode by the bytes of a key, half of those of 8 bits; prefill widens as many elements.
constexpr TileClass HalfTheBytes(TileClass decode) {
  decode.kv /= 2;
  return decode;
}
constexpr TileClass kSm90FourBits64[kNumSm90Classes] = {HalfTheBytes(kSm90EightBits64[0]), kSm90EightBits64[1]};
constexpr TileClass kSm90FourBits96[kNumSm90Classes] = {HalfTheBytes(kSm90EightBits96[0]), kSm90EightBits96[1]};
constexpr TileClass kSm90FourBits128[kNumSm90Classes] = {HalfTheBytes(kSm90EightBits128[0]), kSm90EightBits128[1]};
constexpr TileClass kSm90FourBits192[kNumSm90Classes] = {HalfTheBytes(kSm90EightBits192[0]), kSm90EightBits192[1]};
constexpr TileClass kSm90FourBits256[kNumSm90Classes] = {HalfTheBytes(kSm90EightBits256[0]), kSm90EightBits256[1]};
// Merges of shared keys, which all CTAs of a tile share out (kernels/merge_tiles.cuh). Over the makespan and the 4.2 us of any launch, on
// an H100 or H200: 64 requests of 8192 + 256 keys 6 us, 32 of 2048 + 256 and 16 of 2048 + 128 6.5 to 7. With this 8 requests of 2048 + 256
// keys and 16 of 1024 + 256, where sharing gains nothing, are planned flat. Measured with heads of 128 in 16 bits, and taken for all. Read
// again, a key costs 0.6 of what it does from memory: 64 requests of 8192 + 256 keys without sharing, 442 us by the costs above, take 260,
// 32 of 2048 + 256 42.8 for 63, 16 of them 22.7 for 31.7.
constexpr SharedMergeCost kSm90SharedMerge = {.each = 800'000, .once = 6'000'000, .again = 600};

struct Row {
  int32_t head_dim, head_dim_vo;
  const TileClass* classes;
  int32_t count;
};
constexpr Row kRows[] = {{64, 64, kSm90HeadDim64, kNumSm90Classes},        {80, 80, kSm90HeadDim128, kNumSm90Classes},
                         {96, 96, kSm90HeadDim128, kNumSm90Classes},       {128, 128, kSm90HeadDim128, kNumSm90Classes},
                         {192, 192, kSm90HeadDim192, kNumSm90Classes},     {256, 256, kSm90HeadDim256, kNumSm90Classes},
                         {192, 128, kSm90HeadDim192Vo128, kNumSm90Classes}};

constexpr Row kEightBitRows[] = {{64, 64, kSm90EightBits64, kNumSm90Classes},    {80, 80, kSm90EightBits96, kNumSm90Classes},
                                 {96, 96, kSm90EightBits96, kNumSm90Classes},    {128, 128, kSm90EightBits128, kNumSm90Classes},
                                 {192, 192, kSm90EightBits192, kNumSm90Classes}, {256, 256, kSm90EightBits256, kNumSm90Classes}};
constexpr Row kFourBitRows[] = {{64, 64, kSm90FourBits64, kNumSm90Classes},    {80, 80, kSm90FourBits96, kNumSm90Classes},
                                {96, 96, kSm90FourBits96, kNumSm90Classes},    {128, 128, kSm90FourBits128, kNumSm90Classes},
                                {192, 192, kSm90FourBits192, kNumSm90Classes}, {256, 256, kSm90FourBits256, kNumSm90Classes}};

template <int kCount>
const Row* FindRow(const Row (&rows)[kCount], int32_t head_dim, int32_t head_dim_vo) {
  for (const Row& row : rows) {
    if (row.head_dim == head_dim && row.head_dim_vo == head_dim_vo) return &row;
  }
  return nullptr;
}
const Row* FindRow(DTypeTag kv_dtype, int32_t head_dim, int32_t head_dim_vo) {
  switch (ElementBits(kv_dtype)) {
    case 4:
      return FindRow(kFourBitRows, head_dim, head_dim_vo);
    case 8:
      return FindRow(kEightBitRows, head_dim, head_dim_vo);
    default:
      return FindRow(kRows, head_dim, head_dim_vo);
  }
}

}  // namespace

void CheckKernelShape(DTypeTag dtype, DTypeTag kv_dtype, int32_t head_dim, int32_t head_dim_vo, const char* name) {
  if (dtype == DTypeTag::kFloat32) {
    TVM_INFER_THROW(ExecutorError) << "argument `" << name
                                   << "` has dtype float32; the cuda executor has kernels for float16 and bfloat16. "
                                   << "Cast it, or pass host tensors (the cpu executor takes float32)";
  }
  if (FindRow(kv_dtype, head_dim, head_dim_vo) != nullptr) return;
  // 8-bit heads have the same widths, but not the pair.
  const bool is_scaled = IsScaled(kv_dtype);
  ErrorStream error("ExecutorError");
  error.stream() << "argument `" << name << "` has head_dim " << head_dim;
  if (head_dim != head_dim_vo) error.stream() << " beside a head_dim_vo of " << head_dim_vo;
  if (is_scaled) error.stream() << " with " << ElementBits(kv_dtype) << "-bit keys and values (" << Suffix(kv_dtype) << ")";
  error.stream()
      << "; the cuda executor has kernels for 64, 80, 96, 128, 192 and 256, the same for keys and values"
      << (is_scaled ? "" : ", and for 192 with a head_dim_vo of 128")
      << ". Pad the heads with zeros (and keep sm_scale that of the unpadded width), or pass host tensors (the cpu executor takes "
      << (head_dim != head_dim_vo ? "any head_dim_vo up to head_dim)" : "every multiple of 8 up to 256)");
}

TileCosts TileTable(DTypeTag dtype, DTypeTag kv_dtype, int32_t head_dim, int32_t head_dim_vo) {
  CheckKernelShape(dtype, kv_dtype, head_dim, head_dim_vo, "head_dim");
  const Row* row = FindRow(kv_dtype, head_dim, head_dim_vo);
  return {row->classes, row->count, kSm90SharedMerge};
}

}  // namespace tvm_infer::cuda
