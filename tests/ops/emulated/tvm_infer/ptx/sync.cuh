// Stands in for ptx/sync.cuh on the host, where launches follow each other.
#pragma once

namespace tvm_infer::ptx {

inline void WaitForPriorGrid() {}
inline void AllowDependentGrid() {}
inline uint32_t ThreadAnew() { return threadIdx.x; }

// Of all threads that were launched.
inline void BarrierSync(int, int) { __syncthreads(); }

}  // namespace tvm_infer::ptx
