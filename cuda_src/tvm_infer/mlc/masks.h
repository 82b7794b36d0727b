// What the tokens of a step do not see of the keys up to their own: a mask with a table entry for each request, as the variant functions
// of tvm_infer take it. Its code is that of tvm_infer/variant/cache_masks.py. Where rotation is inline it comes with the mask.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "tvm_infer/mlc/config.h"
#include "tvm_infer/mlc/inline_rope.h"
#include "tvm_infer/mlc/sequence_windows.h"
#include "tvm_infer/mlc/step.h"
#include "tvm_infer/mlc/token_trees.h"
#include "tvm_infer/mlc/variant_code.h"

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
  Masks(const Config& config, const InlineRope& rope) : config_(config), rope_(rope) {}

  // A node sees the text before its tree, its ancestors and itself, and turns by its depth. One tree for each request. Sets step->mask.
  void SetTrees(const std::vector<TokenTree>& trees, Step* step);
  // The requests' sinks and windows. Sets step->mask where one of them hides something.
  void SetWindows(const SequenceWindows& windows, Step* step);

 private:
  const VariantCode& Find(const char* mask, std::optional<VariantCode>* code) const;
  void SetTreeBits(const std::vector<TokenTree>& trees, const Step& step, int64_t width);
  void SetTreePlaces(const std::vector<TokenTree>& trees, int64_t width);

  const Config config_;
  const InlineRope rope_;
  std::optional<VariantCode> tree_code_, window_code_;
  TableArray bits_, first_bit_, places_, sink_, first_;
};

}  // namespace tvm_infer::mlc
