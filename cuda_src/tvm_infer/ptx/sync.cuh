// Named barriers, proxy fences, release and acquire across CTAs, register reallocation, programmatic dependent launch.
#pragma once

#include <cstdint>

namespace tvm_infer::ptx {

// Barrier `id` (1 … 15; 0 is __syncthreads) for `threads` threads.
__device__ __forceinline__ void BarrierSync(int id, int threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void BarrierArrive(int id, int threads) {
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Orders this thread's ordinary accesses to shared memory before later ones by the tensor cores and the copy engine.
__device__ __forceinline__ void FenceProxyAsyncShared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Adds and returns the old value. What this thread saw before (its CTA's stores, after a barrier) is visible to who acquires it after.
__device__ __forceinline__ int32_t AtomicAddAcqRel(int32_t* address, int32_t value) {
  int32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(value) : "memory");
  return old;
}

// What was released to this word before is visible after it.
__device__ __forceinline__ int32_t LoadAcquire(const int32_t* address) {
  int32_t x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(address) : "memory");
  return x;
}
// The word becomes `value` if it was `expected`; returns what it was. Releases and acquires as AtomicAddAcqRel.
__device__ __forceinline__ int32_t CompareAndSwapAcqRel(int32_t* address, int32_t expected, int32_t value) {
  int32_t old;
  asm volatile("atom.acq_rel.gpu.global.cas.b32 %0, [%1], %2, %3;" : "=r"(old) : "l"(address), "r"(expected), "r"(value) : "memory");
  return old;
}

// The following are atomic and order nothing. AtomicAddRelaxed returns the old value.
__device__ __forceinline__ int32_t AtomicAddRelaxed(int32_t* address, int32_t value) {
  int32_t old;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(value) : "memory");
  return old;
}

__device__ __forceinline__ int32_t LoadRelaxed(const int32_t* address) {
  int32_t x;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(address) : "memory");
  return x;
}
__device__ __forceinline__ void StoreRelaxed(int32_t* address, int32_t value) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// threadIdx.x, read anew: what depends on it is computed where it is needed, not before and kept.
__device__ __forceinline__ uint32_t ThreadAnew() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// By all warps of a warpgroup, each role on its own side of one branch.
template <int kRegisters>
__device__ __forceinline__ void RegistersIncrease() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void RegistersDecrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Waits until the kernels this launch depends on have finished and their writes are visible. Returns at once in an ordinary launch.
__device__ __forceinline__ void WaitForPriorGrid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Lets a dependent grid start its prologue as soon as there is room for it.
__device__ __forceinline__ void AllowDependentGrid() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

}  // namespace tvm_infer::ptx
