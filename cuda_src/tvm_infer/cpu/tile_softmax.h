// Online softmax of one row, block of keys by block of keys (section 2.2 of arXiv 2501.01005; base 2, the scale is in the scores).
#pragma once

#include "tvm_infer/cpu/kernels.h"

namespace tvm_infer::cpu::TVM_INFER_ISA {

// A row's running state. O in scratch is relative to 2^max; the sum is kept per lane and added up once, at the end.
struct SoftmaxState {
  float max;
  alignas(64) float sum[kWidth];
};

// Turns scores s[begin, end) into probabilities 2^(s - max), and the rest of the vectors that overlap columns [first, last) into 0.
// Returns what O must be multiplied by first: 1 where the maximum stands.
TVM_INFER_INLINE float SoftmaxBlock(float* s, int first, int last, int begin, int end, SoftmaxState* state) {
  first -= first % kWidth;
  Vec highest = Set1(state->max);
  for (int c = first; c < last; c += kWidth) {
    Vec x = Load(s + c);
    if (c < begin || c + kWidth > end) {
      x = KeepLanes(x, begin - c, end - c);
      Store(s + c, x);
    }
    highest = Max(x, highest);
  }
  const float max = ReduceMax(highest);
  // All -inf so far: any finite reference makes every probability 0, where -inf - -inf would make it NaN.
  const float reference = max == -__builtin_inff() ? 0.f : max;
  float rescale = 1.f;
  Vec sum = Load(state->sum);
  if (max != state->max) {
    const Vec factor = Exp2(Set1(state->max - reference));
    float lanes[kWidth];
    Store(lanes, factor);
    rescale = lanes[0];
    sum = Mul(sum, factor);
    state->max = max;
  }
  const Vec shift = Set1(reference);
  for (int c = first; c < last; c += kWidth) {
    const Vec p = Exp2(Sub(Load(s + c), shift));
    Store(s + c, p);
    sum = Add(sum, p);
  }
  Store(state->sum, sum);
  return rescale;
}

// The same for a variant without softmax: scores are weights, those of -inf become 0. The state tells "saw a key": max and log2 of the sum
// are 0 then, O is neither rescaled nor divided.
TVM_INFER_INLINE void WeightBlock(float* s, int first, int last, int begin, int end, SoftmaxState* state) {
  first -= first % kWidth;
  last = (last + kWidth - 1) / kWidth * kWidth;
  bool sees_key = false;
  for (int c = first; c < last; ++c) {
    const bool is_seen = c >= begin && c < end && s[c] != -__builtin_inff();
    s[c] = is_seen ? s[c] : 0.f;
    sees_key |= is_seen;
  }
  if (sees_key) state->max = 0.f, state->sum[0] = 1.f;
}

}  // namespace tvm_infer::cpu::TVM_INFER_ISA
