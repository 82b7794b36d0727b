// Rotary positions: which of MLC's settings a cache was created with, and what is done to q and k before they are stored.
#pragma once

#include <tvm/ffi/any.h>
#include <tvm/ffi/string.h>

#include <cstdint>

namespace tvm_infer::mlc {

struct RopeArgs {
  int64_t mode;  // RoPEMode of TVM: 0 none, 1 normal (rotated before they are stored), 2 inline (rotated by attention)
  double scale, theta;
  tvm::ffi::String scaling;   // JSON, "" for none
  tvm::ffi::Any ext_factors;  // a tensor, or anything else for none
  int64_t rotary_dim;
};

// Throws ArgumentError for a mode that the cache does not have.
void CheckRope(const RopeArgs& rope);

}  // namespace tvm_infer::mlc
