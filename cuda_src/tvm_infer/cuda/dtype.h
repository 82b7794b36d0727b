// Element types that CUDA kernels take, and how kernels are named after them.
#pragma once

#include <cstdint>

#include "tvm_infer/element_type.h"

namespace tvm_infer::cuda {

using DTypeTag = ElementType;

// Of types of whole bytes.
inline constexpr int32_t ElementBytes(DTypeTag dtype) { return ElementBits(dtype) / 8; }
// "bf16", as in kernel names.
inline constexpr const char* Suffix(DTypeTag dtype) { return RowOf(dtype).suffix; }

}  // namespace tvm_infer::cuda
