// Copies of K and V by token, for pages of fewer than 8 tokens: two warps, 16-byte cp.async, 64 keys of a tile each.
//
// 8, 16 or 32 lanes copy a row, up to 4 rows an instruction. A tile of 128 keys of head_dim 128 costs a warp 32 times four instructions
// (shuffle of the page, its sign, one multiply-add for the address, copy). The layout is that of one page of 128 tokens, which
// serves both classes; a tile starts at any key, and slots without a key are filled with zeros, since a weight of 0 times NaN is NaN.
#pragma once

#include <cstdint>

#include "tvm_infer/attention/config_sm90.cuh"
#include "tvm_infer/attention/params.cuh"
#include "tvm_infer/attention/rows.cuh"
#include "tvm_infer/ptx/address.cuh"
#include "tvm_infer/ptx/cp_async.cuh"

namespace tvm_infer::attention {

template <typename Config>
class KvGather {
 public:
  static constexpr int kWarpKeys = Config::kTileKeys / 2;

  // Keys 32 * m + lane of this warp's half of a tile: page * page_size + token in it, or -1 for no key.
  struct Tile {
    int32_t slot[kWarpKeys / 32];
  };

  __device__ __forceinline__ KvGather(const AttentionParams& params, const KvTensorMaps&) : params_(params) {}

  // Asks for what Enter needs: the list's place in the page table.
  __device__ __forceinline__ void Begin(const Work& work) { pages_ = params_.kv_page_indices + __ldg(params_.kv_indptr + work.kv_list); }
  // The keys of a work; `base` is the first tile's first.
  __device__ __forceinline__ void Enter(const Work& work, int32_t base) {
    my_key_ = base + Half() * kWarpKeys + Lane();
    end_ = work.kv_end;
  }
  // Table entries behind the last page may be garbage and are not read.
  __device__ __forceinline__ Tile Load(int32_t tile) const {
    Tile result;
#pragma unroll
    for (int m = 0; m < kWarpKeys / 32; ++m) {
      const int32_t key = my_key_ + tile * Config::kTileKeys + 32 * m;
      result.slot[m] = -1;
      if (key < end_) result.slot[m] = __ldg(pages_ + key / Config::kPageSize) * Config::kPageSize + key % Config::kPageSize;
    }
    return result;
  }

  // To an empty stage; `full` is its barrier: 64 arrivals, each when the copies of one thread are done.
  __device__ __forceinline__ void CopyK(const Tile& tile, int32_t head, uint32_t stage, uint32_t full, bool) const {
    CopyRows<Config::kHeadDim>(tile, params_.k, params_.k_stride_page, params_.k_stride_token, head * params_.k_stride_head, stage, full);
  }
  __device__ __forceinline__ void CopyV(const Tile& tile, int32_t head, uint32_t stage, uint32_t full, bool) const {
    CopyRows<Config::kHeadDimVo>(tile, params_.v, params_.v_stride_page, params_.v_stride_token, head * params_.v_stride_head, stage, full);
  }
  // Before the warp exits.
  __device__ __forceinline__ void Finish() const { ptx::CpAsyncWaitAll(); }

 private:
  __device__ __forceinline__ static int32_t Lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ static int32_t Half() { return threadIdx.x / 32 == 0 ? 0 : 1; }

  static constexpr uint32_t kNowhere = 0xffffffff;  // offset of a slot without a key

  // Rows of kColumns elements, by kLanes lanes each, 16 bytes a lane.
  template <int kColumns>
  __device__ __forceinline__ static void CopyRows(const Tile& tile, const void* rows, int64_t stride_page, int64_t stride_token,
                                                  int64_t head_offset, uint32_t stage, uint32_t full) {
    constexpr int kLanes = tile::RowLanes(kColumns);
    const int32_t chunk = Lane() % kLanes, first_row = Lane() / kLanes * kLanes;
    const char* source = static_cast<const char*>(rows) + (head_offset + chunk * 8) * 2;
    asm volatile("" : "+l"(source));  // NOTE: one value, or the compiler adds its parts anew for every copy
    const uint32_t target = stage + tile::PageBoxes<Config::kBoxKeys, kColumns>::Offset(Half() * kWarpKeys + first_row, chunk);
    const auto page_units = static_cast<uint32_t>(stride_page / 8), token_units = static_cast<uint32_t>(stride_token / 8);
    uint32_t offset[kWarpKeys / 32];  // of this lane's keys, in units of 16 bytes
    bool has_keys = true;             // in every slot: most tiles, and then no copy needs a test
#pragma unroll
    for (int m = 0; m < kWarpKeys / 32; ++m) {
      const auto slot = static_cast<uint32_t>(tile.slot[m]);
      offset[m] = slot / Config::kPageSize * page_units + slot % Config::kPageSize * token_units;
      if (tile.slot[m] < 0) offset[m] = kNowhere;
      has_keys &= tile.slot[m] >= 0;
    }
    if (__all_sync(0xffffffff, has_keys)) {
      Copies<true, kColumns>(offset, source, target);
    } else {
      Copies<false, kColumns>(offset, source, target);
    }
    ptx::CpAsyncArrive(full);
  }

  template <bool kAllKeys, int kColumns>
  __device__ __forceinline__ static void Copies(const uint32_t (&offset)[kWarpKeys / 32], const char* source, uint32_t target) {
    // NOTE: shuffles, addresses, copies, batch by batch, and the addresses of a batch at once: a copy reads its address late, and the
    // compiler would wait for that to use the same two registers again.
    constexpr int kLanes = tile::RowLanes(kColumns), kCopies = kWarpKeys * kLanes / 32, kBatch = 8;
    constexpr bool kIsWhole = kColumns / 8 == kLanes;  // every lane has some
    const bool has_chunk = Lane() % kLanes < kColumns / 8;
    constexpr int kPerRow = kCopies / tile::kSwizzleRows;  // copies with the same row modulo 8
#pragma unroll
    for (int first = 0; first < kCopies; first += kBatch) {
      uint32_t at[kBatch];
      const char* from[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int i = (first + u) / kPerRow, j = (first + u) % kPerRow;
        const int m = j % (kWarpKeys / 32), further = j / (kWarpKeys / 32) * tile::kSwizzleRows;
        at[u] = __shfl_sync(0xffffffff, offset[m], i + further, kLanes);  // of key 32 * m + first_row + i + further
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) from[u] = ptx::Address(source, at[u], 16);
      static_assert(kBatch == 8);
      asm volatile(""
                   : "+l"(from[0]), "+l"(from[1]), "+l"(from[2]), "+l"(from[3]), "+l"(from[4]), "+l"(from[5]), "+l"(from[6]),
                     "+l"(from[7]));
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int i = (first + u) / kPerRow, j = (first + u) % kPerRow;
        const int m = j % (kWarpKeys / 32), further = j / (kWarpKeys / 32) * tile::kSwizzleRows;
        // Rows first_row + i (+ 8, + 32, …): first_row is a multiple of 8, so their chunk stands at chunk ^ i.
        const uint32_t row = (target ^ (i << 4)) + (i + 32 * m + further) * tile::kPanelRowBytes;
        if (!kIsWhole && !has_chunk) continue;
        if constexpr (kAllKeys) {
          ptx::CpAsync16(row, from[u]);
        } else {
          ptx::CpAsync16OrZero(row, from[u], at[u] == kNowhere);
        }
      }
    }
  }

  const AttentionParams& params_;
  const int32_t* pages_ = nullptr;
  int32_t my_key_ = 0;
  int32_t end_ = 0;
};

}  // namespace tvm_infer::attention
