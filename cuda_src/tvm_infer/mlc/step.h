// The step under way, or the last one, as begin_forward announced it.
#pragma once

#include <tvm/ffi/any.h>
#include <tvm/ffi/container/shape.h>

#include <cstdint>
#include <vector>

namespace tvm_infer::mlc {

struct Step {
  tvm::ffi::Shape ids, append_lengths;  // [num_requests]
  std::vector<int64_t> start;           // [num_requests] tokens of each sequence before the step
  std::vector<int32_t> positions;  // [num_tokens] as models see them: of tree nodes their depth, in windows from the window's beginning
  // [num_tokens] where rotation is inline: how many positions further than the executor turns it a query of cross attention stands. Empty
  // where none does.
  std::vector<int32_t> cross_turns;
  int64_t num_tokens = 0;
  // What of the keys up to its own a token does not see (a VariantCall, whose band is causal), or None.
  tvm::ffi::Any mask;
  bool has_tree = false;  // mask is that of trees which are no chains
  // One new token for each sequence: TVM calls this a decode step, in which cross attention sees the new tokens too.
  bool is_decode = false;

  bool has_mask() const { return mask != nullptr; }
  int64_t num_requests() const { return static_cast<int64_t>(ids.size()); }
};

}  // namespace tvm_infer::mlc
