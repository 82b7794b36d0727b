// Matrix descriptors of wgmma, 128-byte swizzle only.
#pragma once

#include <cstdint>

namespace tvm_infer::tile {

// `leading` and `stride` in bytes. K-major: `stride` from 8 rows to the next 8; `leading` unused. MN-major (a transposed operand):
// `leading` from 64 columns to the next 64, `stride` from 8 k to the next 8.
__device__ __forceinline__ constexpr uint64_t MatrixDescriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  return kSwizzle128 | static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(leading >> 4) << 16 | ((address & 0x3ffff) >> 4);
}

// The same matrix `bytes` further on.
__device__ __forceinline__ uint64_t Advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

}  // namespace tvm_infer::tile
