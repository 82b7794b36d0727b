// cp.async: 16-byte copies from global to shared memory by threads, without registers in between.
#pragma once

#include <cstdint>

namespace tvm_infer::ptx {

__device__ __forceinline__ void CpAsync16(uint32_t dst, const void* src) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}

__device__ __forceinline__ void CpAsyncWaitAll() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace tvm_infer::ptx
