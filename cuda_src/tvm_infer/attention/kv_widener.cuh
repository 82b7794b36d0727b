// A warpgroup that makes of tiles of 8-bit keys and values what the tensor cores want for prefill: float16, panel by panel over the whole
// tile. It is a link between the copies and the warpgroups that compute: a tile takes two stages of the ring, the copy fills the second,
// and widened it fills both. The second's barrier says that the copy is there, the first's that the tile is.
//
// Decode reads the elements as they are, a stage each, and passes this by (MeetAfterDecode).
#pragma once

#include <cstdint>

#include "tvm_infer/attention/config_sm90.cuh"
#include "tvm_infer/attention/rows.cuh"
#include "tvm_infer/attention/widen_tile.cuh"
#include "tvm_infer/ptx/mbarrier.cuh"
#include "tvm_infer/ptx/sync.cuh"

namespace tvm_infer::attention {

// Before work `i`, by those that compute and those that widen: these, who run ahead through works of decode, wait behind them. A barrier of
// the ring tells its phases apart by one bit, so nobody may look at one that is two turns away.
template <typename Config>
__device__ __forceinline__ void MeetAfterDecode(const WorkQueue& queue, int32_t i, const Work& work) {
  if (work.tile_class == kDecodeClass || i == queue.begin || __ldg(&queue.works[i - 1].tile_class) != kDecodeClass) return;
  ptx::BarrierSync(Config::kBarrierDecoded, Config::kConsumerThreads + Config::kWidenerThreads);
}

template <typename Config>
class KvWidener {
 public:
  using Ring = typename Config::Ring;
  using Tiles = KeyTiles<Config::kTileAlign, Config::kTileKeys>;

  __device__ __forceinline__ explicit KvWidener(const Ring& ring) : ring_(ring) {}

  // The tiles of a work, in the order in which they are copied (KvProducer).
  __device__ __forceinline__ void Run(const Work& work) {
    const Tiles tiles(work);
    const bool is_prefill = work.tile_class != kDecodeClass;
    if (!is_prefill || tiles.count == 0) Flush();
    if (!is_prefill) {
      cursor_.Skip(2 * tiles.count * work.num_kv_heads);
      return;
    }
#pragma unroll 1
    for (int32_t head = 0; head < work.num_kv_heads; ++head) {
#pragma unroll 1
      for (int32_t first = 0; first < tiles.count * Config::kTileKeys; first += Config::kTileKeys) {
        Widen(0, Config::kTileKeys);
        Flush();
        pending_begin_ = work.kv_begin - tiles.base - first;
        pending_end_ = work.kv_end - tiles.base - first;
      }
      if (Config::kQueryBuffers == 1) Flush();
    }
    if (work.merge != kNoMerge) Flush();
  }

  // A tile of values that was left.
  __device__ __forceinline__ void Flush() {
    if (pending_end_ == 0) return;
    Widen(pending_begin_, pending_end_);
    pending_end_ = 0;
  }

 private:
  // The tile at the cursor.
  __device__ __forceinline__ void Widen(int32_t begin, int32_t end) {
    typename Ring::Cursor copy = cursor_;
    copy.Advance();
    ring_.WaitFull(copy);
    const uint32_t thread = ptx::ThreadAnew() % Config::kWidenerThreads;
    WidenTile<Config>::Run(ring_.Data(copy), ring_.Data(cursor_), thread, begin, end);
    ptx::FenceProxyAsyncShared();
    ptx::BarrierSync(Config::kBarrierWiden, Config::kWidenerThreads);
    if (thread == 0) ptx::MbarrierArrive(ring_.FullBarrier(cursor_));
    cursor_.Advance(Config::kPrefillStages);
  }

  const Ring& ring_;
  typename Ring::Cursor cursor_;
  int32_t pending_begin_ = 0, pending_end_ = 0;  // keys of a tile of values, from its first on; its end is above 0
};

}  // namespace tvm_infer::attention
