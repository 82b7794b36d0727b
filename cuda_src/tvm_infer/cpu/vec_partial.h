// Loads and stores of up to a vector: the end of a row whose head_dim is no multiple of kWidth.
#pragma once

#include "tvm_infer/cpu/kernels.h"

namespace tvm_infer::cpu::TVM_INFER_ISA {

// The first n elements of a vector's worth: head_dim is a multiple of 8, so only 16-wide vectors ever meet n < kWidth.
template <typename T>
TVM_INFER_INLINE Vec LoadUpTo(const T* p, int n) {
  if constexpr (kWidth > 8) {
    if (n < kWidth) return LoadPartial(p, n);
  }
  return Load(p);
}
template <typename T>
TVM_INFER_INLINE void StoreUpTo(T* p, Vec a, int n) {
  if constexpr (kWidth > 8) {
    if (n < kWidth) return StorePartial(p, a, n);
  }
  Store(p, a);
}

}  // namespace tvm_infer::cpu::TVM_INFER_ISA
