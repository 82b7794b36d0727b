// A ring of shared-memory stages between one producer and several consumer warps.
#pragma once

#include <cstdint>

#include "tvm_infer/ptx/mbarrier.cuh"

namespace tvm_infer::tile {

// Barriers of a ring, two for each stage: `full` counts the producer and its bytes, `empty` counts consumer warps.
template <int kStages>
struct RingBarriers {
  uint64_t full[kStages];
  uint64_t empty[kStages];
};

// A position in a ring: which stage, and which turn around the ring. Producer and consumers each walk their own.
template <int kStages>
struct RingCursor {
  uint32_t stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void Advance(uint32_t steps = 1) {
    stage += steps;
    if (stage >= kStages) {
      stage -= kStages;
      parity ^= 1;
    }
  }
  // By any number of steps.
  __device__ __forceinline__ void Skip(uint32_t steps) {
    parity ^= (stage + steps) / kStages % 2;
    stage = (stage + steps) % kStages;
  }
};

// Addresses of a ring in shared memory.
template <int kStages, int kStageBytes>
struct Ring {
  using Cursor = RingCursor<kStages>;
  uint32_t data;   // kStages * kStageBytes
  uint32_t full;   // first full barrier
  uint32_t empty;  // first empty barrier

  __device__ __forceinline__ uint32_t Data(const Cursor& at) const { return data + at.stage * kStageBytes; }
  __device__ __forceinline__ uint32_t FullBarrier(const Cursor& at) const { return full + at.stage * 8; }
  // NOTE: the producer waits for the opposite parity, so its first turn finds every stage empty.
  __device__ __forceinline__ void WaitEmpty(const Cursor& at) const { ptx::MbarrierWait(empty + at.stage * 8, at.parity ^ 1); }
  __device__ __forceinline__ void WaitFull(const Cursor& at) const { ptx::MbarrierWait(FullBarrier(at), at.parity); }
  // One arrival of those that the barrier waits for, once who it stands for has read the stage.
  __device__ __forceinline__ void Release(const Cursor& at) const { ptx::MbarrierArrive(empty + at.stage * 8); }
};

}  // namespace tvm_infer::tile
