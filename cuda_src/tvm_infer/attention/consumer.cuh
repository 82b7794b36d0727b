// What the computing warps share: the ring, the query buffer's turns, their place among each other.
#pragma once

#include <cstdint>

#include "tvm_infer/attention/config_sm90.cuh"
#include "tvm_infer/attention/params.cuh"
#include "tvm_infer/attention/rows.cuh"
#include "tvm_infer/ptx/address.cuh"
#include "tvm_infer/ptx/mbarrier.cuh"

namespace tvm_infer::attention {

template <typename Config>
struct Consumer {
  using Ring = typename Config::Ring;
  using SharedMemory = typename Config::SharedMemory;

  const AttentionParams& params;
  const PlanView plan;
  SharedMemory& shared;
  const Ring ring;
  const int32_t thread;  // 0 … kConsumerThreads - 1
  const int32_t warp;    // 0 … kConsumerWarps - 1
  const int32_t lane;
  typename Ring::Cursor cursor{};
  uint32_t query_parity = 0;

  __device__ __forceinline__ void Release(const typename Ring::Cursor& at) const {
    if (lane == 0) ring.Release(at);
  }
  // The query buffer belongs to the consumers from here …
  __device__ __forceinline__ void WaitQuery() {
    ptx::MbarrierWait(ptx::SharedAddress(&shared.query_full), query_parity);
    query_parity ^= 1;
  }
  // … to here. By a whole warp.
  __device__ __forceinline__ void ReleaseQuery() {
    __syncwarp();
    if (lane == 0) ptx::MbarrierArrive(ptx::SharedAddress(&shared.query_empty));
  }
};

}  // namespace tvm_infer::attention
