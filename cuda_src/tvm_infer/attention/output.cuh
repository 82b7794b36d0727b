// Where results go: final rows (16-bit O, LSE by token and head) or fp32 partial rows.
#pragma once

#include <cstdint>

#include "tvm_infer/attention/params.cuh"
#include "tvm_infer/attention/rows.cuh"
#include "tvm_infer/ptx/element.cuh"
#include "tvm_infer/ptx/load_store.cuh"
#include "tvm_infer/ptx/mma.cuh"
#include "tvm_infer/tile/swizzle.cuh"

namespace tvm_infer::attention {

// Row `row` of KV head number `h` of a work.
struct OutputRow {
  void* o;     // Element* of a final row, float* of a partial one
  float* lse;  // may be null
};

template <typename Element>
__device__ __forceinline__ OutputRow FinalRow(const AttentionParams& p, const PlanView& plan, int32_t packed_row, int32_t kv_head) {
  const RowAddress at = AddressOf(plan, packed_row, p.expected.group_size);
  const int32_t group = p.expected.group_size, head = kv_head * group + at.head;
  auto* o = static_cast<Element*>(p.o) + at.token * p.o_stride_token + head * p.o_stride_head;
  return {o, p.lse == nullptr ? nullptr : p.lse + static_cast<int64_t>(at.token) * (p.expected.num_kv_heads * group) + head};
}

template <int kHeadDimVo>
__device__ __forceinline__ OutputRow PartialRow(const AttentionParams& p, int64_t partial_row) {
  return {p.partial_o + partial_row * kHeadDimVo, p.partial_lse + partial_row};
}

// A lane's columns of a row that kLanes lanes share out: kPieces times kVector neighbours.
template <int kHeadDimVo, int kLanes = 32>
struct LaneColumns {
  static constexpr int kVector = kHeadDimVo % (4 * kLanes) == 0 ? 4 : 2;
  static constexpr int kPieces = (kHeadDimVo + kLanes * kVector - 1) / (kLanes * kVector);
  static constexpr int kCount = kVector * kPieces;
  static constexpr bool kIsWhole = kHeadDimVo % (kLanes * kVector) == 0;  // every lane has all its pieces

  __device__ __forceinline__ static int32_t First(int32_t lane, int piece) { return (piece * kLanes + lane) * kVector; }
  __device__ __forceinline__ static bool Has(int32_t lane, int piece) { return kIsWhole || First(lane, piece) < kHeadDimVo; }
};

// Columns [column, column + kCount) of a row of fp32 values, converted if the row is final.
template <typename Element, int kCount>
__device__ __forceinline__ void StoreColumns(const OutputRow& row, bool is_final, int32_t column, const float (&x)[kCount]) {
  static_assert(kCount == 2 || kCount == 4, "8 or 16 bytes of fp32");
  if (is_final) {
    uint32_t* out = reinterpret_cast<uint32_t*>(static_cast<Element*>(row.o) + column);
    if constexpr (kCount == 4) {
      *reinterpret_cast<uint2*>(out) = make_uint2(ptx::Pack<Element>(x[0], x[1]), ptx::Pack<Element>(x[2], x[3]));
    } else {
      *out = ptx::Pack<Element>(x[0], x[1]);
    }
  } else {
    float* out = static_cast<float*>(row.o) + column;
    if constexpr (kCount == 4) {
      *reinterpret_cast<float4*>(out) = make_float4(x[0], x[1], x[2], x[3]);
    } else {
      *reinterpret_cast<float2*>(out) = make_float2(x[0], x[1]);
    }
  }
}

// A warp's accumulator (16 rows, see ptx/wgmma.cuh) as 16-bit rows in shared memory: panels of `kPanelRows` rows, of which `staging` is
// the first of the warp's. `lane` as an argument: see Consumer::ThreadAnew.
template <typename Element, int kHeadDimVo, int kPanelRows>
__device__ __forceinline__ void StageRows(uint32_t lane, uint32_t staging, const float (&o)[kHeadDimVo / 2], const float (&factor)[2]) {
  const uint32_t row = lane % 16, chunk = lane / 16;
#pragma unroll
  for (int j = 0; j < kHeadDimVo / 8; j += 2) {
    uint32_t w[4];  // 8 x 8 blocks: rows g, rows g + 8 of columns 8j …, then of the next 8
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int at = 4 * (j + m / 2) + 2 * (m % 2);
      w[m] = ptx::Pack<Element>(o[at] * factor[m % 2], o[at + 1] * factor[m % 2]);
    }
    ptx::StoreMatrixX4(staging + j / 8 * kPanelRows * tile::kPanelRowBytes + tile::SwizzledOffset(row, j % 8 + chunk), w);
  }
}

// Staged rows, 8 or 16, in registers, 16 bytes a lane, on their way to where `rows` says (see SharedMemory::scratch).
template <int kHeadDimVo, int kPanelRows>
struct StagedRows {
  static constexpr int kChunks = kHeadDimVo / 8, kLanes = kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : 32;  // of a row
  static constexpr int kRowsAtOnce = 32 / kLanes, kSteps = 4;                                          // 1, 2 or 4 rows at once
  static constexpr int kRowsHeld = kSteps * kRowsAtOnce;
  uint4 data[kSteps];
  uint32_t offset[kSteps];

  __device__ __forceinline__ StagedRows(uint32_t lane, uint32_t staging, uint32_t rows, int32_t first) {
    const uint32_t chunk = min(lane % kLanes, kChunks - 1u);  // lanes without one read another's: there may be no memory behind the rows
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const uint32_t row = first + i * kRowsAtOnce + lane / kLanes;
      offset[i] = ptx::LoadShared4(rows + row * 8);
      data[i] = ptx::LoadShared16(staging + chunk / 8 * kPanelRows * tile::kPanelRowBytes + tile::SwizzledOffset(row, chunk % 8));
    }
  }
  // The first `num_rows` of them.
  __device__ __forceinline__ void Store(int32_t lane, void* o, int32_t first, int32_t num_rows) const {
    char* column = static_cast<char*>(o) + lane % kLanes * 16;
    const int32_t rows = kChunks == kLanes || lane % kLanes < kChunks ? num_rows : 0;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      ptx::StoreGlobal16(column + static_cast<uint64_t>(offset[i]) * 16, data[i], first + i * kRowsAtOnce + lane / kLanes < rows);
    }
  }
};

}  // namespace tvm_infer::attention
