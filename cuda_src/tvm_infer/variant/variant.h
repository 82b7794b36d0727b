// What the generated code of an attention variant is given, and what it may call. Included by generated sources for the CPU (any C++17
// compiler) and for CUDA alike: plain structs, no standard library beyond <cmath>.
//
// A generated struct derives from Defaults and has the members
//   static constexpr bool kHasLogits, kHasMask, kHasOutput;
//   static constexpr bool kReadsByKey;                                                  // a table by kv_pos, which must be good then
//   static float Logits(const Args& p, const Row& row, int32_t kv_pos, float score, float scale);   // the value: score * scale
//   static bool Mask(const Args& p, const Row& row, int32_t kv_pos);                   // whether the row sees the key
//   static bool SeesAll(const Args& p, const Row& row, int32_t first, int32_t last);   // true only if the row sees the keys first … last
//   static float Output(const Args& p, const Row& row, float lse, float value);        // of an element of O
// and where a constant of Defaults says so
//   static float Query(const Args& p, const Row& row, int32_t channel, float mean_square, float value);              // of an element of q
//   static float Key(const Args& p, const Row& row, int32_t kv_pos, int32_t channel, float mean_square, float value);  // of k
//   static float Rate(const Args& p, const Row& row, int32_t pair);       // radians a position that the pair turns, after Query and Key
//   static int32_t Position(const Args& p, const Row& row, int32_t pos);  // what Rate is multiplied by
// each marked TVM_INFER_VARIANT; those that a variant has not are never called.
#pragma once

#include <cmath>
#include <cstdint>

#include "tvm_infer/variant/host_math.h"
#include "tvm_infer/variant/mark.h"

namespace tvm_infer::variant {

inline constexpr int32_t kMaxScalars = 16;
inline constexpr int32_t kMaxTables = 8;
inline constexpr int32_t kMaxRank = 4;  // of a table

// A tensor parameter. Elements are fp32, fp16, bf16, int32 or uint8, as the generated code was made for.
struct Table {
  const void* data;
  int32_t strides[kMaxRank];  // elements
};

// A call's parameters. Passed to kernels by value.
struct Args {
  uint32_t scalars[kMaxScalars];  // bits of a float or of an int32_t
  Table tables[kMaxTables];

