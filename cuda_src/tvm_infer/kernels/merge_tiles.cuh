// Merges of a work of shared keys, or beside such: one for each of its heads and of the tiles in its rows (Work::merge_tiles).
#pragma once

#include <cstdint>

#include "tvm_infer/attention/consumer.cuh"
#include "tvm_infer/kernels/arrivals.cuh"
#include "tvm_infer/kernels/merge.cuh"
#include "tvm_infer/ptx/sync.cuh"
#include "tvm_infer/schedule/plan.h"

namespace tvm_infer::kernels {

// One warp's: an eighth of the merges of a work, a lane for each.
//
// NOTE: what is needed of the plan is loaded before the arrival. Each acquire empties the L1, and loads behind it are trips to the L2.
template <typename Config>
class TileMerges {
 public:
  __device__ __forceinline__ TileMerges(attention::Consumer<Config>& c, const Work* work)
      : c_(c), base_(__ldg(&work->merge)), heads_(__ldg(&work->num_kv_heads)), count_(heads_ * __ldg(&work->merge_tiles)) {}

  __device__ __forceinline__ int32_t Count() const { return count_; }
  // Turns to merge `first` and those at a distance of eight behind it.
  __device__ __forceinline__ void Select(int32_t first) {
    const int32_t i = first + c_.ThreadAnew() % 32 * Config::kConsumerWarps;
    is_mine_ = i < count_;
    const int32_t index = is_mine_ ? base_ + i / heads_ * c_.params.expected.num_kv_heads + i % heads_ : base_;
    const int32_t* indptr = c_.plan.merge_indptr() + index;
    first_slot_ = __ldg(indptr);
    num_slots_ = __ldg(indptr + 1) - first_slot_;
    const int4 words = __ldg(reinterpret_cast<const int4*>(c_.plan.merges() + index));
    merge_ = {words.x, words.y, words.z, words.w};
    turn_ = index / c_.params.expected.num_kv_heads / Config::kConsumerWarps;
    slots_ = c_.plan.merge_slots();
    word_ = c_.plan.tickets() + kNumTickets + index;
  }

  // This CTA's partials are written. Merges what is complete; waits for others and helps with them if `may_help`.
  __device__ __forceinline__ void Arrive(bool may_help) {
    Arrivals now{0, num_slots_};
    const bool helps = may_help && is_mine_ && now.MayHaveHelpers();
    const uint32_t added = helps ? Arrivals::kArrived + Arrivals::kHelps : Arrivals::kArrived;
    if (is_mine_) now.word = ptx::AtomicAddAcqRel(word_, static_cast<int32_t>(added));
    const int32_t place = now.Helpers();
    now.word += added;
    const bool is_last = is_mine_ && now.AreAll();
    bool is_ready = is_last, waits = helps && !is_last;
#pragma unroll 1
    for (int32_t polls = 0;; ++polls) {
      MergeReady(now, is_ready, helps, is_ready ? now.Shares(helps, is_last) : 0, place);
      if (!__any_sync(0xffffffff, waits)) break;
      is_ready = false;
      if (waits) {
        now.word = ptx::LoadRelaxed(word_);
        if (now.AreAll()) {
          now.word = ptx::LoadAcquire(word_);
          is_ready = true;
        } else if (polls >= kMostPolls) {
          is_ready = StaysFor(now);
          waits = is_ready;
        }
        waits = waits && !is_ready;
      }
    }
  }

 private:
  // How often a helper looks, each time a trip to the L2: about 20 us.
  static constexpr int32_t kMostPolls = 32;

  // Leaves, unless all are here meanwhile. `now`: as last seen.
  __device__ __forceinline__ bool StaysFor(Arrivals& now) const {
    while (!now.AreAll()) {
      const uint32_t word = now.word;
      now.word = ptx::CompareAndSwapAcqRel(word_, static_cast<int32_t>(word), static_cast<int32_t>(word + Arrivals::kLeft));
      if (now.word == word) return false;
    }
    return true;
  }

  // This warp's shares of the merges that have become complete (`is_ready`, a lane for each), and the end of their words.
  __device__ __forceinline__ void MergeReady(Arrivals now, bool is_ready, bool helps, int32_t shares, int32_t place) const {
    if (is_ready && helps) now.word = ptx::AtomicAddRelaxed(word_, static_cast<int32_t>(Arrivals::kSeen)) + Arrivals::kSeen;
    const int32_t at_once = RowsAtOnce(num_slots_), chunks = (merge_.num_rows + at_once - 1) / at_once;
    const int32_t chunk = Arrivals::FirstChunk(place, shares, turn_, chunks);
    uint32_t left = __ballot_sync(0xffffffff, shares > 0 && chunk < chunks);
    __syncwarp();  // what a lane has acquired is all lanes' to read; a ballot does not say so
#pragma unroll 1
    for (; left != 0; left &= left - 1) {
      const int32_t lane = __ffs(left) - 1;
      const auto of_lane = [&](int32_t x) { return __shfl_sync(0xffffffff, x, lane); };
      const Merge merge{of_lane(merge_.row_begin), of_lane(merge_.num_rows), of_lane(merge_.kv_head_begin), 1};
      const MergeJob job(merge, slots_ + of_lane(first_slot_), of_lane(num_slots_));
      MergeRows(c_, job, of_lane(chunk * at_once), 1, of_lane(shares));
    }
    if (is_ready && now.AreDone()) *word_ = 0;  // for the next launch
  }

  attention::Consumer<Config>& c_;
  const int32_t base_, heads_, count_;
  bool is_mine_ = false;
  Merge merge_;
  int32_t first_slot_, num_slots_, turn_;
  const int32_t* slots_;
  int32_t* word_;
};

// After such a work. Each warp arrives at an eighth of its merges, all at once. `is_last_work`: of this CTA.
template <typename Config>
__device__ __forceinline__ void ArriveAndMergeTiles(attention::Consumer<Config>& c, const Work* work, bool is_last_work) {
  constexpr int32_t kLanes = 32 * Config::kConsumerWarps;
  TileMerges<Config> merges(c, work);
  merges.Select(c.Warp());
  ptx::BarrierSync(Config::kBarrierConsumers, Config::kConsumerThreads);
  const bool may_help = is_last_work && merges.Count() <= kLanes;  // it would wait before it has arrived at all
#pragma unroll 1
  for (int32_t first = c.Warp();;) {
    merges.Arrive(may_help);
    first += kLanes;
    if (first >= merges.Count()) break;
    merges.Select(first);
  }
}

}  // namespace tvm_infer::kernels
