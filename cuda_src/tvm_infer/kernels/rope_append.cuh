// Rotary embedding of new tokens' queries and keys on their way: Q to its output, K and V to the pages of their requests. One launch
// between the projection and the attention, which reads and writes every element once.
//
// A lane works on the same 32 bytes of every row (head) that it meets: the two 16-byte vectors whose elements turn with each other, or two
// neighbours that do not turn. So it needs eight angles a token, whatever the number of heads.
#pragma once

#include <cstdint>

#include "tvm_infer/cuda/params.h"
#include "tvm_infer/kernels/append.cuh"
#include "tvm_infer/kernels/rope_angle.cuh"
#include "tvm_infer/ptx/element.cuh"
#include "tvm_infer/ptx/sync.cuh"

namespace tvm_infer::kernels {

inline constexpr int32_t kRopeAppendThreads = 256;
inline constexpr int32_t kRopeAppendCtasPerSm = 2;  // 128 registers, 64 KiB in flight on an SM
inline constexpr uint32_t kRopeAppendSteps = 4;     // rows of a task that a lane has in flight, 32 bytes of each
inline constexpr uint32_t kRopePairs = 8;           // that a lane turns in a row

// Where in its rows a lane works.
struct RopeLane {
  uint32_t rows;           // that the warp has in a step
  uint32_t row;            // of these, this lane's
  uint32_t first, second;  // vectors in the row
  uint32_t first_pair;     // entry of inv_freq of the first of its pairs
  bool is_active;          // 32 is no multiple of a row's lanes: 2 of 32 rest at head_dim 80
  bool turns;

  __device__ __forceinline__ explicit RopeLane(const cuda::RopeAppendParams& p) {
    const uint32_t lane = threadIdx.x % 32, row_lanes = p.append.head_dim / 16, turning_lanes = p.rotary_dim / 16;
    const uint32_t unit = lane % row_lanes;
    rows = 32 / row_lanes;
    row = lane / row_lanes;
    is_active = row < rows;
    turns = unit < turning_lanes;
    const bool is_split = turns && p.is_interleaved == 0;
    first = is_split ? unit : 2 * unit;
    second = is_split ? unit + turning_lanes : first + 1;
    first_pair = kRopePairs * unit;
  }
};

// A row of a token: a head of Q, then of K, then of V.
struct RopeRow {
  bool is_q, is_v;
  int64_t head;

  __device__ __forceinline__ RopeRow(const cuda::RopeAppendParams& p, uint32_t row) {
    const uint32_t k_begin = p.append.num_qo_heads, v_begin = k_begin + p.append.num_kv_heads;
    is_q = row < k_begin;
    is_v = row >= v_begin;
    head = row - (is_v ? v_begin : is_q ? 0 : k_begin);
  }
  __device__ __forceinline__ const uint4* From(const cuda::RopeAppendParams& p, int64_t token) const {
    const cuda::AppendParams& a = p.append;
    const int64_t stride_token = is_q ? p.q_stride_token : is_v ? a.v_stride_token : a.k_stride_token;
    const int64_t stride_head = is_q ? p.q_stride_head : is_v ? a.v_stride_head : a.k_stride_head;
    const auto* from = static_cast<const uint16_t*>(is_q ? p.q : is_v ? a.v : a.k);
    return reinterpret_cast<const uint4*>(from + token * stride_token + head * stride_head);
  }
  __device__ __forceinline__ uint4* ToQuery(const cuda::RopeAppendParams& p, int64_t token) const {
    return reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.q_out) + token * p.q_out_stride_token + head * p.q_out_stride_head);
  }
  // The row's place in the attention's output.
  __device__ __forceinline__ uint4* ToOutput(const cuda::AppendParams& a, int64_t token) const {
    return reinterpret_cast<uint4*>(static_cast<uint16_t*>(a.o) + token * a.o_stride_token + head * a.o_stride_head);
  }
};

// The angles of a lane's pairs at one position.
struct RopeAngles {
  CosSin pairs[kRopePairs];

  __device__ __forceinline__ void Set(const float (&inv_freq)[kRopePairs], int32_t position, float magnitude) {
#pragma unroll
    for (uint32_t i = 0; i < kRopePairs; ++i) {
      const CosSin x = CosSinOf(static_cast<float>(position), inv_freq[i]);
      pairs[i] = {x.cos * magnitude, x.sin * magnitude};
    }
  }
};

// (x, y) turned; float until the one rounding.
__device__ __forceinline__ float2 Turn(const CosSin& angle, float x, float y) {
  return make_float2(fmaf(x, angle.cos, -y * angle.sin), fmaf(y, angle.cos, x * angle.sin));
}

