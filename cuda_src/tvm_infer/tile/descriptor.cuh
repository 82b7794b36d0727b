// Matrix descriptors of wgmma, 128-byte swizzle only.
#pragma once

#include <cstdint>

#include "tvm_infer/ptx/wgmma.cuh"

namespace tvm_infer::tile {

// `leading` and `stride` in bytes. K-major: `stride` from 8 rows to the next 8; `leading` unused. MN-major (a transposed operand):
// `leading` from 64 columns to the next 64, `stride` from 8 k to the next 8.
__device__ __forceinline__ constexpr ptx::Descriptor MatrixDescriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  constexpr uint32_t kSwizzle128 = 1u << 30;
  return {(leading >> 4) << 16 | ((address & 0x3ffff) >> 4), kSwizzle128 | stride >> 4};
}

// The same descriptor in every lane, said so that the compiler does its arithmetic once a warp instead of moving every result over.
__device__ __forceinline__ ptx::Descriptor Uniform(ptx::Descriptor d) { return {__shfl_sync(0xffffffff, d.low, 0), d.high}; }

// The same matrix `bytes` further on.
__device__ __forceinline__ ptx::Descriptor Advance(ptx::Descriptor d, uint32_t bytes) { return {d.low + (bytes >> 4), d.high}; }

}  // namespace tvm_infer::tile
