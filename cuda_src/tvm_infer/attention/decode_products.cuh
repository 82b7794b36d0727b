// The matrix products of the decode class, by one warp: 16 query rows against 16 keys on mma.sync, keys and values in the queries' type.
#pragma once

#include <cstdint>

#include "tvm_infer/ptx/mma.cuh"
#include "tvm_infer/tile/swizzle.cuh"

namespace tvm_infer::attention {

template <typename Config>
struct DecodeProducts {
  using Element = typename Config::Element;
  using Weight = Element;  // that weights are rounded to
  using Boxes = typename Config::Boxes;
  using ValueBoxes = typename Config::ValueBoxes;
  static constexpr int kHeadDim = Config::kHeadDim, kWarpKeys = 16, kOwnColumns = Config::kDecodeColumns;

  // A warp's 16 query rows.
  struct Query {
    uint32_t q[kHeadDim / 16][4];
  };

  // Rows behind the work's last repeat it: their results are not used.
  __device__ __forceinline__ static void LoadQuery(Query& query, uint32_t address) {
    using Panels = tile::PageBoxes<Config::kPanelRows, kHeadDim>;
    const uint32_t row = address + tile::SwizzledOffset(Lane() % 16, Lane() / 16);
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) ptx::LoadMatrixX4(query.q[d], Panels::Columns(row, 16 * d));
  }

  // ldmatrix: lane l addresses row l % 8 of 8x8 block l / 8 of 16 columns. K blocks: (keys, columns) = (0, 0) (0, 1) (1, 0) (1, 1); V
  // blocks, transposed while loading: (0, 0) (1, 0) (0, 1) (1, 1). Offsets of the lane's row for the warp's keys, of which `first` is one.
  __device__ __forceinline__ static uint32_t KeyOffset(uint32_t first) {
    const uint32_t block = Lane() / 8;
    return Boxes::Offset(first + Lane() % 8 + block / 2 * 8, block % 2);
  }
  __device__ __forceinline__ static uint32_t ValueOffset(uint32_t first) {
    const uint32_t block = Lane() / 8;
    return ValueBoxes::Offset(first + Lane() % 8 + block % 2 * 8, block / 2);
  }

  // s[0 … 3]: keys 0 … 7 of this warp, s[4 … 7]: keys 8 … 15.
  __device__ __forceinline__ static void Logits(float (&s)[8], const Query& query, uint32_t address) {
    float s0[4] = {0.f, 0.f, 0.f, 0.f}, s1[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      uint32_t k[4];
      ptx::LoadMatrixX4(k, Boxes::Columns(address, 16 * d));
      ptx::Mma16x8x16<Element>(s0, query.q[d], k[0], k[1]);
      ptx::Mma16x8x16<Element>(s1, query.q[d], k[2], k[3]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[i] = s0[i];
      s[4 + i] = s1[i];
    }
  }

  // o += P @ V of the columns from `first_column` on. Keys outside [begin, end) may hold NaN in V, and 0 * NaN is NaN: their values become
  // 0.
  __device__ __forceinline__ static void Values(float (&o)[kOwnColumns / 8][4], const uint32_t (&p)[4], uint32_t address,
                                                int32_t first_column, int32_t begin, int32_t end) {
    uint32_t keep[2] = {0xffffffff, 0xffffffff};
    const bool is_edge = begin > 0 || end < kWarpKeys;
    if (is_edge) KeepKeys(keep, begin, end);
#pragma unroll
    for (int d = 0; d < kOwnColumns / 16; ++d) {
      uint32_t v[4];
      ptx::LoadMatrixX4Transposed(v, ValueBoxes::Columns(address, (kOwnColumns == Config::kHeadDimVo ? 0 : first_column) + 16 * d));
      if (is_edge) {
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] &= keep[i % 2];
      }
      ptx::Mma16x8x16<Element>(o[2 * d], p, v[0], v[1]);
      ptx::Mma16x8x16<Element>(o[2 * d + 1], p, v[2], v[3]);
    }
  }

  // Masks of a lane's two keys of each 8, 16 bits a key.
  __device__ __forceinline__ static void KeepKeys(uint32_t (&keep)[2], int32_t begin, int32_t end) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t k = 8 * i + threadIdx.x % 4 * 2;
      keep[i] = (k >= begin && k < end ? 0xffffu : 0u) | (k + 1 >= begin && k + 1 < end ? 0xffff0000u : 0u);
    }
  }

  // Row g (`half` 0) or g + 8 of O to `row` in shared memory: blocks of 8 columns, block b at b ^ g.
  __device__ __forceinline__ static void StoreRow(float* row, const float (&o)[kOwnColumns / 8][4], int half, int32_t first_block,
                                                  int32_t g, int32_t t) {
#pragma unroll
    for (int j = 0; j < kOwnColumns / 8; ++j) {
      *reinterpret_cast<float2*>(row + (first_block + j ^ g) * 8 + 2 * t) = make_float2(o[j][2 * half], o[j][2 * half + 1]);
    }
  }

 private:
  __device__ __forceinline__ static uint32_t Lane() { return threadIdx.x % 32; }
};

}  // namespace tvm_infer::attention
