// The least loaded CTA, ties to the lowest index: a tournament of loads. Leaf c is CTA c; a node holds the smaller of its children.
// Against a binary heap of (load, cta): a change walks one fixed path, without branches to mispredict (8 levels for 132 CTAs).
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "tvm_infer/schedule/scratch_array.h"

namespace tvm_infer {

class LoadTree {
 public:
  void Reset(int32_t num_ctas) {
    num_leaves_ = 1;
    while (num_leaves_ < num_ctas) num_leaves_ *= 2;
    node_.Reserve(2 * int64_t{num_leaves_});
    std::fill_n(node_.data(), num_leaves_ + num_ctas, int64_t{0});
    std::fill_n(node_.data() + num_leaves_ + num_ctas, num_leaves_ - num_ctas, std::numeric_limits<int64_t>::max());
    for (int32_t n = num_leaves_ - 1; n > 0; --n) node_[n] = std::min(node_[2 * n], node_[2 * n + 1]);
  }
  int64_t Load(int32_t cta) const { return node_[num_leaves_ + cta]; }
  int32_t Min() const {
    int32_t n = 1;
    while (n < num_leaves_) n = 2 * n + (node_[2 * n + 1] < node_[2 * n]);
    return n - num_leaves_;
  }
  void Set(int32_t cta, int64_t load) {
    int32_t n = num_leaves_ + cta;
    node_[n] = load;
    while (n > 1) {
      load = std::min(load, node_[n ^ 1]);
      n >>= 1;
      node_[n] = load;
    }
  }

 private:
  ScratchArray<int64_t> node_;
  int32_t num_leaves_ = 0;
};

}  // namespace tvm_infer
