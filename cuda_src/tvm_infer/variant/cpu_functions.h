// How the CPU executor calls a variant: by plain functions over a run of keys, which the generated source instantiates.
#pragma once

#include <cstdint>

#include "tvm_infer/variant/variant.h"

namespace tvm_infer::variant {

inline constexpr int32_t kVariantAbi = 1;  // bumped when a struct of this folder changes

struct CpuFunctions {
  int32_t abi;  // kVariantAbi
  // scores[i], sm_scale * q . k of key kv_pos + i, becomes the variant's logit in units of log2, -inf where the mask hides the key.
  // Null for a variant without logits and mask.
  void (*logits)(const Args& args, const Row& row, int32_t kv_pos, int32_t count, float* scores);
  // o[i], an element of the normalised output, becomes the variant's. `lse`: natural logarithm, -inf for a row without keys. Null: none.
  void (*output)(const Args& args, const Row& row, float lse, int32_t count, float* o);
};

template <typename Variant>
void LogitsOfRow(const Args& args, const Row& row, int32_t kv_pos, int32_t count, float* scores) {
  constexpr float kLog2E = 1.4426950408889634f;
  const Args p = args;  // NOTE: copies, which nothing can alias: else every store of a score would reload them
  const Row r = row;
  for (int32_t i = 0; i < count; ++i) {
    float x = scores[i];
    if constexpr (Variant::kHasLogits) x = Variant::Logits(p, r, kv_pos + i, x, 1.f);
    x *= kLog2E;
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
constexpr CpuFunctions FunctionsOf() {
  CpuFunctions f{kVariantAbi, nullptr, nullptr};
  if constexpr (Variant::kHasLogits || Variant::kHasMask) f.logits = LogitsOfRow<Variant>;
  if constexpr (Variant::kHasOutput) f.output = OutputOfRow<Variant>;
  return f;
}

// A variant as one call has it.
struct Call {
  const char* digest;       // of the generated struct: part of the kernel's name on CUDA
  const CpuFunctions* cpu;  // null: the call is for CUDA
  const Args* args;
};

}  // namespace tvm_infer::variant

// What the source of a variant for the CPU ends with. NAME: the generated struct's.
#define TVM_INFER_VARIANT_CPU(NAME)                                                                     \
  extern "C" __attribute__((visibility("default"))) const tvm_infer::variant::CpuFunctions NAME##_cpu = \
      tvm_infer::variant::FunctionsOf<NAME>()
