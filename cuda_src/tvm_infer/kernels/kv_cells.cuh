// What new keys and values become in the cache: themselves, or 8-bit floats. One type each, for the kernels that append.
#pragma once

#include <cstdint>

#include "tvm_infer/ptx/element.cuh"
#include "tvm_infer/ptx/float8.cuh"

namespace tvm_infer::kernels {

// x / scale, correctly rounded where the result is one of 8 bits: the quotient by way of the reciprocal, corrected by what it left over
// (Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990). 5 instructions where a division takes 8
// and a call.
__device__ __forceinline__ float Divide(float x, float scale, float reciprocal) {
  constexpr float kBeyond = 65536;  // the largest value there is, of E5M2, is 57344
  const float quotient = x * reciprocal;
  // What saturates may be infinite, and leave NaN over. NOTE: with these signs -0 stays -0.
  return fabsf(quotient) < kBeyond ? fmaf(fmaf(quotient, scale, -x), -reciprocal, quotient) : quotient;
}

// Elements of 16 bits, kept as they are.
struct CopiedCells {
  static constexpr int64_t kElementBytes = 2;
  using Vector = uint4;  // of 8 elements

  __device__ __forceinline__ explicit CopiedCells(float) {}
  __device__ __forceinline__ Vector Convert(const uint4& x) const { return x; }
};

// 8-bit floats of elements that are times `scale` as large.
template <typename Element, typename Float8>
struct QuantisedCells {
  static constexpr int64_t kElementBytes = 1;
  using Vector = uint2;
  float scale, reciprocal;

  __device__ __forceinline__ explicit QuantisedCells(float of) : scale(of), reciprocal(__frcp_rn(of)) {}
  __device__ __forceinline__ uint32_t Pair(float low, float high) const {
    return ptx::PackFloat8<Float8>(Divide(low, scale, reciprocal), Divide(high, scale, reciprocal));
  }
  __device__ __forceinline__ uint32_t Pair(uint32_t word) const {
    const float2 x = ptx::Unpack<Element>(word);
    return Pair(x.x, x.y);
  }
  __device__ __forceinline__ Vector Convert(const uint4& x) const {
    return make_uint2(Pair(x.x) | Pair(x.y) << 16, Pair(x.z) | Pair(x.w) << 16);
  }
};

}  // namespace tvm_infer::kernels
