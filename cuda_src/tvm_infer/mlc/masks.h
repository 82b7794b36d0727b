// What the tokens of a step do not see of the keys up to their own: a mask with a table entry for each request, as the variant functions
// of tvm_infer take it. Its code is that of tvm_infer/variant/cache_masks.py.
#pragma once

#include <tvm/ffi/any.h>
#include <tvm/ffi/string.h>

#include <cstdint>
#include <vector>

#include "tvm_infer/mlc/config.h"
#include "tvm_infer/mlc/sequence_windows.h"
#include "tvm_infer/mlc/step.h"
#include "tvm_infer/mlc/token_trees.h"

namespace tvm_infer::mlc {

// int32 values that the host makes, as a tensor that the executor reads: it keeps its memory from step to step.
class TableArray {
 public:
  std::vector<int32_t>& host() { return host_; }
  // With the values of host(), in the order of the device's current stream; there may be room behind them.
  const Tensor& Publish(DLDevice device);

 private:
  std::vector<int32_t> host_;
  Tensor tensor_;
};

class Masks {
 public:
  explicit Masks(const Config& config) : config_(config) {}

  // A node sees the text before its tree, its ancestors and itself. One tree for each request. Sets step->mask.
  void SetTrees(const std::vector<TokenTree>& trees, Step* step);
  // The requests' sinks and windows. Sets step->mask where one of them hides something.
  void SetWindows(const SequenceWindows& windows, Step* step);

 private:
  struct Code {
    tvm::ffi::String digest;
    int64_t cpu_functions = 0;
    bool is_there = false;
  };
  void Find(const char* name, Code* code) const;

  const Config config_;
  Code tree_code_, window_code_;
  TableArray bits_, first_bit_, sink_, first_;
};

}  // namespace tvm_infer::mlc
