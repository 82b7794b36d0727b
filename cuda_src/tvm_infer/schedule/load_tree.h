// The least loaded CTA, ties to the lowest index: a tournament of keys (load, CTA). Leaf c is CTA c; a node holds the smaller of its
// children. Against a binary heap: a change walks one fixed path with no branch to mispredict (8 levels for 132 CTAs, 10 ns).
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "tvm_infer/schedule/scratch_array.h"

namespace tvm_infer {

class LoadTree {
 public:
  // Loads up to max_load will be set; they are compared in units of 2^shift where they would not fit a key beside the CTA's index (with
  // 132 CTAs, from 2^55 ps = 10 hours on).
  void Reset(const int64_t* loads, int32_t num_ctas, int64_t max_load) {
    cta_bits_ = std::bit_width(static_cast<uint32_t>(num_ctas - 1));
    num_leaves_ = int64_t{1} << cta_bits_;
    shift_ = std::max(0, static_cast<int>(std::bit_width(static_cast<uint64_t>(max_load))) - (63 - cta_bits_));
    node_.Reserve(2 * num_leaves_);
    for (int32_t c = 0; c < num_ctas; ++c) node_[num_leaves_ + c] = Key(c, loads[c]);
    std::fill(node_.data() + num_leaves_ + num_ctas, node_.data() + 2 * num_leaves_, std::numeric_limits<int64_t>::max());
    for (int64_t n = num_leaves_ - 1; n > 0; --n) node_[n] = std::min(node_[2 * n], node_[2 * n + 1]);
  }
  int32_t Min() const { return static_cast<int32_t>(node_[1] & (num_leaves_ - 1)); }
  void Set(int32_t cta, int64_t load) {
    int64_t* node = node_.data();
    int64_t n = num_leaves_ + cta;
    int64_t key = Key(cta, load);
    node[n] = key;
    while (n > 1) {
      key = std::min(key, node[n ^ 1]);
      n >>= 1;
      node[n] = key;
    }
  }

 private:
  int64_t Key(int32_t cta, int64_t load) const { return (load >> shift_) << cta_bits_ | cta; }

  ScratchArray<int64_t> node_;
  int64_t num_leaves_ = 0;
  int cta_bits_ = 0, shift_ = 0;
};

}  // namespace tvm_infer