// Words hold neighbours: a pair where pairs are interleaved, else the same halves of two pairs, whose other halves are in `second`. `pack`
// makes a word of two results.
template <typename Element, typename Pack>
__device__ __forceinline__ void TurnWords(const RopeAngles& angles, bool is_interleaved, const uint4& first, const uint4& second,
                                          uint32_t (&low)[4], uint32_t (&high)[4], const Pack& pack) {
  const uint32_t from_low[4] = {first.x, first.y, first.z, first.w}, from_high[4] = {second.x, second.y, second.z, second.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 a = ptx::Unpack<Element>(from_low[i]), b = ptx::Unpack<Element>(from_high[i]);
    if (is_interleaved) {
      const float2 x = Turn(angles.pairs[i], a.x, a.y), y = Turn(angles.pairs[4 + i], b.x, b.y);
      low[i] = pack(x.x, x.y);
      high[i] = pack(y.x, y.y);
    } else {
      const float2 x = Turn(angles.pairs[2 * i], a.x, b.x), y = Turn(angles.pairs[2 * i + 1], a.y, b.y);
      low[i] = pack(x.x, y.x);
      high[i] = pack(x.y, y.y);
    }
  }
}

// A row's two vectors, turned or not, to their places in q_out, or where cells are copied.
template <typename Element>
__device__ __forceinline__ void StoreTurned(const RopeLane& lane, const RopeAngles& angles, bool is_interleaved, bool turns, uint4 first,
                                            uint4 second, uint4* to) {
  if (turns) {
    uint32_t low[4], high[4];
    TurnWords<Element>(angles, is_interleaved, first, second, low, high, [](float x, float y) { return ptx::Pack<Element>(x, y); });
    first = make_uint4(low[0], low[1], low[2], low[3]);
    second = make_uint4(high[0], high[1], high[2], high[3]);
  }
  to[lane.first] = first;
  to[lane.second] = second;
}

// The same of a key or value of 8 bits: what turns is rounded once.
template <typename Element, typename Cells>
__device__ __forceinline__ void StoreQuantised(const RopeLane& lane, const RopeAngles& angles, bool is_interleaved, bool turns,
                                               const uint4& first, const uint4& second, const Cells& cells, uint2* to) {
  if (!turns) {
    to[lane.first] = cells.Convert(first);
    to[lane.second] = cells.Convert(second);
    return;
  }
  uint32_t low[4], high[4];
  TurnWords<Element>(angles, is_interleaved, first, second, low, high, [&cells](float x, float y) { return cells.Pair(x, y); });
  to[lane.first] = make_uint2(low[0] | low[1] << 16, low[2] | low[3] << 16);
  to[lane.second] = make_uint2(high[0] | high[1] << 16, high[2] | high[3] << 16);
}

