// What the computing warps share: the ring, the query buffer's turns, their place among each other.
#pragma once

#include <cstdint>

#include "tvm_infer/attention/config_sm90.cuh"
#include "tvm_infer/attention/params.cuh"
#include "tvm_infer/attention/rows.cuh"
#include "tvm_infer/ptx/address.cuh"
#include "tvm_infer/ptx/mbarrier.cuh"
#include "tvm_infer/ptx/sync.cuh"

namespace tvm_infer::attention {

template <typename Config>
struct Consumer {
  using Ring = typename Config::Ring;
  using SharedMemory = typename Config::SharedMemory;

  const AttentionParams& params;
  const variant::Args& variant;
  const PlanView plan;
  SharedMemory& shared;
  const Ring ring;
  typename Ring::Cursor cursor{};
  uint32_t query_turn = 0;  // turns taken so far; every head of every work is one

  __device__ __forceinline__ static int32_t Thread() { return static_cast<int32_t>(threadIdx.x) - 128; }  // 0 … kConsumerThreads - 1
  __device__ __forceinline__ static int32_t Warp() { return Thread() / 32; }                              // 0 … kConsumerWarps - 1
  __device__ __forceinline__ static int32_t Lane() { return threadIdx.x % 32; }
  // The same as Thread(), read anew, for what is done once a head: addresses that depend on it are computed there. The compiler would
  // compute them before the first work and keep them, and registers are short.
  __device__ __forceinline__ static int32_t ThreadAnew() { return static_cast<int32_t>(ptx::ThreadAnew()) - 128; }

  // What 8-bit keys and values of a head are to be multiplied by; 1 for others.
  __device__ __forceinline__ float KeyScale(int32_t kv_head) const {
    if constexpr (!Config::kIsScaled) return 1.f;
    return params.k_scales == nullptr ? params.k_scale : __ldg(params.k_scales + kv_head);
  }
  __device__ __forceinline__ float ValueScale(int32_t kv_head) const {
    if constexpr (!Config::kIsScaled) return 1.f;
    return params.v_scales == nullptr ? params.v_scale : __ldg(params.v_scales + kv_head);
  }

  __device__ __forceinline__ float SoftmaxScale() const { return attention::SoftmaxScale<typename Config::Variant>(params); }

  // NOTE: from the ring's address, which is at hand; the generic one of `shared` would be kept, or spilled.
  __device__ __forceinline__ uint32_t PrefillQuery(uint32_t turn) const {
    return ring.data + Config::kQueryOffset + turn * Config::kPrefillQueryStride;
  }
  __device__ __forceinline__ uint32_t DecodeQuery(uint32_t turn) const {
    return ring.data + Config::kQueryOffset + turn * Config::kDecodeQueryStride;
  }
  __device__ __forceinline__ void Release(const typename Ring::Cursor& at) const {
    if (Config::kIsGather || Lane() == 0) ring.Release(at);
  }
  // For the tensor cores' own reads (wgmma, the async proxy). A gathered tile was written by cp.async, in the generic proxy, and accesses
  // of different proxies are ordered only where a proxy fence lies on the path between them (PTX ISA, memory consistency model,
  // causality order). The path is: copy, its arrival on the barrier, this wait, this fence, wgmma. TMA writes in the async proxy itself.
  __device__ __forceinline__ void WaitFullForWgmma(const typename Ring::Cursor& at) const {
    ring.WaitFull(at);
    if constexpr (Config::kIsGather) ptx::FenceProxyAsyncShared();
  }
  // The next head's queries belong to the consumers from here …; returns whose turn it is.
  __device__ __forceinline__ uint32_t WaitQuery() {
    const uint32_t turn = query_turn % Config::kQueryTurns, parity = query_turn / Config::kQueryTurns % 2;
    ptx::MbarrierWait(ptx::SharedAddress(shared.query_full + turn), parity);
    ++query_turn;
    return turn;
  }
  // … to here.
  __device__ __forceinline__ void ReleaseQuery(uint32_t turn) { ptx::MbarrierArrive(ptx::SharedAddress(shared.query_empty + turn)); }
};

}  // namespace tvm_infer::attention
