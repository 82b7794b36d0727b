// The warp that feeds the ring: pages of K and V by TMA, in the order in which the consumers need them.
//
// Lane i copies page i of a tile (prefill K: panel i % kPanels of page i / kPanels), so one warp instruction issues a tile. All
// copies of a tile count on one barrier: a barrier per page costs about 140 ns each.
#pragma once

#include <cstdint>

#include "tvm_infer/attention/config_sm90.cuh"
#include "tvm_infer/attention/params.cuh"
#include "tvm_infer/attention/rows.cuh"
#include "tvm_infer/ptx/tma.cuh"

namespace tvm_infer::attention {

template <typename Config>
class KvProducer {
 public:
  using Ring = typename Config::Ring;
  using Tiles = KeyTiles<Config::kPageSize, Config::kTileKeys>;

  __device__ __forceinline__ KvProducer(const AttentionParams& params, const KvTensorMaps& maps, const Ring& ring)
      : params_(params), maps_(maps), ring_(ring), lane_(threadIdx.x % 32) {}

  // Asks for what Run needs first: a work's place in the page table.
  __device__ __forceinline__ void Begin(const Work& work) { pages_ = params_.kv_page_indices + __ldg(params_.kv_indptr + work.kv_list); }

  __device__ __forceinline__ void Run(const Work& work) {
    const Tiles tiles(work);
    const bool is_prefill = work.tile_class != kDecodeClass;
    if (!is_prefill || tiles.count == 0) Flush();
    if (tiles.count == 0) return;
    const int32_t* pages = pages_ + tiles.base / Config::kPageSize;
    const int32_t num_pages = (work.kv_end - tiles.base + Config::kPageSize - 1) / Config::kPageSize;
    for (int32_t h = 0; h < work.num_kv_heads; ++h) {
      const int32_t head = work.kv_head_begin + h;
      int32_t page = LoadPage(pages, 0, num_pages);
      for (int32_t t = 0; t < tiles.count; ++t) {
        const int32_t next_page = LoadPage(pages, t + 1, num_pages);
        const int32_t count = min(Config::kPagesPerTile, num_pages - t * Config::kPagesPerTile);
        if (is_prefill) {
          IssuePanels(page, count, head);
          Flush();
          pending_page_ = page;
          pending_head_ = head;
        } else {
          LimitInFlight();
          IssuePages(maps_.k_pages, page, count, head, ptx::kEvictFirst);
          LimitInFlight();
          IssuePages(maps_.v_pages, page, count, head, ptx::kEvictFirst);
        }
        page = next_page;
      }
    }
    if (work.merge != kNoMerge) Flush();  // the consumers merge before they go on
  }

  // Decode consumes K0 V0 K1 V1 …; prefill K0 K1 V0 K2 V1 …, across heads and works, since it starts on the next logits before it
  // uses these values: a tile of V waits here until the next K is under way, or until there is none.
  __device__ __forceinline__ void Flush() {
    if (pending_head_ < 0) return;
    // Pages behind the last lie outside the tensor: the copy engine fills them with zeros, since a weight of 0 times NaN is NaN.
    IssuePages(maps_.v_pages, pending_page_, Config::kPagesPerTile, pending_head_, ptx::kEvictNormal);
    pending_head_ = -1;
  }

 private:
  static constexpr int32_t kNoPage = 0x7fffffff;

  // Page `lane` of a tile. Table entries behind the last page may be garbage and are not read.
  __device__ __forceinline__ int32_t LoadPage(const int32_t* pages, int32_t tile, int32_t num_pages) const {
    const int32_t i = tile * Config::kPagesPerTile + lane_;
    return lane_ < Config::kPagesPerTile && i < num_pages ? __ldg(pages + i) : kNoPage;
  }
  // Of the ring's stages only kDecodeStages are filled ahead: the stage so many turns ago is empty again.
  __device__ __forceinline__ void LimitInFlight() const {
    typename Ring::Cursor oldest = cursor_;
    oldest.Advance(Config::kStages - Config::kDecodeStages);
    ring_.WaitEmpty(oldest);
  }
  __device__ __forceinline__ uint32_t Acquire(int32_t count) {
    ring_.WaitEmpty(cursor_);
    if (lane_ == 0) ptx::MbarrierArriveExpectTx(ring_.FullBarrier(cursor_), count * Config::Boxes::kPageBytes);
    __syncwarp();  // NOTE: the bytes must be expected before a copy of this stage can complete the phase
    return ring_.Data(cursor_);
  }
  __device__ __forceinline__ void IssuePages(const cuda::TensorMap& map, int32_t page, int32_t count, int32_t head, uint64_t policy) {
    const uint32_t stage = Acquire(count);
    if (lane_ < count) {
      ptx::TmaLoad5d(stage + lane_ * Config::Boxes::kPageBytes, &map, ring_.FullBarrier(cursor_), policy, 0, 0, 0, head, page);
    }
    cursor_.Advance();
  }
  // K for wgmma: panel by panel over the whole tile, so that 8-key groups stand at one stride.
  __device__ __forceinline__ void IssuePanels(int32_t page, int32_t count, int32_t head) {
    const uint32_t stage = Acquire(count);
    const int32_t index = lane_ / Config::kPanels, panel = lane_ % Config::kPanels;
    const int32_t my_page = __shfl_sync(0xffffffff, page, index);
    if (index < count) {
      const uint32_t dst = stage + panel * Config::kTileKeys * tile::kPanelRowBytes + index * Config::Boxes::kPanelBytes;
      ptx::TmaLoad5d(dst, &maps_.k_panels, ring_.FullBarrier(cursor_), ptx::kEvictNormal, 0, 0, panel, head, my_page);
    }
    cursor_.Advance();
  }

  const AttentionParams& params_;
  const KvTensorMaps& maps_;
  const Ring& ring_;
  const int32_t lane_;
  typename Ring::Cursor cursor_;
  const int32_t* pages_ = nullptr;  // of the work's list
  int32_t pending_page_ = kNoPage;  // of a tile of V
  int32_t pending_head_ = -1;       // -1: none
};

}  // namespace tvm_infer::attention
