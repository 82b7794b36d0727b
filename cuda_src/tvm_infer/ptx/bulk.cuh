// Bulk copies of plain runs of bytes by the copy engine: addresses and sizes are multiples of 16.
#pragma once

#include <cstdint>

#include "tvm_infer/ptx/tma.cuh"

namespace tvm_infer::ptx {

// `bytes` at `src` to shared memory, counted on `barrier`.
__device__ __forceinline__ void BulkLoad(uint32_t dst, const void* src, uint32_t bytes, uint32_t barrier, uint64_t cache_policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(dst),
               "l"(src), "r"(bytes), "r"(barrier), "l"(cache_policy)
               : "memory");
}

}  // namespace tvm_infer::ptx
