// Where results go: final rows (16-bit O, LSE by token and head) or fp32 partial rows.
#pragma once

#include <cstdint>

#include "tvm_infer/attention/params.cuh"
#include "tvm_infer/attention/rows.cuh"
#include "tvm_infer/ptx/element.cuh"

namespace tvm_infer::attention {

// Row `row` of KV head number `h` of a work.
struct OutputRow {
  void* o;     // Element* of a final row, float* of a partial one
  float* lse;  // may be null
};

template <typename Element>
__device__ __forceinline__ OutputRow FinalRow(const AttentionParams& p, const PlanView& plan, int32_t packed_row, int32_t kv_head) {
  const RowAddress at = AddressOf(plan, packed_row);
  const int32_t group = plan.header->group_size, head = kv_head * group + at.head;
  auto* o = static_cast<Element*>(p.o) + at.token * p.o_stride_token + head * p.o_stride_head;
  return {o, p.lse == nullptr ? nullptr : p.lse + static_cast<int64_t>(at.token) * (plan.header->num_kv_heads * group) + head};
}

template <int kHeadDim>
__device__ __forceinline__ OutputRow PartialRow(const AttentionParams& p, int64_t partial_row) {
  return {p.partial_o + partial_row * kHeadDim, p.partial_lse + partial_row};
}

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

// A warp's accumulator (rows g and g + 8 of 16, see ptx/wgmma.cuh) as final 16-bit rows: lanes of a quad exchange column pairs, so that
// each stores 16 bytes and a quad 64 contiguous ones. rows[i].o == nullptr: the row is not stored.
template <typename Element, int kCount>
__device__ __forceinline__ void StoreFinalFragment(const OutputRow (&rows)[2], const float (&o)[kCount], const float (&factor)[2]) {
  const int32_t t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < kCount / 4; j += 4) {
      uint32_t w[4];  // column pair t of blocks j … j + 3
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        w[b] = ptx::Pack<Element>(o[4 * (j + b) + 2 * i] * factor[i], o[4 * (j + b) + 2 * i + 1] * factor[i]);
      }
      // Transpose of 4 lanes x 4 words: first across lane bit 0, then bit 1.
#pragma unroll
      for (int bit = 1; bit <= 2; bit *= 2) {
        const bool is_high = (t & bit) != 0;
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          if (b & bit) continue;
          const uint32_t received = __shfl_xor_sync(0xffffffff, is_high ? w[b] : w[b | bit], bit);
          w[b] = is_high ? received : w[b];
          w[b | bit] = is_high ? w[b | bit] : received;
        }
      }
      if (rows[i].o != nullptr) {
        *reinterpret_cast<uint4*>(static_cast<Element*>(rows[i].o) + 8 * (j + t)) = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
  }
}

}  // namespace tvm_infer::attention
