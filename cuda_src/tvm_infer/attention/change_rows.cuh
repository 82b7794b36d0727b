// Heads of queries and keys in shared memory, changed in place by a variant before they enter the product: element by element, then turned
// in pairs of channels.
//
// A row is shared by head_dim / 16 lanes. A lane has two 16-byte chunks of it, those whose channels turn together, so that nothing passes
// between lanes but sums of squares. Angles come from the special-function unit: 16 lanes' worth of sine or cosine a clock and SM; a tile
// of 128 keys of head_dim 128 takes it 1024 clocks, a third of the time in which the tile arrives.
#pragma once

#include <cstdint>

#include "tvm_infer/attention/rows.cuh"
#include "tvm_infer/ptx/element.cuh"
#include "tvm_infer/ptx/load_store.cuh"
#include "tvm_infer/ptx/sync.cuh"
#include "tvm_infer/variant/variant.h"

namespace tvm_infer::attention {

// Radians a position, as turns a position in two floats: the whole turns of their product with a position fall away exactly, and what is
// left is off by 1e-6 radians at most (kernels/rope_angle.cuh has the argument), of which the special-function unit makes up half.
struct TurnRate {
  float high, low;

  __device__ __forceinline__ explicit TurnRate(float rate) {
    constexpr float kTurnsHigh = 0x1.45f306p-3f, kTurnsLow = 0x1.b9391p-28f;  // 1 / (2 pi)
    high = __fmul_rn(rate, kTurnsHigh);
    low = fmaf(rate, kTurnsLow, fmaf(rate, kTurnsHigh, -high));
  }
  // (a, b) turned by `position` times the rate.
  __device__ __forceinline__ void Turn(float position, float& a, float& b) const {
    const float turns = __fmul_rn(position, high);
    const float rest = fmaf(position, low, fmaf(position, high, -turns));
    const float angle = ((turns - rintf(turns)) + rest) * 6.283185307f;
    const float cos = ptx::Cos(angle), sin = ptx::Sin(angle), x = a;
    a = x * cos - b * sin;
    b = b * cos + x * sin;
  }
};

template <typename Variant, int kHeadDim>
struct HeadRows {
  static constexpr int kChunks = kHeadDim / 8, kLanes = kChunks / 2, kRowsAtOnce = 32 / kLanes;  // of a warp
  static constexpr int kRotaryChunks = (Variant::kRotaryDim == 0 ? kHeadDim : Variant::kRotaryDim) / 8;
  static_assert(32 % kLanes == 0, "variants that change queries or keys are for head_dim 64, 128 and 256");
  static_assert(kRotaryChunks <= kChunks && kRotaryChunks % 2 == 0, "rotary_dim is a multiple of 16, and head_dim at most");

  uint32_t row, lane;  // this thread's: of the rows at once, of the row's lanes

  // NOTE: from the thread's number read anew, as in Consumer::ThreadAnew.
  __device__ __forceinline__ HeadRows() {
    const uint32_t thread = ptx::ThreadAnew();
    row = thread % 32 / kLanes;
    lane = thread % kLanes;
  }
  // The lane's chunk 0 or 1. Where pairs are apart: both halves of its pairs, and behind the channels that turn two neighbours.
  __device__ __forceinline__ uint32_t Chunk(int i) const {
    if (Variant::kIsInterleaved) return lane + i * kLanes;
    return lane < kRotaryChunks / 2 ? lane + i * (kRotaryChunks / 2) : 2 * lane + i;
  }
  __device__ __forceinline__ bool IsTurned(int i) const {
    return kRotaryChunks == kChunks || (Variant::kIsInterleaved ? Chunk(i) < kRotaryChunks : lane < kRotaryChunks / 2);
  }
};

// Rows of queries, or of keys (kIsKey). address(r, chunk): of 16 bytes of the lane's row number r, in shared memory; positions[r]: of the
// row; rows: of the queries, for keys one with what all share.
template <typename Element, typename Variant, int kHeadDim, bool kIsKey, int kRows, typename AddressOf>
__device__ __forceinline__ void ChangeRows(const HeadRows<Variant, kHeadDim>& head, const variant::Args& args,
                                           const variant::Row (&rows)[kIsKey ? 1 : kRows], const int32_t (&positions)[kRows],
                                           const AddressOf& address) {
  using Head = HeadRows<Variant, kHeadDim>;
  constexpr bool kHasElements = kIsKey ? Variant::kHasKey : Variant::kHasQuery;
  constexpr bool kNeedsSquare = kIsKey ? Variant::kKeyNeedsSquare : Variant::kQueryNeedsSquare;
  uint4 words[kRows][2];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < 2; ++i) words[r][i] = ptx::LoadShared16(address(r, head.Chunk(i)));
  }
  const auto word = [&](int r, int i, int e) -> uint32_t& { return (&words[r][i].x)[e]; };
  float square[kRows] = {}, at[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if constexpr (kNeedsSquare) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float2 x = ptx::Unpack<Element>(word(r, i, e));
          square[r] += x.x * x.x + x.y * x.y;
        }
      }
