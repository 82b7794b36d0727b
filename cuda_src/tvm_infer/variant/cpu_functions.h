// How the CPU executor calls a variant: by plain functions over a run of keys, which the generated source instantiates.
#pragma once

#include <cstdint>

#include "tvm_infer/variant/variant.h"

namespace tvm_infer::variant {

inline constexpr int32_t kVariantAbi = 2;  // bumped when a struct of this folder changes

struct CpuFunctions {
  int32_t abi;  // kVariantAbi
  // scores[i], sm_scale * q . k of key kv_pos + i, becomes the variant's logit in units of log2, -inf where the mask hides the key.
  // Null for a variant without logits and mask.
  void (*logits)(const Args& args, const Row& row, int32_t kv_pos, int32_t count, float* scores);
  // o[i], an element of the normalised output, becomes the variant's. `lse`: natural logarithm, -inf for a row without keys. Null: none.
  void (*output)(const Args& args, const Row& row, float lse, int32_t count, float* o);
  // Cosine and sine of the angles by which a query or key at position `pos` turns, [num_pairs] each. Null: nothing turns.
  void (*turn)(const Args& args, const Row& row, int32_t pos, int32_t num_pairs, float* cos, float* sin);
  // A head's elements x [head_dim] become what enters the product; cos, sin: what `turn` gave for its position, if there is one. Null:
  // none.
  void (*query)(const Args& args, const Row& row, int32_t head_dim, const float* cos, const float* sin, float* x);
  void (*key)(const Args& args, const Row& row, int32_t kv_pos, int32_t head_dim, const float* cos, const float* sin, float* x);
  int32_t rotary_dim;   // 0: all
  int32_t has_softmax;  // 0: what `logits` gives are weights, not in units of log2; -inf is the weight 0
};

template <typename Variant>
void LogitsOfRow(const Args& args, const Row& row, int32_t kv_pos, int32_t count, float* scores) {
  constexpr float kLog2E = 1.4426950408889634f;
  const Args p = args;  // NOTE: copies, which nothing can alias: else every store of a score would reload them
  const Row r = row;
  for (int32_t i = 0; i < count; ++i) {
    float x = scores[i];
    if constexpr (Variant::kHasLogits) x = Variant::Logits(p, r, kv_pos + i, x, 1.f);
    if constexpr (Variant::kHasSoftmax) x *= kLog2E;
    if constexpr (Variant::kHasMask) x = Variant::Mask(p, r, kv_pos + i) ? x : -__builtin_huge_valf();
    scores[i] = x;
  }
}

template <typename Variant>
void OutputOfRow(const Args& args, const Row& row, float lse, int32_t count, float* o) {
  const Args p = args;
  const Row r = row;
  for (int32_t i = 0; i < count; ++i) o[i] = Variant::Output(p, r, lse, o[i]);
}

template <typename Variant>
void TurnOfPosition(const Args& args, const Row& row, int32_t pos, int32_t num_pairs, float* cos, float* sin) {
  const Args p = args;
  const Row r = row;
  if constexpr (Variant::kHasPosition) pos = Variant::Position(p, r, pos);
  for (int32_t i = 0; i < num_pairs; ++i) {
    const host_math::CosSin turn = host_math::CosSinOf(pos, Variant::Rate(p, r, i));
    cos[i] = turn.cos;
    sin[i] = turn.sin;
  }
}

// The first elements in pairs, each turned.
template <typename Variant>
TVM_INFER_VARIANT void TurnElements(int32_t head_dim, const float* cos, const float* sin, float* x) {
  const int32_t pairs = (Variant::kRotaryDim == 0 ? head_dim : Variant::kRotaryDim) / 2;
  const int32_t step = Variant::kIsInterleaved ? 2 : 1, apart = Variant::kIsInterleaved ? 1 : pairs;
  for (int32_t i = 0; i < pairs; ++i) {
    const float a = x[i * step], b = x[i * step + apart];
    x[i * step] = a * cos[i] - b * sin[i];
    x[i * step + apart] = b * cos[i] + a * sin[i];
  }
}

TVM_INFER_VARIANT float MeanSquare(int32_t count, const float* x) {
  float sum = 0.f;
  for (int32_t i = 0; i < count; ++i) sum += x[i] * x[i];
  return sum / static_cast<float>(count);
}

template <typename Variant>
void QueryOfRow(const Args& args, const Row& row, int32_t head_dim, const float* cos, const float* sin, float* x) {
  if constexpr (Variant::kHasQuery) {
    const Args p = args;
    const Row r = row;
    float square = 0.f;
    if constexpr (Variant::kQueryNeedsSquare) square = MeanSquare(head_dim, x);
    for (int32_t i = 0; i < head_dim; ++i) x[i] = Variant::Query(p, r, i, square, x[i]);
  }
  if constexpr (Variant::kHasRate) TurnElements<Variant>(head_dim, cos, sin, x);
}

template <typename Variant>
void KeyOfPosition(const Args& args, const Row& row, int32_t kv_pos, int32_t head_dim, const float* cos, const float* sin, float* x) {
  if constexpr (Variant::kHasKey) {
    const Args p = args;
    const Row r = row;
    float square = 0.f;
    if constexpr (Variant::kKeyNeedsSquare) square = MeanSquare(head_dim, x);
    for (int32_t i = 0; i < head_dim; ++i) x[i] = Variant::Key(p, r, kv_pos, i, square, x[i]);
  }
  if constexpr (Variant::kHasRate) TurnElements<Variant>(head_dim, cos, sin, x);
}

template <typename Variant>
constexpr CpuFunctions FunctionsOf() {
  CpuFunctions f{};
  f.abi = kVariantAbi;
  f.rotary_dim = Variant::kRotaryDim;
  f.has_softmax = Variant::kHasSoftmax ? 1 : 0;
  if constexpr (Variant::kHasRate) f.turn = TurnOfPosition<Variant>;
  if constexpr (Variant::kHasQuery || Variant::kHasRate) f.query = QueryOfRow<Variant>;
  if constexpr (Variant::kHasKey || Variant::kHasRate) f.key = KeyOfPosition<Variant>;
  if constexpr (Variant::kHasLogits || Variant::kHasMask) f.logits = LogitsOfRow<Variant>;
  if constexpr (Variant::kHasOutput) f.output = OutputOfRow<Variant>;
  return f;
}

// A variant as one call has it.
struct Call {
  const char* digest;       // of the generated struct: part of the kernel's name on CUDA
  const CpuFunctions* cpu;  // null: the call is for CUDA
  const Args* args;
  bool takes_shared_keys;  // the struct's kTakesSharedKeys: of works with rows of several requests
};

}  // namespace tvm_infer::variant

// What the source of a variant for the CPU ends with. NAME: the generated struct's.
#define TVM_INFER_VARIANT_CPU(NAME)                                                                     \
  extern "C" __attribute__((visibility("default"))) const tvm_infer::variant::CpuFunctions NAME##_cpu = \
      tvm_infer::variant::FunctionsOf<NAME>()
