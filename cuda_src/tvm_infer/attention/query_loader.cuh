// Two warps that bring packed query rows to shared memory, each the 64 rows of one consumer warpgroup.
//
// Rows of a KV head are not a box that the copy engine knows (tokens times an arbitrary group), so 16-byte cp.async by rows. For a
// decode work there is nothing to load: the turn of the query buffer passes on, and the consumers use it as scratch.
#pragma once

#include <cstdint>

#include "tvm_infer/attention/config_sm90.cuh"
#include "tvm_infer/attention/params.cuh"
#include "tvm_infer/attention/rows.cuh"
#include "tvm_infer/ptx/cp_async.cuh"
#include "tvm_infer/ptx/mbarrier.cuh"
#include "tvm_infer/ptx/sync.cuh"

namespace tvm_infer::attention {

template <typename Config>
class QueryLoader {
 public:
  static constexpr int kRows = 64;

  // `buffer`: this warp's rows in the first query buffer, panels of 64 rows. `full`, `empty`: barriers of the first buffer.
  __device__ __forceinline__ QueryLoader(const AttentionParams& params, const PlanView& plan, uint32_t buffer, uint32_t full,
                                         uint32_t empty, int32_t first_row)
      : params_(params), plan_(plan), buffer_(buffer), full_(full), empty_(empty), first_row_(first_row), lane_(threadIdx.x % 32) {}

  __device__ __forceinline__ void Run(const Work& work) {
    const bool is_prefill = work.tile_class != kDecodeClass;
    // Offsets of rows lane and lane + 32 for KV head 0; other heads are a constant further on.
    int64_t offset[2] = {0, 0};
    if (is_prefill) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int32_t row = min(first_row_ + 32 * i + lane_, work.num_rows - 1);
        const RowAddress at = AddressOf(plan_, work.row_begin + row);
        offset[i] = at.token * params_.q_stride_token + at.head * params_.q_stride_head;
      }
    }
    for (int32_t h = 0; h < work.num_kv_heads; ++h) {
      const uint32_t buffer = turn_ % Config::kQueryBuffers, parity = turn_ / Config::kQueryBuffers % 2;
      ++turn_;
      ptx::MbarrierWait(empty_ + 8 * buffer, parity ^ 1);
      if (is_prefill) LoadHead(work, work.kv_head_begin + h, offset, buffer_ + buffer * Config::kQueryBytes);
      __syncwarp();
      if (lane_ == 0) ptx::MbarrierArrive(full_ + 8 * buffer);
    }
  }

 private:
  __device__ __forceinline__ void LoadHead(const Work& work, int32_t kv_head, const int64_t (&offset)[2], uint32_t buffer) {
    constexpr int kChunks = Config::kHeadDim / 8;  // of 16 bytes
    constexpr int kRowsAtOnce = 32 / kChunks;      // 2 or 4
    const int32_t chunk = lane_ % kChunks;
    const auto* q = static_cast<const uint16_t*>(params_.q) + kv_head * plan_.header->group_size * params_.q_stride_head + chunk * 8;
    const uint32_t panel = buffer + chunk / 8 * kRows * tile::kPanelRowBytes;
    const int32_t num_rows = min(kRows, work.num_rows - first_row_);  // may be negative: nothing to do, its logits are not used
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll 4
      for (int i = 0; i < 32; i += kRowsAtOnce) {
        const int32_t row_in_half = i + lane_ / kChunks, row = 32 * half + row_in_half;
        const int64_t row_offset = __shfl_sync(0xffffffff, offset[half], row_in_half);
        if (row < num_rows) ptx::CpAsync16(panel + tile::SwizzledOffset(row, chunk % 8), q + row_offset);
      }
    }
    ptx::CpAsyncWaitAll();
    ptx::FenceProxyAsyncShared();
  }

  const AttentionParams& params_;
  const PlanView& plan_;
  const uint32_t buffer_;
  const uint32_t full_;
  const uint32_t empty_;
  const int32_t first_row_;
  const int32_t lane_;
  uint32_t turn_ = 0;
};

}  // namespace tvm_infer::attention
