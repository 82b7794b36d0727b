// Stands in for a header of TVM that its wheel does not carry, and that tvm/runtime/tensor.h includes for functions nobody here calls:
// saving tensors to a stream and loading them. Declarations only, so that a call would fail to link. The wheel's folder is searched
// first: where it has the header, this one is not seen.
#pragma once

#include <cstddef>

namespace tvm::support {

class Stream {
 public:
  size_t Read(void* data, size_t size);
  size_t Write(const void* data, size_t size);
  template <typename T>
  bool Read(T* value);
  template <typename T>
  void Write(const T& value);
  template <typename T>
  bool ReadArray(T* values, size_t count);
  template <typename T>
  void WriteArray(const T* values, size_t count);
};

}  // namespace tvm::support
