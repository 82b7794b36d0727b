// cp.async: 16-byte copies from global to shared memory by threads, without registers in between.
#pragma once

#include <cstdint>

namespace tvm_infer::ptx {

__device__ __forceinline__ void CpAsync16(uint32_t dst, const void* src) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}

// The same, or 16 zero bytes: nothing is read then.
__device__ __forceinline__ void CpAsync16OrZero(uint32_t dst, const void* src, bool is_zero) {
  asm volatile(
      "{\n"
      ".reg .pred zero;\n"
      "setp.ne.s32 zero, %2, 0;\n"
      "cp.async.cg.shared.global [%0], [%1], 16, zero;\n"
      "}" ::"r"(dst),
      "l"(src), "r"(static_cast<int>(is_zero))
      : "memory");
}

// Arrives on `barrier` when this thread's copies so far are done; one of the arrivals that the barrier was initialised with.
__device__ __forceinline__ void CpAsyncArrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void CpAsyncWaitAll() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace tvm_infer::ptx
