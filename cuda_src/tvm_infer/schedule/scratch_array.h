// Memory that grows and is kept: the planner allocates nothing once it has seen its largest batch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

namespace tvm_infer {

template <typename T>
class ScratchArray {
 public:
  // Room for `count` elements. The contents are undefined afterwards.
  void Reserve(int64_t count) {
    if (count <= capacity_) return;
    capacity_ = std::max(count, 2 * capacity_);
    data_ = std::unique_ptr<T[]>(new T[capacity_]);
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  std::unique_ptr<T[]> data_;
  int64_t capacity_ = 0;
};

}  // namespace tvm_infer
