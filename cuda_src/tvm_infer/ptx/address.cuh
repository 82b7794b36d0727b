// Addresses as PTX wants them.
#pragma once

#include <cstdint>

namespace tvm_infer::ptx {

__device__ __forceinline__ uint32_t SharedAddress(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// base + index * stride, in bytes.
__device__ __forceinline__ const char* Address(const char* base, uint32_t index, uint32_t stride) {
  uint64_t offset;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(offset) : "r"(index), "r"(stride));  // NOTE: else the compiler adds a high word of 0
  return base + offset;
}

}  // namespace tvm_infer::ptx
