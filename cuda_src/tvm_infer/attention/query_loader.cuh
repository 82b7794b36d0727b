// Two warps that bring packed query rows to shared memory, each the 64 rows of one consumer warpgroup.
//
// Rows of a KV head are not a box that the copy engine knows (tokens times an arbitrary group), so 16-byte cp.async by rows. Beside the
// rows it leaves where their results go. For a decode work the first warp brings up to 16 rows, ahead of the consumers: were they to
// load them, each head would begin with a wait for memory; once read, the buffer is their scratch.
#pragma once

#include <cstdint>

#include "tvm_infer/attention/change_rows.cuh"
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
  static constexpr int kRows = Config::kPanelRows;

  // `buffer`: this warp's rows of the first turn, panels of 64 rows. `full`, `empty`: barriers of the first turn.
  __device__ __forceinline__ QueryLoader(const AttentionParams& params, const variant::Args& variant, const PlanView& plan,
                                         typename Config::SharedMemory& shared, uint32_t buffer, uint32_t full, uint32_t empty,
                                         int32_t first_row)
      : params_(params),
        variant_(variant),
        plan_(plan),
        shared_(shared),
        buffer_(buffer),
        full_(full),
        empty_(empty),
        first_row_(first_row),
        lane_(threadIdx.x % 32) {}

  __device__ __forceinline__ void Run(const Work& work) {
    const bool is_prefill = work.tile_class != kDecodeClass, has_rows = work.num_rows > first_row_;
    Rows rows;
    if (has_rows) rows = FirstHead(work);
    for (int32_t h = 0; h < work.num_kv_heads; ++h) {
      const uint32_t turn = turn_ % Config::kQueryTurns, parity = turn_ / Config::kQueryTurns % 2;
      ++turn_;
      ptx::MbarrierWait(empty_ + 8 * turn, parity ^ 1);
      if constexpr (Config::kQueryBuffers == 1) {  // prefill's queries are where those of the turn before are, or its results
        if ((is_prefill || last_is_prefill_) && turn_ > 1) ptx::MbarrierWait(empty_ + 8 * (turn ^ 1), parity ^ turn ^ 1);
        last_is_prefill_ = is_prefill;
      }
      if (has_rows) {
        if (lane_ == 0) shared_.head[turn] = {work.out == kFinalRows ? kFinalRows : work.out + h * work.num_rows, work.num_rows};
        LoadHead(rows, turn, is_prefill);
        if constexpr (Config::kChangesQueries) {
          __syncwarp();
          ChangeQueries<Config>(variant_, plan_, work, work.kv_head_begin + h, params_.expected.group_size, Place(turn, is_prefill),
                                first_row_, min(work.num_rows - first_row_, is_prefill ? kRows : Config::kDecodeRows));
        }
        ptx::FenceProxyAsyncShared();
        rows.Step(params_);
      }
      ptx::MbarrierArrive(full_ + 8 * turn);
    }
  }

 private:
  // Rows lane and lane + 32 of this warp's, for one KV head. Every row of the buffer gets a row: those behind the work's last repeat it,
  // and need no test.
  struct Rows {
    uint32_t q[2];  // offset in Q, in units of 16 bytes
    uint32_t o[2];  // the same in O
    int32_t lse[2];

    // On to the next KV head.
    __device__ __forceinline__ void Step(const AttentionParams& p) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        q[i] += static_cast<uint32_t>(p.expected.group_size * p.q_stride_head / 8);
        o[i] += static_cast<uint32_t>(p.expected.group_size * p.o_stride_head / 8);
        lse[i] += p.expected.group_size;
      }
    }
  };

  __device__ __forceinline__ Rows FirstHead(const Work& work) const {
    const int32_t group = params_.expected.group_size;
    Rows rows;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t row = min(first_row_ + 32 * i + lane_, work.num_rows - 1);
      const RowAddress at = AddressOf(plan_, work.row_begin + row, group);
      const int32_t head = work.kv_head_begin * group + at.head;
      rows.q[i] = static_cast<uint32_t>((at.token * params_.q_stride_token + head * params_.q_stride_head) / 8);
      rows.o[i] = static_cast<uint32_t>((at.token * params_.o_stride_token + head * params_.o_stride_head) / 8);
      rows.lse[i] = at.token * (params_.expected.num_kv_heads * group) + head;
    }
    return rows;
  }

  __device__ __forceinline__ uint32_t Place(uint32_t turn, bool is_prefill) const {
    return buffer_ + turn * (is_prefill ? Config::kPrefillQueryStride : Config::kDecodeQueryStride);
  }

  __device__ __forceinline__ void LoadHead(const Rows& rows, uint32_t turn, bool is_prefill) {
    constexpr int kLanes = Config::kLoadLanes;  // of a row
    constexpr int kRowsAtOnce = 32 / kLanes;    // 1, 2 or 4
    if (is_prefill) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        shared_.scratch[turn].rows[first_row_ + 32 * i + lane_] = {static_cast<int32_t>(rows.o[i]), rows.lse[i]};
      }
    } else if (lane_ < Config::kDecodeRows) {
      shared_.decode_rows[turn][lane_] = {static_cast<int32_t>(rows.o[0]), rows.lse[0]};
    }
    const uint32_t chunk = lane_ % kLanes, row = lane_ / kLanes;  // row of the first step
    const bool has_chunk = chunk < Config::kHeadDim / 8;
    const char* column = static_cast<const char*>(params_.q) + chunk * 16;
    const uint32_t panel = Place(turn, is_prefill) + chunk / 8 * kRows * tile::kPanelRowBytes + row * tile::kPanelRowBytes;
    const uint32_t swizzled = (chunk % 8 ^ row) << 4;
    // NOTE: shuffles first, then copies: one at a time, each would wait for the one before to have read its address. A batch
    // is no more than decode's rows, behind which the other turn's may be.
    constexpr int kBatch = Config::kDecodeRows / kRowsAtOnce < 8 ? Config::kDecodeRows / kRowsAtOnce : 8;
#pragma unroll 1
    for (int32_t first = 0; first < (is_prefill ? kRows : Config::kDecodeRows); first += kBatch * kRowsAtOnce) {
      uint32_t from[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        from[i] = __shfl_sync(0xffffffff, first < 32 ? rows.q[0] : rows.q[1], (first + i * kRowsAtOnce + row) % 32);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const uint32_t to = panel + (first + i * kRowsAtOnce) * tile::kPanelRowBytes;
        if (Config::kHeadDim / 8 < kLanes && !has_chunk) continue;
        ptx::CpAsync16(to + (swizzled ^ (i * kRowsAtOnce) % tile::kSwizzleRows << 4), column + static_cast<uint64_t>(from[i]) * 16);
      }
    }
    ptx::CpAsyncWaitAll();
  }

  const AttentionParams& params_;
  const variant::Args& variant_;
  const PlanView& plan_;
  typename Config::SharedMemory& shared_;
  const uint32_t buffer_;
  const uint32_t full_;
  const uint32_t empty_;
  const int32_t first_row_;
  const int32_t lane_;
  uint32_t turn_ = 0;
  bool last_is_prefill_ = false;
};

}  // namespace tvm_infer::attention
