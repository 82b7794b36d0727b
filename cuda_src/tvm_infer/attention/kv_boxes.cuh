// Copies of K and V by TMA: pages of 8 tokens or more, or ragged rows.
//
// Lane i copies box i of a tile (K of pages for prefill: panel i % kPanels of page i / kPanels), so one warp instruction issues a tile.
// Ragged keys are rows of one tensor, so one box of as many rows is a tile. Heads that end within a panel are copied panel by panel, and
// what lies behind their end arrives as zeros.
#pragma once

#include <cstdint>

#include "tvm_infer/attention/config_sm90.cuh"
#include "tvm_infer/attention/params.cuh"
#include "tvm_infer/attention/rows.cuh"
#include "tvm_infer/ptx/mbarrier.cuh"
#include "tvm_infer/ptx/tma.cuh"

namespace tvm_infer::attention {

template <typename Config>
class KvBoxes {
 public:
  // Lane i: where box i of a tile begins: a page or, ragged, a row. kNowhere, outside the tensor, if there is no such box.
  struct Tile {
    int32_t place = kNowhere;
    int32_t count = 0;  // boxes
  };

  __device__ __forceinline__ KvBoxes(const AttentionParams& params, const KvTensorMaps& maps) : params_(params), maps_(maps) {}

  // Asks for what Enter needs: the list's place in the page table, or its first row.
  __device__ __forceinline__ void Begin(const Work& work) {
    const int32_t first = __ldg(params_.kv_indptr + work.kv_list);
    if constexpr (Config::kIsRagged) {
      first_row_ = first;
    } else {
      pages_ = params_.kv_page_indices + first;
    }
  }
  // The keys of a work; `base` is the first tile's first.
  __device__ __forceinline__ void Enter(const Work& work, int32_t base) {
    num_boxes_ = (work.kv_end - base + Config::kBoxKeys - 1) / Config::kBoxKeys;
    if constexpr (Config::kIsRagged) {
      first_row_ += base;
    } else {
      pages_ += base / Config::kPageSize;
    }
  }
  // Table entries behind the last page may be garbage and are not read.
  __device__ __forceinline__ Tile Load(int32_t tile) const {
    const int32_t i = tile * Config::kBoxesPerTile + Lane();
    if constexpr (Config::kIsRagged) return {first_row_ + i * Config::kBoxKeys, 1};
    return {Lane() < Config::kBoxesPerTile && i < num_boxes_ ? __ldg(pages_ + i) : kNowhere,
            min(Config::kBoxesPerTile, num_boxes_ - tile * Config::kBoxesPerTile)};
  }

  // To an empty stage; `full` is its barrier.
  __device__ __forceinline__ void CopyK(const Tile& tile, int32_t head, uint32_t stage, uint32_t full, bool is_prefill) const {
    if (!is_prefill || Config::kBoxKeys == Config::kTileKeys || Config::kIsScaled) {
      CopyPages<typename Config::Boxes>(maps_.k_pages, tile, tile.count, head, stage, full, is_prefill);
    } else {
      Expect<typename Config::Boxes>(full, tile.count);
      CopyPanels<Config::kTileKeys * tile::kPanelRowBytes, Config::Boxes::kPanelBytes>(Config::kIsPadded ? maps_.k_pages : maps_.k_panels,
                                                                                       tile.place, tile.count, head, stage, full, true);
    }
  }
  __device__ __forceinline__ void CopyV(const Tile& tile, int32_t head, uint32_t stage, uint32_t full, bool is_prefill) const {
    // Prefill multiplies whole tiles: what lies outside the tensor arrives as zeros, since a weight of 0 times NaN is NaN.
    CopyPages<typename Config::ValueBoxes>(maps_.v_pages, tile, is_prefill && !Config::kIsScaled ? Config::kBoxesPerTile : tile.count, head,
                                           stage, full, is_prefill);
  }
  __device__ __forceinline__ void Finish() const {}

 private:
  static constexpr int32_t kNowhere = 0x7fffffff;

  __device__ __forceinline__ static int32_t Lane() { return threadIdx.x % 32; }

  template <typename Boxes>
  __device__ __forceinline__ static void Expect(uint32_t full, int32_t boxes) {
    if (Lane() == 0) ptx::MbarrierArriveExpectTx(full, boxes * Boxes::kPageBytes);
    __syncwarp();  // NOTE: the bytes must be expected before a copy of this stage can complete the phase
  }
  // Page after page.
  template <typename Boxes>
  __device__ __forceinline__ static void CopyPages(const cuda::TensorMap& map, const Tile& tile, int32_t count, int32_t head,
                                                   uint32_t stage, uint32_t full, bool is_prefill) {
    Expect<Boxes>(full, count);
    if constexpr (Config::kIsPadded) {
      CopyPanels<Boxes::kPanelBytes, Boxes::kPageBytes>(map, tile.place, count, head, stage, full, is_prefill);
    } else if (Lane() < count) {
      Copy(map, tile.place, 0, head, stage + Lane() * Boxes::kPageBytes, full, is_prefill);
    }
  }
  // Panel by panel, kPanelStride bytes from one of a page to the next, kPageStride from page to page. K of pages for wgmma has its panels
  // over the whole tile, so that 8-key groups stand at one stride.
  template <int kPanelStride, int kPageStride>
  __device__ __forceinline__ static void CopyPanels(const cuda::TensorMap& map, int32_t place, int32_t count, int32_t head, uint32_t stage,
                                                    uint32_t full, bool is_prefill) {
    static_assert(Config::kBoxesPerTile * Config::kPanels <= 32, "one for each lane");
    const int32_t index = Lane() / Config::kPanels, panel = Lane() % Config::kPanels;
    const int32_t at = __shfl_sync(0xffffffff, place, index);
    if (index < count) Copy(map, at, panel, head, stage + panel * kPanelStride + index * kPageStride, full, is_prefill);
  }
  __device__ __forceinline__ static void Copy(const cuda::TensorMap& map, int32_t place, int32_t panel, int32_t head, uint32_t dst,
                                              uint32_t full, bool is_prefill) {
    const int32_t row = Config::kIsRagged ? place : 0, page = Config::kIsRagged ? 0 : place;
    const int32_t column = Config::kIsPadded ? panel * tile::kPanelElements : 0;  // of its axes see cuda/params.h
    ptx::TmaLoad5d(dst, &map, full, is_prefill ? ptx::kEvictNormal : ptx::kEvictFirst, column, row, Config::kIsPadded ? 0 : panel, head,
                   page);
  }

  const AttentionParams& params_;
  const KvTensorMaps& maps_;
  const int32_t* pages_ = nullptr;
  int32_t first_row_ = 0;
  int32_t num_boxes_ = 0;
};

}  // namespace tvm_infer::attention
