// The warp that feeds the ring: pages of K and V by TMA, in the order in which the consumers need them.
//
// Lane i copies page i of a tile (prefill K: panel i % kPanels of page i / kPanels), so one warp instruction issues a tile. All
// copies of a tile count on one barrier: a barrier per page costs about 140 ns each.
#pragma once

#include <cstdint>

#include "tvm_infer/attention/config_sm90.cuh"
#include "tvm_infer/attention/params.cuh"
#include "tvm_infer/attention/rows.cuh"

namespace tvm_infer::attention {

template <typename Config>
class KvProducer {
 public:
  using Ring = typename Config::Ring;
  using Tiles = KeyTiles<Config::kPageSize, Config::kTileKeys>;

  __device__ __forceinline__ KvProducer(const AttentionParams& params, const KvTensorMaps& maps, const Ring& ring)
      : params_(params), maps_(maps), ring_(ring), lane_(threadIdx.x % 32) {}

  __device__ __forceinline__ void Run(const Work& work) {
    const Tiles tiles(work);
    if (tiles.count == 0) return;
    const bool is_prefill = work.tile_class != kDecodeClass;
    const uint64_t policy = is_prefill ? ptx::kEvictNormal : ptx::kEvictFirst;
    const int32_t* pages = params_.kv_page_indices + __ldg(params_.kv_page_indptr + work.kv_list) + tiles.base / Config::kPageSize;
    const int32_t num_pages = (work.kv_end - tiles.base + Config::kPageSize - 1) / Config::kPageSize;
    for (int32_t h = 0; h < work.num_kv_heads; ++h) {
      const int32_t head = work.kv_head_begin + h;
      // Decode consumes K0 V0 K1 V1 …; prefill K0 K1 V0 K2 V1 …, since it starts on the next logits before it uses these values.
      int32_t page = LoadPage(pages, 0, num_pages), previous_page = page;
      for (int32_t t = 0; t < tiles.count; ++t) {
        const int32_t next_page = LoadPage(pages, t + 1, num_pages);
        const int32_t count = PagesOf(t, num_pages);
        if (is_prefill) {
          IssuePanels(page, count, head, policy);
          if (t > 0) IssuePages(maps_.v_pages, previous_page, PagesOf(t - 1, num_pages), head, policy);
          if (t + 1 == tiles.count) IssuePages(maps_.v_pages, page, count, head, policy);
        } else {
          IssuePages(maps_.k_pages, page, count, head, policy);
          IssuePages(maps_.v_pages, page, count, head, policy);
        }
        previous_page = page;
        page = next_page;
      }
    }
  }

 private:
  __device__ __forceinline__ static int32_t PagesOf(int32_t tile, int32_t num_pages) {
    return min(Config::kPagesPerTile, num_pages - tile * Config::kPagesPerTile);
  }
  // Page `lane` of a tile. Table entries behind the last page may be garbage and are not read.
  __device__ __forceinline__ int32_t LoadPage(const int32_t* pages, int32_t tile, int32_t num_pages) const {
    const int32_t i = tile * Config::kPagesPerTile + lane_;
    return lane_ < Config::kPagesPerTile && i < num_pages ? __ldg(pages + i) : 0;
  }
  __device__ __forceinline__ uint32_t Acquire(int32_t count) {
    ring_.WaitEmpty(cursor_);
    if (lane_ == 0) ptx::MbarrierArriveExpectTx(ring_.FullBarrier(cursor_), count * Config::Boxes::kPageBytes);
    __syncwarp();  // NOTE: the bytes must be expected before a copy of this stage can complete the phase
    return ring_.Data(cursor_);
  }
  __device__ __forceinline__ void IssuePages(const ptx::TensorMap& map, int32_t page, int32_t count, int32_t head, uint64_t policy) {
    const uint32_t stage = Acquire(count);
    if (lane_ < count) {
      ptx::TmaLoad5d(stage + lane_ * Config::Boxes::kPageBytes, &map, ring_.FullBarrier(cursor_), policy, 0, 0, 0, head, page);
    }
    cursor_.Advance();
  }
  // K for wgmma: panel by panel over the whole tile, so that 8-key groups stand at one stride.
  __device__ __forceinline__ void IssuePanels(int32_t page, int32_t count, int32_t head, uint64_t policy) {
    const uint32_t stage = Acquire(count);
    const int32_t index = lane_ / Config::kPanels, panel = lane_ % Config::kPanels;
    const int32_t my_page = __shfl_sync(0xffffffff, page, index);
    if (index < count) {
      const uint32_t dst = stage + panel * Config::kTileKeys * tile::kPanelRowBytes + index * Config::Boxes::kPanelBytes;
      ptx::TmaLoad5d(dst, &maps_.k_panels, ring_.FullBarrier(cursor_), policy, 0, 0, panel, head, my_page);
    }
    cursor_.Advance();
  }

  const AttentionParams& params_;
  const KvTensorMaps& maps_;
  const Ring& ring_;
  const int32_t lane_;
  typename Ring::Cursor cursor_;
};

}  // namespace tvm_infer::attention
