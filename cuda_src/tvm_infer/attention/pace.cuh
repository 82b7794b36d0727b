// Lets the CTAs of a plan that is bound by bandwidth keep pace with each other.
//
// SMs of an H200 get unequal shares of the memory bandwidth: CTAs of equal work end 10 % apart, and the last decides. A share follows from
// the bytes that an SM has in flight, so each CTA compares the tiles that it has asked for with the average of all, and has a quarter less
// in flight when it is ahead (half, with stages of up to 16 KB), a quarter more when it is behind. Measured: 16 requests of 8192 keys 132.3
// -> 126.2 us, 64 of them 486.7 -> 481.5, a skewed batch 153.7 -> 149.4; 64 of them with heads of 64 on an H100 374 -> 358. Only plans
// without prefill are paced (PlanHeader::paced_ctas): beside prefill, which takes next to no bandwidth, decode should run ahead (a mixture
// paced: 599 -> 626 us).
//
// Nobody waits: what an addition to the common count returned is looked at kInterval tiles later.
#pragma once

#include <cstdint>

#include "tvm_infer/ptx/sync.cuh"
#include "tvm_infer/schedule/plan.h"

namespace tvm_infer::attention {

// Of one producer warp. Of two that gather, the second adds nothing and only looks.
template <typename Config>
class Pace {
 public:
  __device__ __forceinline__ explicit Pace(const PlanView& plan) : tickets_(plan.tickets()), paced_ctas_(__ldg(&plan.header->paced_ctas)) {}

  // Stages that may be filled ahead.
  __device__ __forceinline__ int32_t Stages() const { return stages_; }

  // Before a tile of keys is asked for, its K and its V.
  __device__ __forceinline__ void Step() {
    if (++tiles_ % kInterval != 0 || !IsPaced()) return;
    const int32_t all = __shfl_sync(0xffffffff, all_, 0);
    stages_ = Config::kDecodeStages;
    if (all != 0) {  // 0: not asked yet, the first of all to add, or (the second warp) all are done
      // NOTE: own tiles with the addition that returned `all`, which is without it. In 32 bits, which may wrap: then only the pace is off.
      const uint32_t own = static_cast<uint32_t>(tiles_ - kInterval) * static_cast<uint32_t>(paced_ctas_);
      const int32_t ahead = static_cast<int32_t>(own - static_cast<uint32_t>(all));
      if (ahead > 0) stages_ = kFewStages;
      if (ahead < 0) stages_ = kManyStages;
    }
    if (threadIdx.x == 0) {
      all_ = ptx::AtomicAddRelaxed(tickets_ + kTilesAskedTicket, kInterval);
    } else if (Config::kIsGather && threadIdx.x % 32 == 0) {
      all_ = ptx::LoadRelaxed(tickets_ + kTilesAskedTicket);
    }
  }

  // After the last tile. The last CTA leaves the counts at 0 for the next launch: all additions are before it.
  __device__ __forceinline__ void Finish() const {
    if (threadIdx.x != 0 || paced_ctas_ == 0) return;
    if (ptx::AtomicAddAcqRel(tickets_ + kCtasDoneTicket, 1) != paced_ctas_ - 1) return;
    ptx::StoreRelaxed(tickets_ + kTilesAskedTicket, 0);  // NOTE: the second warp may still look at it
    ptx::StoreRelaxed(tickets_ + kCtasDoneTicket, 0);
  }

 private:
  static constexpr int32_t kInterval = 65536 / Config::kStageBytes;  // tiles from one comparison to the next: 128 KB of K and V
  // Small stages: a page of a head is small, too, and CTAs drift apart sooner.
  static constexpr int32_t kFewStages = Config::kStageBytes > 16384 ? Config::kDecodeStages * 3 / 4 : Config::kDecodeStages / 2;
  static constexpr int32_t kManyStages = Config::kDecodeStages * 5 / 4 < Config::kStages ? Config::kDecodeStages * 5 / 4 : Config::kStages;
  static_assert(kFewStages >= 2, "K and V of a tile");

  __device__ __forceinline__ bool IsPaced() const { return __any_sync(0xffffffff, paced_ctas_ != 0); }

  int32_t* const tickets_;
  const int32_t paced_ctas_;
  int32_t tiles_ = 0;  // asked for by this CTA
  int32_t all_ = 0;    // lane 0: asked for by all CTAs, when this one last counted
  int32_t stages_ = Config::kDecodeStages;
};

}  // namespace tvm_infer::attention
