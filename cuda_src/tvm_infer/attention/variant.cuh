// The holes that a variant's generated code is put into (variant/variant.h): logits and mask of a tile, elements of final rows.
#pragma once

#include <concepts>
#include <cstdint>
#include <type_traits>

#include "tvm_infer/attention/params.cuh"
#include "tvm_infer/attention/rows.cuh"
#include "tvm_infer/attention/softmax.cuh"
#include "tvm_infer/variant/variant.h"

namespace tvm_infer::attention {

// Attention as it is: the holes are empty, and nothing of this file is left in the kernel.
struct NoVariant : variant::Defaults {
  static constexpr bool kHasLogits = false, kHasMask = false, kHasOutput = false;
};

template <typename V>
concept VariantConcept = requires {
  { V::kHasLogits } -> std::convertible_to<bool>;
  { V::kHasMask } -> std::convertible_to<bool>;
  { V::kHasOutput } -> std::convertible_to<bool>;
  { V::kHasSoftmax } -> std::convertible_to<bool>;
};

// Whether queries, and keys, are changed in shared memory (change_rows.cuh).
template <typename Variant>
inline constexpr bool kChangesQueries = Variant::kHasQuery || Variant::kHasRate;
template <typename Variant>
inline constexpr bool kChangesKeys = Variant::kHasKey || Variant::kHasRate;

// Whether rows of works of shared keys, which are of several requests, are to be told apart.
template <typename Variant>
inline constexpr bool kLooksUpRequests = Variant::kTakesSharedKeys && Variant::kReadsPosition;

// A row's state over its keys so far, and what becomes of it at the end.
template <typename Variant>
using SoftmaxState = std::conditional_t<Variant::kHasSoftmax, OnlineSoftmax, PlainWeights>;
template <typename Variant>
__device__ __forceinline__ float Normaliser(float sum) {
  return Variant::kHasSoftmax ? InverseSum(sum) : 1.f;
}
template <typename Variant>
__device__ __forceinline__ float StateLse(float max, float sum, float scale_log2) {
  if (!Variant::kHasSoftmax) return sum == 0.f ? kNegInf : 0.f;
  return LogSumExp(max, sum, scale_log2);
}

// What the softmax multiplies logits by: a variant's are in natural units, q . k lacks its scale.
template <typename Variant>
__device__ __forceinline__ float SoftmaxScale(const AttentionParams& p) {
  constexpr float kLog2E = 1.4426950408889634f;
  return Variant::kHasLogits ? kLog2E : p.sm_scale_log2;
}

// The variant's row of a packed row whose request is not known: of merged partials, and of works of several requests.
__device__ __forceinline__ variant::Row VariantRowOf(const PlanView& plan, int32_t packed_row, int32_t kv_head) {
  const RowAddress at = AddressOf(plan, packed_row, plan.header->group_size);
  const int32_t* qo_indptr = plan.qo_indptr();
  int32_t low = 0, high = plan.header->num_requests - 1;  // the last request whose first token is not behind the row's
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (__ldg(qo_indptr + middle) <= at.token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int32_t begin = __ldg(qo_indptr + low), end = __ldg(qo_indptr + low + 1), kv_len = __ldg(plan.kv_len() + low);
  return {low, kv_head * plan.header->group_size + at.head, kv_head, kv_len - (end - at.token), end - begin, kv_len};
}

// A thread's two rows of a work, `row` and `row` + 8. What the variant does not ask for is never loaded.
struct VariantRows {
  variant::Row rows[2];

  // For the first of the work's KV heads. Rows behind the last repeat it, so that tables are read where they have entries.
  template <typename Variant>
  __device__ __forceinline__ void Enter(const PlanView& plan, const Work& work, int32_t group, int32_t row) {
    if constexpr (kLooksUpRequests<Variant>) {
      if (work.merge_tiles > 0) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          rows[i] = VariantRowOf(plan, work.row_begin + min(row + 8 * i, work.num_rows - 1), work.kv_head_begin);
        }
        return;
      }
    }
    const TokenOfRow token(work, group);
    // All rows are of the request whose list the work reads; or of several, which are the same to the variant.
    const int32_t batch = work.kv_list, first_head = work.row_begin % group;
    const int32_t q_len = __ldg(plan.qo_indptr() + batch + 1) - __ldg(plan.qo_indptr() + batch), kv_len = __ldg(plan.kv_len() + batch);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t own = min(row + 8 * i, work.num_rows - 1), of_token = token(own);
      rows[i] = {
          batch, work.kv_head_begin * group + first_head + own - of_token * group, work.kv_head_begin, work.qo_pos_base + of_token, q_len,
          kv_len};
    }
  }
  __device__ __forceinline__ void NextHead(int32_t group) {
#pragma unroll
    for (int i = 0; i < 2; ++i) ++rows[i].kv_head, rows[i].qo_head += group;
  }
};

