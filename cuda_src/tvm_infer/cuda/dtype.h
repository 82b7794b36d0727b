// Element types that CUDA kernels take, and how kernels are named after them.
#pragma once

#include <cstdint>

namespace tvm_infer::cuda {

enum class DTypeTag : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat8E4M3 = 3, kFloat8E5M2 = 4 };  // as cpu::DType

inline constexpr int32_t ElementBytes(DTypeTag dtype) { return dtype == DTypeTag::kFloat32 ? 4 : dtype <= DTypeTag::kBFloat16 ? 2 : 1; }
// Keys and values that a scale turns into values.
inline constexpr bool IsScaled(DTypeTag dtype) { return dtype > DTypeTag::kBFloat16; }

// "bf16", as in kernel names.
inline const char* Suffix(DTypeTag dtype) {
  switch (dtype) {
    case DTypeTag::kFloat32:
      return "fp32";
    case DTypeTag::kFloat16:
      return "fp16";
    case DTypeTag::kBFloat16:
      return "bf16";
    case DTypeTag::kFloat8E4M3:
      return "e4m3";
    case DTypeTag::kFloat8E5M2:
      return "e5m2";
  }
  return "";
}

}  // namespace tvm_infer::cuda
