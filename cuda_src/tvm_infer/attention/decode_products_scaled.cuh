// The same for keys and values of 8 bits, which one instruction makes two float16 of: exact, and in that type both products run.
//
// Columns change places so that nothing has to be shuffled tile by tile. A register of ldmatrix holds four neighbouring columns of a key:
// they become the columns of product that a lane has, 2t, 2t + 1, 2t + 8 and 2t + 9, and those of queries are put there once a head.
// Transposed, it holds two columns of two keys: the even ones of 16 make one product, the odd ones the next.
#pragma once

#include <cstdint>

#include "tvm_infer/attention/decode_products.cuh"
#include "tvm_infer/attention/half_queries.cuh"
#include "tvm_infer/ptx/load_store.cuh"

namespace tvm_infer::attention {

template <typename Config>
struct ScaledDecodeProducts {
  using Element = typename Config::Element;
  using KvElement = typename Config::KvElement;
  using Weight = ptx::Fp16;
  using Boxes = typename Config::Boxes;
  static constexpr int kHeadDim = Config::kHeadDim, kWarpKeys = 16, kOwnColumns = Config::kDecodeColumns;

  using Plain = DecodeProducts<Config>;
  struct Query {
    typename Plain::Query rows;
    float unscale[2];  // factors on the logits of rows g and g + 8
  };

  // Rows 2 * warp and 2 * warp + 1 of the 16 at `address` to float16, in place, their columns where the products want them; `unscale`:
  // what each row's logits are to be multiplied by. All warps together, before LoadQuery, and a barrier between.
  __device__ __forceinline__ static void PrepareQuery(uint32_t address, float* unscale, uint32_t warp) {
    constexpr uint32_t kChunks = kHeadDim / 8;                                       // 16 bytes a lane, of which there may be more
    constexpr uint32_t kLanes = kChunks <= 16 ? 16 : 32, kRowsAtOnce = 32 / kLanes;  // at most a warp's two rows
#pragma unroll
    for (uint32_t i = 0; i < 2; i += kRowsAtOnce) {
      const uint32_t row = 2 * warp + i + Lane() / kLanes, chunk = Lane() % kLanes;
      const bool has_chunk = kChunks == kLanes || chunk < kChunks;
      const uint32_t at = address + chunk / 8 * Config::kPanelRows * tile::kPanelRowBytes + tile::SwizzledOffset(row, chunk % 8);
      const uint4 words = has_chunk ? ptx::LoadShared16(at) : uint4{};
      uint32_t x[4] = {words.x, words.y, words.z, words.w};
      const float factor = Element::kIsBf16 ? ToHalf(x, kLanes) : 1.f;
      // Of 16 columns, two lanes': the first keeps pairs 0, 2, 4, 6 and the second 1, 3, 5, 7.
      const bool second = chunk % 2 != 0;
      const uint32_t theirs[2] = {__shfl_xor_sync(0xffffffff, second ? x[0] : x[1], 1),
                                  __shfl_xor_sync(0xffffffff, second ? x[2] : x[3], 1)};
      if (has_chunk) {
        ptx::StoreShared16(at, second ? make_uint4(theirs[0], theirs[1], x[1], x[3]) : make_uint4(x[0], x[2], theirs[0], theirs[1]));
      }
      if (chunk == 0) unscale[row] = factor;
    }
  }

  __device__ __forceinline__ static void LoadQuery(Query& query, uint32_t address, const float* unscale, float key_scale) {
    Plain::LoadQuery(query.rows, address);
#pragma unroll
    for (int i = 0; i < 2; ++i) query.unscale[i] = unscale[Lane() / 4 + 8 * i] * key_scale;
  }

  __device__ __forceinline__ static uint32_t KeyOffset(uint32_t first) { return Plain::KeyOffset(first); }
  __device__ __forceinline__ static uint32_t ValueOffset(uint32_t first) { return Plain::ValueOffset(first); }

  __device__ __forceinline__ static void Logits(float (&s)[8], const Query& query, uint32_t address) {
    float s0[4] = {0.f, 0.f, 0.f, 0.f}, s1[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int d = 0; d < (kHeadDim + 31) / 32; ++d) {
      uint32_t k[4];  // 16 columns of keys 0 … 7, the next 16, the same of keys 8 … 15
      ptx::LoadMatrixX4(k, Boxes::Columns(address, 16 * d));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (32 * d + 16 * i >= kHeadDim) break;  // of 80 columns the last 16 are alone
        uint32_t b[2];
        const uint32_t(&q)[4] = query.rows.q[2 * d + i];
        KvElement::ToHalves(k[i], b[0], b[1]);
        ptx::Mma16x8x16<ptx::Fp16>(s0, q, b[0], b[1]);
        KvElement::ToHalves(k[2 + i], b[0], b[1]);
        ptx::Mma16x8x16<ptx::Fp16>(s1, q, b[0], b[1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[i] = s0[i] * query.unscale[i / 2];
      s[4 + i] = s1[i] * query.unscale[i / 2];
    }
  }

  // o[2 * d]: columns 0, 2, … of 16; o[2 * d + 1]: 1, 3, …
  __device__ __forceinline__ static void Values(float (&o)[kOwnColumns / 8][4], const uint32_t (&p)[4], uint32_t address,
                                                int32_t first_column, int32_t begin, int32_t end) {
    uint32_t keep[2] = {0xffffffff, 0xffffffff};
    const bool is_edge = begin > 0 || end < kWarpKeys;
    if (is_edge) Plain::KeepKeys(keep, begin, end);
#pragma unroll
    for (int d = 0; d < (kOwnColumns + 31) / 32; ++d) {
      uint32_t v[4];  // 16 columns of keys 0 … 7, of keys 8 … 15, then the next 16
      ptx::LoadMatrixX4Transposed(v, Boxes::Columns(address, (kOwnColumns == kHeadDim ? 0 : first_column / 2) + 16 * d));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (32 * d + 16 * i >= kOwnColumns) break;
        uint32_t even[2], odd[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t& x = v[2 * i + half];
          if (is_edge) x &= keep[half];
          KvElement::ToHalves(__byte_perm(x, 0, 0x3120), even[half], odd[half]);
        }
        ptx::Mma16x8x16<ptx::Fp16>(o[4 * d + 2 * i], p, even[0], even[1]);
        ptx::Mma16x8x16<ptx::Fp16>(o[4 * d + 2 * i + 1], p, odd[0], odd[1]);
      }
    }
  }

  // As DecodeProducts::StoreRow: four neighbours a lane.
  __device__ __forceinline__ static void StoreRow(float* row, const float (&o)[kOwnColumns / 8][4], int half, int32_t first_block,
                                                  int32_t g, int32_t t) {
#pragma unroll
    for (int d = 0; d < kOwnColumns / 16; ++d) {
      const float(&even)[4] = o[2 * d];
      const float(&odd)[4] = o[2 * d + 1];
      *reinterpret_cast<float4*>(row + (first_block + 2 * d + t / 2 ^ g) * 8 + t % 2 * 4) =
          make_float4(even[2 * half], odd[2 * half], even[2 * half + 1], odd[2 * half + 1]);
    }
  }

 private:
  __device__ __forceinline__ static uint32_t Lane() { return threadIdx.x % 32; }
};

}  // namespace tvm_infer::attention
