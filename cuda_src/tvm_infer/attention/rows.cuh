// Packed rows of a work: which token and query head a row is, and which keys it sees.
#pragma once

#include <cstdint>

#include "tvm_infer/ptx/load_store.cuh"
#include "tvm_infer/schedule/plan.h"

namespace tvm_infer::attention {

// A Work by three 16-byte loads.
__device__ __forceinline__ Work LoadWork(const Work* works, int32_t index) {
  union {
    int4 words[3];
    Work work;
  } u;
  const int4* source = reinterpret_cast<const int4*>(works + index);
#pragma unroll
  for (int i = 0; i < 3; ++i) u.words[i] = __ldg(source + i);
  return u.work;
}

// The same, of what a kernel ahead may have written: it stays behind the wait for that kernel. NOTE: a load by __ldg does not, since
// whoever compiles takes its memory for constant.
__device__ __forceinline__ Work LoadWorkInOrder(const Work* works, int32_t index) {
  union {
    int4 words[3];
    Work work;
  } u;
  const int4* source = reinterpret_cast<const int4*>(works + index);
#pragma unroll
  for (int i = 0; i < 3; ++i) u.words[i] = ptx::LoadInOrder(source + i);
  return u.work;
}

// Works of a CTA that has any.
struct WorkQueue {
  const Work* works;
  int32_t begin;
  int32_t end;

  __device__ __forceinline__ WorkQueue(const PlanView& plan, int32_t cta) : works(plan.works()) {
    const int32_t* indptr = plan.work_indptr();
    // NOTE: equal in all lanes, and said so: the compiler keeps them in uniform registers.
    begin = __shfl_sync(0xffffffff, __ldg(indptr + cta), 0);
    end = __shfl_sync(0xffffffff, __ldg(indptr + cta + 1), 0);
  }
};

// The same, one work after the other, by a whole warp. The next is on its way while one runs: lane i holds word i of it, a register where
// a Work takes twelve.
struct WorkStream {
  Work work;

  __device__ __forceinline__ WorkStream(const PlanView& plan, int32_t cta, const Work& first) : work(first) {
    // NOTE: nothing of this is needed before Prefetch, and nothing before it waits for these loads.
    const int32_t* indptr = plan.work_indptr();
    index_ = __ldg(indptr + cta);
    end_ = __ldg(indptr + cta + 1);
    works_ = reinterpret_cast<const int32_t*>(plan.works());
  }
  __device__ __forceinline__ void Prefetch() {
    const int32_t lane = threadIdx.x % 32;
    if (++index_ < end_ && lane < kWords) next_ = __ldg(works_ + index_ * kWords + lane);
  }
  // After Prefetch. False: that was the last.
  __device__ __forceinline__ bool Next() {
    if (index_ >= end_) return false;
    int32_t words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __shfl_sync(0xffffffff, next_, i);
    __builtin_memcpy(&work, words, sizeof(Work));
    return true;
  }

 private:
  static constexpr int kWords = sizeof(Work) / 4;
  const int32_t* works_;
  int32_t index_;
  int32_t end_;
  int32_t next_ = 0;
};

struct RowAddress {
  int32_t token;
  int32_t head;  // query head within its group
};

// `group`: the plan's group_size.
__device__ __forceinline__ RowAddress AddressOf(const PlanView& plan, int32_t packed_row, int32_t group) {
  const int32_t slot = packed_row / group;
  const int32_t* order = plan.token_order();
  return {order == nullptr ? slot : order[slot], packed_row - slot * group};
}

// Keys [begin, end) of the work's list that row `row` (0 … num_rows - 1) sees. Later rows never begin or end earlier.
struct KeyRange {
  int32_t begin;
  int32_t end;
};

// Tokens after a work's first that its rows belong to, without a division each: rows are few (at most 128 and the group), so that the
// quotient in floating point is right, half a unit away from the next integer.
class TokenOfRow {
 public:
  __device__ __forceinline__ TokenOfRow(const Work& work, int32_t group)
      : first_head_(static_cast<float>(work.row_begin % group) + 0.5f), per_group_(1.f / static_cast<float>(group)) {}
  __device__ __forceinline__ int32_t operator()(int32_t row) const {
    return __float2int_rd((static_cast<float>(row) + first_head_) * per_group_);
  }

 private:
  float first_head_;
  float per_group_;
};

__device__ __forceinline__ KeyRange VisibleKeys(const Work& work, Band band, const TokenOfRow& token, int32_t row) {
  const int32_t position = work.qo_pos_base + token(row);
  KeyRange keys{work.kv_begin, work.kv_end};
  if (band.left != kUnbounded) keys.begin = max(keys.begin, position - band.left);
  if (band.right != kUnbounded) keys.end = min(keys.end, position + band.right + 1);
  return keys;
}

// Tiles of kTileKeys keys that a work visits, from a multiple of kAlign (pages are copied whole) on: the first holds kv_begin.
template <int kAlign, int kTileKeys>
struct KeyTiles {
  int32_t base;   // first key of the first tile
  int32_t count;  // 0 for a work without keys

  __device__ __forceinline__ explicit KeyTiles(const Work& work)
      : base(work.kv_begin / kAlign * kAlign), count(work.kv_end > work.kv_begin ? (work.kv_end - base + kTileKeys - 1) / kTileKeys : 0) {}
};

}  // namespace tvm_infer::attention