// A task is a token, or a part of its rows where there are more warps than tokens; each warp takes a run of tasks, as in append.cuh.
template <typename Element, typename Cells>
__device__ __forceinline__ void RopeAppend(const cuda::RopeAppendParams& p) {
  ptx::AllowDependentGrid();
  const cuda::AppendParams& a = p.append;
  const uint32_t warp = blockIdx.x * (kRopeAppendThreads / 32) + threadIdx.x / 32, num_warps = gridDim.x * (kRopeAppendThreads / 32);
  const RopeLane lane(p);
  const uint32_t turning_rows = a.num_qo_heads + a.num_kv_heads, num_rows = turning_rows + a.num_kv_heads;
  const uint32_t token_steps = (num_rows + lane.rows - 1) / lane.rows;  // max_tokens of these are below 2^31: cuda/rope_append.cc
  const uint32_t steps = min(kRopeAppendSteps, (a.max_tokens * token_steps + num_warps - 1) / num_warps);
  const uint32_t parts = (token_steps + steps - 1) / steps;  // tasks of a token
  const uint32_t num_tasks = a.max_tokens * parts;
  const uint32_t run = num_tasks / num_warps, rest = num_tasks % num_warps;
  const uint32_t first_task = warp * run + min(warp, rest), end_task = first_task + run + (warp < rest);
  int32_t token = first_task / parts, angles_token = -1;
  uint32_t part = first_task % parts;

  // Lengths, q, k and v may be the prior grid's, and the cache and q_out may still be read by it. Lengths that are ready are read
  // meanwhile.
  const bool is_ready = a.plan_is_ready != 0;
  if (!is_ready) ptx::WaitForPriorGrid();
  float inv_freq[kRopePairs] = {};
  if (lane.turns) {
#pragma unroll
    for (uint32_t i = 0; i < kRopePairs; ++i) inv_freq[i] = __ldg(p.inv_freq + lane.first_pair + i);
  }
  const AppendLengths lengths = LoadLengths(a);
  AppendRequest request;
  RopeAngles angles;
  bool is_padding = false, has_slot = false;
  int64_t page = 0, slot = 0;
  const bool zeroes_output = a.o != nullptr && !lengths.is_refused;  // a refused plan leaves the attention's output alone
  const auto find_place = [&](uint32_t task_row) {
    if (!is_padding && token >= request.end) {
      const int32_t index = RequestOf(lengths, token);
      is_padding = index >= lengths.num_requests;  // as are all tokens behind
      if (!is_padding) request.Load(a, lengths, index);
    }
    const int32_t position = request.kv_len - (request.end - token);
    const int32_t page_entry = request.first_page + position / a.page_size;
    // K and V of a token before its request's first position or behind its last page go nowhere, as in append.cuh.
    has_slot = !is_padding && position >= 0 && page_entry < request.end_page;
    if (has_slot && task_row + steps * lane.rows > a.num_qo_heads)
      page = __ldg(a.kv_page_indices + page_entry), slot = position % a.page_size;
    if (!is_padding && lane.turns && task_row < turning_rows && angles_token != token) {
      angles.Set(inv_freq, position, p.magnitude);
      angles_token = token;
    }
  };
  for (uint32_t task = first_task; task < end_task; ++task) {
    const uint32_t task_row = part * steps * lane.rows, end = lane.is_active ? min(num_rows, task_row + steps * lane.rows) : 0;
    const bool is_ahead = is_ready && task == first_task;
    if (is_ahead) {
      find_place(task_row);
      ptx::WaitForPriorGrid();
    }
    uint4 first[kRopeAppendSteps], second[kRopeAppendSteps];
#pragma unroll
    for (uint32_t i = 0; i < kRopeAppendSteps; ++i) {
      const uint32_t row = task_row + i * lane.rows + lane.row;
      if (row >= end) continue;
      const uint4* from = RopeRow(p, row).From(p, token);
      first[i] = __ldcg(from + lane.first);
      second[i] = __ldcg(from + lane.second);
    }
    if (!is_ahead) find_place(task_row);
#pragma unroll
    for (uint32_t i = 0; i < kRopeAppendSteps; ++i) {
      const uint32_t index = task_row + i * lane.rows + lane.row;
      if (index >= end) continue;
      const RopeRow row(p, index);
      if (!row.is_q && !has_slot) continue;
      if (is_padding) {  // a row of q
        uint4* const to = row.ToQuery(p, token);
        to[lane.first] = to[lane.second] = make_uint4(0, 0, 0, 0);
        if (zeroes_output) row.ToOutput(a, token)[lane.first] = row.ToOutput(a, token)[lane.second] = make_uint4(0, 0, 0, 0);
        continue;
      }
      const bool is_interleaved = p.is_interleaved != 0, turns = lane.turns && !row.is_v;
      if constexpr (Cells::kElementBytes == 1) {
        if (!row.is_q) {
          const Cells cells(CachedScale<Cells>(a, row.is_v, row.head));
          StoreQuantised<Element>(lane, angles, is_interleaved, turns, first[i], second[i], cells,
                                  reinterpret_cast<uint2*>(CachedRow<Cells>(a, row.is_v, row.head, page, slot)));
          continue;
        }
      }
      uint4* const to = row.is_q ? row.ToQuery(p, token) : reinterpret_cast<uint4*>(CachedRow<Cells>(a, row.is_v, row.head, page, slot));
      StoreTurned<Element>(lane, angles, is_interleaved, turns, first[i], second[i], to);
    }
    if (++part == parts) part = 0, ++token;
  }
}

}  // namespace tvm_infer::kernels

// A kernel by name; ELEMENT is Bf16 or Fp16. Rows of q, k, v, q_out and the caches start on 16-byte boundaries (the bindings check that).
#define TVM_INFER_ROPE_APPEND_CELLS(NAME, ELEMENT, ...)                                                                          \
  extern "C" __global__ void __launch_bounds__(tvm_infer::kernels::kRopeAppendThreads, tvm_infer::kernels::kRopeAppendCtasPerSm) \
      NAME(const __grid_constant__ tvm_infer::cuda::RopeAppendParams params) {                                                   \
    tvm_infer::kernels::RopeAppend<tvm_infer::ptx::ELEMENT, __VA_ARGS__>(params);                                                \
  }                                                                                                                              \
  extern "C" __device__ const tvm_infer::cuda::KernelInfo NAME##_info = {                                                        \
      tvm_infer::cuda::kKernelAbi, tvm_infer::kernels::kRopeAppendThreads, 0, tvm_infer::kernels::kRopeAppendCtasPerSm}
// The cache's elements are the new ones'.
#define TVM_INFER_ROPE_APPEND(NAME, ELEMENT) TVM_INFER_ROPE_APPEND_CELLS(NAME, ELEMENT, tvm_infer::kernels::CopiedCells)
// FLOAT8 is E4m3 or E5m2.
#define TVM_INFER_ROPE_APPEND_FLOAT8(NAME, ELEMENT, FLOAT8) \
  TVM_INFER_ROPE_APPEND_CELLS(NAME, ELEMENT, tvm_infer::kernels::QuantisedCells<tvm_infer::ptx::ELEMENT, tvm_infer::ptx::FLOAT8>)
