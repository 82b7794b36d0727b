// Online softmax of two rows a thread, the accumulator layout of mma.sync and wgmma: a quad of lanes holds a row.
//
// State of a row over the keys so far: m = max of the logits (unscaled), l = sum of exp(sm_scale * (s - m)). exp is 2^x with
// sm_scale * log2(e) folded in, one FMA and one special-function operation an element.
#pragma once

#include <cstdint>

#include "tvm_infer/ptx/element.cuh"

namespace tvm_infer::attention {

inline constexpr float kNegInf = -__builtin_huge_valf();
inline constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}
__device__ __forceinline__ float QuadSum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

struct OnlineSoftmax {
  float max[2] = {kNegInf, kNegInf};
  float sum[2] = {0.f, 0.f};  // of this thread's own elements until Finish

  // Turns logits into weights and returns, in `rescale`, what earlier results of each row must be multiplied by.
  // s[4 * j + 2 * i + e]: row i, element e of column block j.
  template <int kCount>
  __device__ __forceinline__ void Update(float (&s)[kCount], float scale_log2, float (&rescale)[2]) {
    Update(s, {scale_log2, scale_log2}, rescale);
  }
  // With a scale of each row.
  template <int kCount>
  __device__ __forceinline__ void Update(float (&s)[kCount], const float (&scales_log2)[2], float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float scale_log2 = scales_log2[i];
      float tile_max = s[2 * i];
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) tile_max = fmaxf(tile_max, fmaxf(s[4 * j + 2 * i], s[4 * j + 2 * i + 1]));
      const float new_max = fmaxf(max[i], QuadMax(tile_max));
      // A row that has seen no key has max = -inf, and -inf - -inf is NaN: subtract 0 instead, so that its weights are 2^-inf = 0.
      const float offset = new_max == kNegInf ? 0.f : new_max * scale_log2;
      rescale[i] = ptx::Exp2(max[i] * scale_log2 - offset);
      max[i] = new_max;
      float tile_sum = 0.f;
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * j + 2 * i + e];
          x = ptx::Exp2(x * scale_log2 - offset);
          tile_sum += x;
        }
      }
      sum[i] = sum[i] * rescale[i] + tile_sum;
    }
  }

  // The same for logits that are small by themselves (variant/variant.h): relative to 0 in place of the maximum, so that nothing is ever
  // rescaled. For weights in a type of float's range.
  template <int kCount>
  __device__ __forceinline__ void UpdateSmall(float (&s)[kCount], float scale_log2, float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      max[i] = 0.f;
      rescale[i] = 1.f;
      float tile_sum = 0.f;
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * j + 2 * i + e];
          x = ptx::Exp2(x * scale_log2);
          tile_sum += x;
        }
      }
      sum[i] += tile_sum;
    }
  }

  __device__ __forceinline__ void SumOverQuad() {
#pragma unroll
    for (int i = 0; i < 2; ++i) sum[i] = QuadSum(sum[i]);
  }
};

// Without softmax: logits are the weights, those of -inf are 0. Partial results add up as those of a softmax do whose maxima are all 0; the
// sum tells "saw a key" from 0.
struct PlainWeights {
  float max[2] = {kNegInf, kNegInf};
  float sum[2] = {0.f, 0.f};

  template <int kCount>
  __device__ __forceinline__ void Update(float (&s)[kCount], float, float (&rescale)[2]) {
    Update(s, {0.f, 0.f}, rescale);
  }
  template <int kCount>
  __device__ __forceinline__ void Update(float (&s)[kCount], const float (&)[2], float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float tile_max = kNegInf;
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * j + 2 * i + e];
          tile_max = x == kNegInf ? tile_max : 0.f;
          x = x == kNegInf ? 0.f : x;
        }
      }
      max[i] = fmaxf(max[i], QuadMax(tile_max));
      sum[i] = max[i] == kNegInf ? 0.f : 1.f;
      rescale[i] = 1.f;
    }
  }
  __device__ __forceinline__ void SumOverQuad() {}
};

// 1 / sum, and 0 for a row without keys: its O is 0.
__device__ __forceinline__ float InverseSum(float sum) { return sum == 0.f ? 0.f : ptx::Reciprocal(sum); }
// Natural logarithm of the sum of exp(sm_scale * s); -inf without keys.
__device__ __forceinline__ float LogSumExp(float max, float sum, float scale_log2) {
  return sum == 0.f ? kNegInf : (max * scale_log2 + ptx::Log2(sum)) * kLn2;
}

}  // namespace tvm_infer::attention
