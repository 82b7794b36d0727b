// Attention on Hopper: one persistent, warp-specialised kernel that walks a Plan. Prefill, append, decode and mixtures are one launch.
//
// A CTA executes its works in order. Warp 0 (gather: and 3) copies K and V into a ring of tiles, warps 1 and 2 bring queries, and two
// warpgroups compute: a work's tile class says how (attention/prefill_tile.cuh, attention/decode_tile.cuh). Beside keys of 8 bits a fourth
// warpgroup widens what prefill computes with (attention/kv_widener.cuh). Each role walks the works for itself; they meet only at the
// barriers of the ring and of the query buffer. Where the plan cut the keys of a row, the last CTA to finish merges.
#pragma once

#include <cstdint>

#include "tvm_infer/attention/config_sm90.cuh"
#include "tvm_infer/attention/decode_tile.cuh"
#include "tvm_infer/attention/kv_producer.cuh"
#include "tvm_infer/attention/kv_widener.cuh"
#include "tvm_infer/attention/params.cuh"
#include "tvm_infer/attention/plan_check.cuh"
#include "tvm_infer/attention/prefill_tile.cuh"
#include "tvm_infer/attention/query_loader.cuh"
#include "tvm_infer/attention/rows.cuh"
#include "tvm_infer/kernels/merge.cuh"
#include "tvm_infer/kernels/merge_tiles.cuh"
#include "tvm_infer/ptx/address.cuh"
#include "tvm_infer/ptx/float8.cuh"
#include "tvm_infer/ptx/mbarrier.cuh"
#include "tvm_infer/ptx/sync.cuh"
#include "tvm_infer/ptx/tma.cuh"
#include "tvm_infer/schedule/plan.h"

namespace tvm_infer::kernels {

// After a work whose rows were cut: this CTA's partial rows are written. The last of the merge's CTAs to arrive merges them all.
template <typename Config>
__device__ __forceinline__ void ArriveAndMerge(attention::Consumer<Config>& c, int32_t merge) {
  const MergeJob job(c.plan, merge);
  ptx::BarrierSync(Config::kBarrierConsumers, Config::kConsumerThreads);
  if (c.Thread() == 0) {
    int32_t* arrivals = c.plan.tickets() + kNumTickets + merge;
    const bool is_last = ptx::AtomicAddAcqRel(arrivals, 1) == job.num_slots - 1;
    if (is_last) *arrivals = 0;  // for the next launch
    c.shared.is_last_arrival = is_last;
  }
  ptx::BarrierSync(Config::kBarrierConsumers, Config::kConsumerThreads);
  if (!c.shared.is_last_arrival) return;
  MergeRows(c, job, c.Warp(), Config::kConsumerWarps, Config::kConsumerWarps);
}

template <typename Config>
__device__ __forceinline__ void AttentionSm90(const attention::AttentionParams& params, const attention::KvTensorMaps& maps,
                                              const variant::Args& variant) {
  using namespace attention;
  using SharedMemory = typename Config::SharedMemory;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<SharedMemory*>(shared_bytes);

  const int32_t warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  const typename Config::Ring ring{ptx::SharedAddress(shared.ring), ptx::SharedAddress(shared.ring_barriers.full),
                                   ptx::SharedAddress(shared.ring_barriers.empty)};
  const uint32_t query_full = ptx::SharedAddress(shared.query_full), query_empty = ptx::SharedAddress(shared.query_empty);
  constexpr int kQueryLoaders = 2;
  if (threadIdx.x == 0) {
    if constexpr (!Config::kIsGather) {
      ptx::PrefetchTensorMap(&maps.k_pages);
      ptx::PrefetchTensorMap(&maps.v_pages);
      if constexpr (!Config::kIsRagged) ptx::PrefetchTensorMap(&maps.k_panels);
    }
    for (int i = 0; i < Config::kStages; ++i) {
      ptx::MbarrierInit(ring.full + 8 * i, Config::kFullArrivals);
      ptx::MbarrierInit(ring.empty + 8 * i, Config::kEmptyArrivals);
    }
    for (int i = 0; i < Config::kQueryTurns; ++i) {
      ptx::MbarrierInit(query_full + 8 * i, 32 * kQueryLoaders);
      ptx::MbarrierInit(query_empty + 8 * i, Config::kConsumerThreads);
    }
    ptx::MbarrierInitFence();
  }
  ptx::AllowDependentGrid();
  // The plan, q, K, V and the buffers written below may be the prior grid's. A plan that is ready is read meanwhile: each role waits where
  // it needs more than the plan and the page table.
  if (params.plan_is_ready == 0) ptx::WaitForPriorGrid();

  // NOTE: the first work has a fixed place, so that it arrives together with the header: from here to the first copy of K are three
  // loads, one after the other (work, kv_indptr, page).
  const PlanView plan(params.plan);
  const Work first = LoadWorkInOrder(plan.first_works(), blockIdx.x);
  constexpr int kCheckingWarp = 3;
  bool stops = first.num_rows == 0;
  if (warp == kCheckingWarp) stops |= PlanCheck(plan, params.expected, gridDim.x).Stops(blockIdx.x);
  // NOTE: the vote tells the compiler that all of a warp leave or stay; it gives up its uniform registers otherwise.
  if (__any_sync(0xffffffff, __syncthreads_or(stops))) {
    ptx::WaitForPriorGrid();  // NOTE: who waits for this grid waits for those ahead of it
    if (warp == kCheckingWarp && blockIdx.x == 0) PlanCheck(plan, params.expected, gridDim.x).Report(plan);
    return;
  }

  if (warp < 4) {
    ptx::RegistersDecrease<Config::kProducerRegisters>();
    if (warp == 0 || (Config::kIsGather && warp == 3)) {
      KvProducer<Config> producer(params, maps, ring);
      producer.Begin(first);
      asm volatile("" ::: "memory");  // NOTE: else the stream's own loads go first, and the compiler waits for them here
      WorkStream works(plan, blockIdx.x, first);
      while (true) {
        works.Prefetch();
        producer.Run(works.work);
        if (!works.Next()) break;
        producer.Begin(works.work);
      }
      producer.Finish();
    } else if (warp <= kQueryLoaders) {
      const int32_t first_row = (warp - 1) * QueryLoader<Config>::kRows;
      const uint32_t buffer = ptx::SharedAddress(shared.query) + first_row * Config::kRowWidth * 2;
      QueryLoader<Config> loader(params, variant, plan, shared, buffer, query_full, query_empty, first_row);
      WorkStream works(plan, blockIdx.x, first);
      ptx::WaitForPriorGrid();
      do {
        works.Prefetch();
        loader.Run(works.work);
      } while (works.Next());
    }
  } else if (Config::kWidenerThreads == 0 || warp < 4 + Config::kConsumerWarps) {
    ptx::RegistersIncrease<Config::kConsumerRegisters>();
    const WorkQueue queue(plan, blockIdx.x);
    Consumer<Config> consumer{params, variant, plan, shared, ring};
    PrefillTile<Config> prefill(consumer);
    DecodeTile<Config> decode(consumer);
    ptx::WaitForPriorGrid();
    prefill.GiveFirstTurn();
    for (int32_t i = queue.begin; i < queue.end; ++i) {
      // NOTE: the copy of the first work is read again: it is in the L1 now, and its twelve words in registers would spill.
      const Work work = i == queue.begin ? LoadWork(plan.first_works(), blockIdx.x) : LoadWork(queue.works, i);
      if constexpr (Config::kWidenerThreads > 0) MeetAfterDecode<Config>(queue, i, work);
      if (work.tile_class == kDecodeClass) {
        decode.Run(work);
      } else if (work.kv_end <= work.kv_begin) {
        prefill.RunEmpty(work);
      } else {
        i = prefill.Run(queue, i, work);
      }
      const Work done = LoadWork(queue.works, i);
      if constexpr (Config::Variant::kTakesSharedKeys) {  // else plans have no such works
        if (done.merge_tiles > 0) {
          ArriveAndMergeTiles(consumer, queue.works + i, i == queue.end - 1);
          continue;
        }
      }
      if (done.merge != kNoMerge) ArriveAndMerge(consumer, done.merge);
    }
  } else if constexpr (Config::kWidenerThreads > 0) {
    ptx::RegistersDecrease<Config::kWidenerRegisters>();
    KvWidener<Config> widener(ring);
    const WorkQueue queue(plan, blockIdx.x);
#pragma unroll 1
    for (int32_t i = queue.begin; i < queue.end; ++i) {
      const Work work = LoadWork(queue.works, i);
      MeetAfterDecode<Config>(queue, i, work);
      widener.Run(work);
    }
    widener.Flush();
  }
}

}  // namespace tvm_infer::kernels