// The last key of both rows: keys that requests share lie before it.
template <typename Variant>
__device__ __forceinline__ int32_t LastKey(const VariantRows& at) {
  return (kLooksUpRequests<Variant> ? min(at.rows[0].kv_len, at.rows[1].kv_len) : at.rows[0].kv_len) - 1;
}

// Positions behind the last key are taken for it where the variant reads tables by position. Their logits are masked afterwards.
template <typename Variant>
__device__ __forceinline__ int32_t Position(int32_t kv_pos, int32_t last) {
  return Variant::kReadsByKey ? min(kv_pos, last) : kv_pos;
}

// Logits of a tile whose column 0 is the key at position `kv_pos`, in the layout of MaskLogits. `sm_scale`: of each row, and what else its
// products lack.
template <typename Variant, int kCount>
__device__ __forceinline__ void ApplyLogits(float (&s)[kCount], const variant::Args& args, const VariantRows& at, int32_t kv_pos,
                                            const float (&sm_scale)[2]) {
  const int32_t first = kv_pos + static_cast<int32_t>(threadIdx.x % 4) * 2, last = LastKey<Variant>(at);
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[4 * j + 2 * i + e];
        x = Variant::Logits(args, at.rows[i], Position<Variant>(first + 8 * j + e, last), x, sm_scale[i]);
      }
    }
    asm volatile("" ::: "memory");  // NOTE: else a variant's table lookups for all logits go first, and registers run out
  }
}

// The same for the mask. Most tiles of most masks are seen whole, which the variant may know from their first and last key.
//
// NOTE: a rolled loop that collects bits, and then the logits: a mask evaluated for all logits at once would take more registers than there
// are (table lookups, divisions).
template <typename Variant, int kCount>
__device__ __forceinline__ void ApplyMask(float (&s)[kCount], const variant::Args& args, const VariantRows& at, int32_t kv_pos) {
  constexpr int kColumns = kCount / 2;  // of a thread in a row
  static_assert(kColumns <= 32);
  const int32_t last = LastKey<Variant>(at);
  const bool sees_all = Variant::SeesAll(args, at.rows[0], kv_pos, min(kv_pos + 4 * kColumns - 1, last)) &&
                        Variant::SeesAll(args, at.rows[1], kv_pos, min(kv_pos + 4 * kColumns - 1, last));
  if (__all_sync(0xffffffff, sees_all)) return;
  const int32_t first = kv_pos + static_cast<int32_t>(threadIdx.x % 4) * 2;
  uint32_t seen[2] = {0, 0};  // bit 2 * j + e
#pragma unroll 1
  for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool sees = Variant::Mask(args, at.rows[i], Position<Variant>(first + 8 * j + e, last));
        seen[i] |= static_cast<uint32_t>(sees) << (2 * j + e);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[4 * j + 2 * i + e];
        x = (seen[i] >> (2 * j + e) & 1) != 0 ? x : kNegInf;
      }
    }
  }
}

template <typename Variant, int kCount>
__device__ __forceinline__ void ApplyVariant(float (&s)[kCount], const variant::Args& args, const VariantRows& at, int32_t kv_pos,
                                             const float (&sm_scale)[2]) {
  if constexpr (Variant::kHasLogits) ApplyLogits<Variant>(s, args, at, kv_pos, sm_scale);
  if constexpr (Variant::kHasMask) ApplyMask<Variant>(s, args, at, kv_pos);
}

// Elements of a final row; a row without keys stays 0.
template <typename Variant, int kCount>
__device__ __forceinline__ void ApplyOutput(float (&o)[kCount], const variant::Args& args, const variant::Row& row, float lse) {
  if (lse == kNegInf) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) o[i] = Variant::Output(args, row, lse, o[i]);
}

}  // namespace tvm_infer::attention