#pragma unroll
      for (int lane = 1; lane < Head::kLanes; lane *= 2) square[r] += __shfl_xor_sync(0xffffffff, square[r], lane);
      square[r] *= 1.f / kHeadDim;
    }
    if constexpr (Variant::kHasPosition) {
      at[r] = static_cast<float>(Variant::Position(args, rows[kIsKey ? 0 : r], positions[r]));
    } else if constexpr (Variant::kHasRate) {
      at[r] = static_cast<float>(positions[r]);
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    float x[kRows][2][2];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 pair = ptx::Unpack<Element>(word(r, i, e));
        x[r][i][0] = pair.x, x[r][i][1] = pair.y;
        if constexpr (kHasElements) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int32_t channel = static_cast<int32_t>(head.Chunk(i)) * 8 + 2 * e + c;
            if constexpr (kIsKey) {
              x[r][i][c] = Variant::Key(args, rows[0], positions[r], channel, square[r], x[r][i][c]);
            } else {
              x[r][i][c] = Variant::Query(args, rows[r], channel, square[r], x[r][i][c]);
            }
          }
        }
      }
    }
    if constexpr (Variant::kHasRate) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // interleaved: word i; else element i of both words
        if (!head.IsTurned(Variant::kIsInterleaved ? i : 0)) continue;
        const int32_t pair =
            Variant::kIsInterleaved ? static_cast<int32_t>(head.Chunk(i)) * 4 + e : static_cast<int32_t>(head.lane) * 8 + 2 * e + i;
        const TurnRate rate(Variant::Rate(args, rows[0], pair));
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          rate.Turn(at[r], Variant::kIsInterleaved ? x[r][i][0] : x[r][0][i], Variant::kIsInterleaved ? x[r][i][1] : x[r][1][i]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) word(r, i, e) = ptx::Pack<Element>(x[r][i][0], x[r][i][1]);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < 2; ++i) ptx::StoreShared16(address(r, head.Chunk(i)), words[r][i]);
  }
}

// A warp's 16 keys of a tile of one head, whose key 0 is at position `kv_pos`, in a Layout like tile::PageBoxes; kRows of a lane at a time,
// as registers allow. Keys behind the last take its position: they are masked.
template <typename Config, typename Layout, int kRows>
__device__ __forceinline__ void ChangeKeys(const variant::Args& args, const variant::Row& row, uint32_t stage, uint32_t warp,
                                           int32_t kv_pos) {
  using Head = HeadRows<typename Config::Variant, Config::kHeadDim>;
  constexpr int kWarpKeys = 16, kAtOnce = kRows * Head::kRowsAtOnce;
  const variant::Row rows[1] = {row};
#pragma unroll 1
  for (int32_t base = 0; base < kWarpKeys; base += kAtOnce) {
    const Head head;
    const uint32_t first = warp * kWarpKeys + base + head.row;
    int32_t positions[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      positions[r] = max(min(kv_pos + static_cast<int32_t>(first) + r * Head::kRowsAtOnce, row.kv_len - 1), 0);
    }
    ChangeRows<typename Config::Element, typename Config::Variant, Config::kHeadDim, true, kRows>(
        head, args, rows, positions, [&](int r, uint32_t chunk) { return stage + Layout::Offset(first + r * Head::kRowsAtOnce, chunk); });
  }
}

// Queries [0, num_rows) of a panel of a work's, which begins with its row `first_row`; by one warp.
template <typename Config>
__device__ __forceinline__ void ChangeQueries(const variant::Args& args, const PlanView& plan, const Work& work, int32_t kv_head,
                                              int32_t group, uint32_t panel, int32_t first_row, int32_t num_rows) {
  using Head = HeadRows<typename Config::Variant, Config::kHeadDim>;
  const TokenOfRow token(work, group);
  const int32_t batch = work.kv_list, first_head = work.row_begin % group;
  const int32_t q_len = __ldg(plan.qo_indptr() + batch + 1) - __ldg(plan.qo_indptr() + batch), kv_len = __ldg(plan.kv_len() + batch);
#pragma unroll 1
  for (int32_t first = 0; first < num_rows; first += Head::kRowsAtOnce) {
    const Head head;
    const uint32_t row = first + head.row;
    const int32_t own = min(first_row + static_cast<int32_t>(row), work.num_rows - 1), of_token = token(own);
    const int32_t positions[1] = {work.qo_pos_base + of_token};
    const variant::Row rows[1] = {{batch, kv_head * group + first_head + own - of_token * group, kv_head, positions[0], q_len, kv_len}};
    ChangeRows<typename Config::Element, typename Config::Variant, Config::kHeadDim, false, 1>(
        head, args, rows, positions, [&](int, uint32_t chunk) {
          return panel + chunk / 8 * Config::kPanelRows * tile::kPanelRowBytes + tile::SwizzledOffset(row, chunk % 8);
        });
  }
}

}  // namespace tvm_infer::attention
