// The step under way, or the last one, as begin_forward announced it.
#pragma once

#include <tvm/ffi/container/shape.h>

#include <cstdint>
#include <vector>

namespace tvm_infer::mlc {

struct Step {
  tvm::ffi::Shape ids, append_lengths;  // [num_requests]
  std::vector<int64_t> start;           // [num_requests] tokens of each sequence before the step
  int64_t num_tokens = 0;
  // One new token for each sequence: TVM calls this a decode step, in which cross attention sees the new tokens too.
  bool is_decode = false;

  int64_t num_requests() const { return static_cast<int64_t>(ids.size()); }
};

}  // namespace tvm_infer::mlc