  TVM_INFER_VARIANT int32_t Int(int i) const { return static_cast<int32_t>(scalars[i]); }
  TVM_INFER_VARIANT float Float(int i) const {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(scalars[i]);
#else
    float x;
    __builtin_memcpy(&x, &scalars[i], sizeof x);
    return x;
#endif
  }
};

// A row of queries: one head of one token.
struct Row {
  int32_t batch;    // request
  int32_t qo_head;  // query head
  int32_t kv_head;  // its KV head
  int32_t q_pos;    // position in the request: kv_len - q_len for the first query of this call
  int32_t q_len;    // the request's queries in this call
  int32_t kv_len;   // its keys
};

// Constants of a generated struct that it need not have. A row's `qo_head` and `q_pos` mean nothing to Key, Rate and Position.
struct Defaults {
  static constexpr bool kHasQuery = false, kHasKey = false, kHasRate = false, kHasPosition = false;
  static constexpr bool kQueryNeedsSquare = false, kKeyNeedsSquare = false;  // `mean_square`, of the head's elements
  static constexpr bool kIsInterleaved = false;                              // pair i: channels 2i, 2i + 1; else i, i + kRotaryDim / 2
  static constexpr int kRotaryDim = 0;                                       // channels that turn, a multiple of 16; 0: all
  static constexpr bool kHasSoftmax = true;                                  // false: logits are the weights
  static constexpr bool kHasSmallLogits = false;  // they stay within [-64, 64]: their exponentials need no maximum taken off
  // Works with rows of several requests, against keys that these share: not where there is a mask or a rotation, or where Logits, Query or
  // Key read a row's batch, q_len or kv_len. kReadsPosition: Logits or Query read its q_pos.
  static constexpr bool kTakesSharedKeys = true, kReadsPosition = false;
};

// Functions of expressions. tanh on CUDA is the hardware's (relative error 2^-11); the others have relative errors of 2e-6 at most.
#if defined(__CUDA_ARCH__)
TVM_INFER_VARIANT float Tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
TVM_INFER_VARIANT float Exp(float x) { return __expf(x); }
TVM_INFER_VARIANT float Exp2(float x) { return exp2f(x); }
TVM_INFER_VARIANT float Log(float x) { return __logf(x); }
TVM_INFER_VARIANT float Log2(float x) { return __log2f(x); }
TVM_INFER_VARIANT float Sigmoid(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.f + __expf(-x)));
  return y;
}
// NOTE: by the reciprocal, which is computed once where y is the same for all logits.
TVM_INFER_VARIANT float Divide(float x, float y) { return x * __frcp_rn(y); }
#else
TVM_INFER_VARIANT float Tanh(float x) { return host_math::Tanh(x); }
TVM_INFER_VARIANT float Exp(float x) { return host_math::Exp(x); }
TVM_INFER_VARIANT float Exp2(float x) { return host_math::Exp2(x); }
TVM_INFER_VARIANT float Log(float x) { return logf(x); }
TVM_INFER_VARIANT float Log2(float x) { return log2f(x); }
TVM_INFER_VARIANT float Sigmoid(float x) { return host_math::Sigmoid(x); }
TVM_INFER_VARIANT float Divide(float x, float y) { return x / y; }
#endif
TVM_INFER_VARIANT float Sqrt(float x) { return sqrtf(x); }
TVM_INFER_VARIANT float Abs(float x) { return fabsf(x); }
TVM_INFER_VARIANT float Min(float x, float y) { return fminf(x, y); }
TVM_INFER_VARIANT float Max(float x, float y) { return fmaxf(x, y); }
TVM_INFER_VARIANT float Cos(float x) { return cosf(x); }
TVM_INFER_VARIANT float Sin(float x) { return sinf(x); }
TVM_INFER_VARIANT int32_t Abs(int32_t x) { return x < 0 ? -x : x; }
TVM_INFER_VARIANT int32_t Min(int32_t x, int32_t y) { return x < y ? x : y; }
TVM_INFER_VARIANT int32_t Max(int32_t x, int32_t y) { return x < y ? y : x; }
// Rounded towards minus infinity, as Python and TIR do. y > 0.
TVM_INFER_VARIANT int32_t FloorDivide(int32_t x, int32_t y) { return x >= 0 ? x / y : -((-x + y - 1) / y); }
TVM_INFER_VARIANT int32_t FloorModulo(int32_t x, int32_t y) { return x - FloorDivide(x, y) * y; }

// Elements of tables. `at`: the sum of index times stride.
TVM_INFER_VARIANT float LoadFp32(const Table& t, int64_t at) { return static_cast<const float*>(t.data)[at]; }
TVM_INFER_VARIANT int32_t LoadInt32(const Table& t, int64_t at) { return static_cast<const int32_t*>(t.data)[at]; }
TVM_INFER_VARIANT int32_t LoadUint8(const Table& t, int64_t at) { return static_cast<const uint8_t*>(t.data)[at]; }
TVM_INFER_VARIANT float FloatOfBits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
#endif
}
TVM_INFER_VARIANT float LoadBf16(const Table& t, int64_t at) {
  return FloatOfBits(static_cast<uint32_t>(static_cast<const uint16_t*>(t.data)[at]) << 16);
}
// Exact: the exponent is moved by a product, so that subnormal numbers come out right.
TVM_INFER_VARIANT float LoadFp16(const Table& t, int64_t at) {
  const uint32_t bits = static_cast<const uint16_t*>(t.data)[at], magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  const bool is_finite = magnitude < 0x0f800000u;
  const float x = FloatOfBits(magnitude) * 5.192296858534828e+33f;  // 2^112
  const float y = is_finite ? x : FloatOfBits(0x7f800000u | magnitude);
  return sign != 0 ? -y : y;
}

}  // namespace tvm_infer::variant
