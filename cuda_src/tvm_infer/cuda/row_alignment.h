// Kernels move rows 16 bytes at a time: a row that starts elsewhere is refused before the launch.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "tvm_infer/error.h"

namespace tvm_infer::cuda {

inline constexpr int64_t kRowAlignment = 16;  // bytes

struct RowStride {
  int64_t elements;
  int64_t size;  // of the axis; an axis of one entry may have any stride
};

// Throws Error("ArgumentError") naming `name` where a row of the tensor does not start on a 16-byte boundary.
inline void CheckRows(const char* name, const void* data, int64_t element_bytes, std::initializer_list<RowStride> strides) {
  if (reinterpret_cast<uintptr_t>(data) % kRowAlignment != 0) {
    TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` starts " << reinterpret_cast<uintptr_t>(data) % kRowAlignment
                                   << " bytes behind a multiple of 16; rows on a cuda device start on 16-byte boundaries. Cut views at "
                                      "multiples of "
                                   << kRowAlignment / element_bytes << " elements, or copy it (`.clone()`)";
  }
  for (const RowStride& stride : strides) {
    if (stride.size <= 1 || stride.elements * element_bytes % kRowAlignment == 0) continue;
    TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` has a stride of " << stride.elements
                                   << " elements; rows on a cuda device start on 16-byte boundaries, so strides must be multiples of "
                                   << kRowAlignment / element_bytes << ". Make it contiguous";
  }
}

}  // namespace tvm_infer::cuda