// A kernel by name: what generated source expands, one line for each specialisation, behind the alias NAME##Config; `ARGUMENTS`: the
// variant's, and after it the kernel's parameter that they are, if it has one.
#define TVM_INFER_ATTENTION_SM90_OF(NAME, ARGUMENTS, ...)                                                                     \
  extern "C" __global__ void __launch_bounds__(NAME##Config::kThreads, 1)                                                     \
      NAME(const __grid_constant__ tvm_infer::attention::AttentionParams params,                                              \
           const __grid_constant__ tvm_infer::attention::KvTensorMaps maps __VA_OPT__(, ) __VA_ARGS__) {                      \
    tvm_infer::kernels::AttentionSm90<NAME##Config>(params, maps, ARGUMENTS);                                                 \
  }                                                                                                                           \
  extern "C" __device__ const tvm_infer::cuda::KernelInfo NAME##_info = {tvm_infer::cuda::kKernelAbi, NAME##Config::kThreads, \
                                                                         sizeof(NAME##Config::SharedMemory), 1, NAME##Config::kTileKeys}

// KV_ELEMENT: ELEMENT, or of 8 bits. PAGE_SIZE: or tvm_infer::attention::kRagged.
#define TVM_INFER_ATTENTION_SM90(NAME, ELEMENT, KV_ELEMENT, HEAD_DIM, HEAD_DIM_VO, PAGE_SIZE)                                          \
  using NAME##Config = tvm_infer::attention::ConfigSm90<tvm_infer::ptx::ELEMENT, HEAD_DIM, PAGE_SIZE, tvm_infer::attention::NoVariant, \
                                                        tvm_infer::ptx::KV_ELEMENT, HEAD_DIM_VO>;                                      \
  TVM_INFER_ATTENTION_SM90_OF(NAME, {})
// With a variant's struct, which the source defines before.
#define TVM_INFER_ATTENTION_SM90_VARIANT(NAME, ELEMENT, KV_ELEMENT, HEAD_DIM, HEAD_DIM_VO, PAGE_SIZE, VARIANT)                          \
  using NAME##Config =                                                                                                                  \
      tvm_infer::attention::ConfigSm90<tvm_infer::ptx::ELEMENT, HEAD_DIM, PAGE_SIZE, VARIANT, tvm_infer::ptx::KV_ELEMENT, HEAD_DIM_VO>; \
  TVM_INFER_ATTENTION_SM90_OF(NAME, args, const __grid_constant__ tvm_infer::variant::Args args)
