// Element types that CUDA kernels take, and how kernels are named after them.
#pragma once

#include <cstdint>

namespace tvm_infer::cuda {

enum class DTypeTag : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };  // as cpu::DType

// "bf16", as in kernel names.
inline const char* Suffix(DTypeTag dtype) {
  switch (dtype) {
    case DTypeTag::kFloat32:
      return "fp32";
    case DTypeTag::kFloat16:
      return "fp16";
    case DTypeTag::kBFloat16:
      return "bf16";
  }
  return "";
}

}  // namespace tvm_infer::cuda
