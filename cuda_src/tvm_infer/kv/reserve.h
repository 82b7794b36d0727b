// Room ahead of time, so that what follows cannot fail.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace tvm_infer::kv {

// Room for `size` elements; doubles, so that a sequence that grows page by page allocates only ever more rarely.
template <typename T>
void Reserve2x(std::vector<T>* v, size_t size) {
  if (size > v->capacity()) v->reserve(std::max(size, 2 * v->capacity()));
}

}  // namespace tvm_infer::kv
