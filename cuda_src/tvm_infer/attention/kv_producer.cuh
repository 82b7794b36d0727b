// Feeds the ring: tiles of K and V in the order in which the consumers need them, by one warp (TMA) or two (gather), each for itself.
//
// All copies of a tile count on one barrier: a barrier per page costs about 140 ns each.
#pragma once

#include <cstdint>
#include <type_traits>

#include "tvm_infer/attention/config_sm90.cuh"
#include "tvm_infer/attention/kv_boxes.cuh"
#include "tvm_infer/attention/kv_gather.cuh"
#include "tvm_infer/attention/pace.cuh"
#include "tvm_infer/attention/params.cuh"
#include "tvm_infer/attention/rows.cuh"
#include "tvm_infer/ptx/sync.cuh"

namespace tvm_infer::attention {

template <typename Config>
class KvProducer {
 public:
  using Ring = typename Config::Ring;
  using Tiles = KeyTiles<Config::kTileAlign, Config::kTileKeys>;
  using Copies = std::conditional_t<Config::kIsGather, KvGather<Config>, KvBoxes<Config>>;
  using Tile = typename Copies::Tile;

  __device__ __forceinline__ KvProducer(const AttentionParams& params, const KvTensorMaps& maps, const Ring& ring)
      : copies_(params, maps), ring_(ring), pace_(PlanView(params.plan)) {}

  // Asks for what Run needs first: a work's place in the page table.
  __device__ __forceinline__ void Begin(const Work& work) { copies_.Begin(work); }

  __device__ __forceinline__ void Run(const Work& work) {
    const Tiles tiles(work);
    const bool is_prefill = work.tile_class != kDecodeClass;
    if (!is_prefill || tiles.count == 0) Flush();
    if (tiles.count == 0) return;
    copies_.Enter(work, tiles.base);
    for (int32_t h = 0; h < work.num_kv_heads; ++h) {
      const int32_t head = work.kv_head_begin + h;
      Tile tile = copies_.Load(0);
      if (h == 0) ptx::WaitForPriorGrid();  // the page table may be there already, keys and values may not
      for (int32_t t = 0; t < tiles.count; ++t) {
        const Tile next = copies_.Load(t + 1);
        if (is_prefill) {
          CopyK(tile, head, true);
          Flush();
          pending_ = tile;
          pending_head_ = head;
        } else {
          pace_.Step();
          LimitInFlight();
          CopyK(tile, head, false);
          LimitInFlight();
          CopyV(tile, head, false);
        }
        tile = next;
      }
      if (Config::kQueryBuffers == 1) Flush();  // the consumers drain at the end of a head
    }
    if (work.merge != kNoMerge) Flush();  // the consumers merge before they go on
  }

  // After the last work.
  __device__ __forceinline__ void Finish() {
    Flush();
    pace_.Finish();
    copies_.Finish();
  }

 private:
  // Decode consumes K0 V0 K1 V1 …; prefill K0 K1 V0 K2 V1 …, across heads and works, since it starts on the next logits before it
  // uses these values: a tile of V waits here until the next K is under way, or until there is none.
  __device__ __forceinline__ void Flush() {
    if (pending_head_ < 0) return;
    CopyV(pending_, pending_head_, true);
    pending_head_ = -1;
  }
  // Of the ring's stages only pace_.Stages() are filled ahead: the stage so many turns ago is empty again.
  __device__ __forceinline__ void LimitInFlight() const {
    typename Ring::Cursor oldest = cursor_;
    oldest.Advance(Config::kStages - pace_.Stages());
    ring_.WaitEmpty(oldest);
  }
  // What will be widened is copied to the second of two stages (attention/kv_widener.cuh).
  __device__ __forceinline__ void PassFirstStage(bool is_prefill) {
    if (Config::kPrefillStages == 1 || !is_prefill) return;
    ring_.WaitEmpty(cursor_);
    cursor_.Advance();
  }
  __device__ __forceinline__ void CopyK(const Tile& tile, int32_t head, bool is_prefill) {
    PassFirstStage(is_prefill);
    ring_.WaitEmpty(cursor_);
    copies_.CopyK(tile, head, ring_.Data(cursor_), ring_.FullBarrier(cursor_), is_prefill);
    cursor_.Advance();
  }
  __device__ __forceinline__ void CopyV(const Tile& tile, int32_t head, bool is_prefill) {
    PassFirstStage(is_prefill);
    ring_.WaitEmpty(cursor_);
    copies_.CopyV(tile, head, ring_.Data(cursor_), ring_.FullBarrier(cursor_), is_prefill);
    cursor_.Advance();
  }

  Copies copies_;
  const Ring& ring_;
  typename Ring::Cursor cursor_;
  Pace<Config> pace_;
  Tile pending_;               // of V
  int32_t pending_head_ = -1;  // -1: none
};

}  // namespace tvm_infer::attention
