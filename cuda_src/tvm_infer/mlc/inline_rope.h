// Inline rotation: keys lie in the cache as they came, and attention turns queries and keys as it reads them, by where they stand in what
// is seen. The variants that do it are those of tvm_infer/variant/cache_masks.py.
#pragma once

#include <tvm/ffi/any.h>
#include <tvm/ffi/container/array.h>

#include <cstdint>

#include "tvm_infer/mlc/config.h"
#include "tvm_infer/mlc/rope.h"
#include "tvm_infer/mlc/variant_code.h"

namespace tvm_infer::mlc {

class InlineRope {
 public:
  // Throws ArgumentError for a rotation that attention cannot do.
  InlineRope(const RopeArgs& args, const Config& config);

  bool is_active() const { return is_active_; }

  // A VariantCall, causal, of layers with or without windows; None where nothing turns.
  const tvm::ffi::Any& OfLayer(bool is_sliding) const { return is_sliding ? sliding_call_ : call_; }

  // Where it is active, of layers without windows, as tvm_infer.rope_append_paged takes them. float32 [rotary_dim / 2] on the cache's
  // device, radians a token.
  const Tensor& inv_freq() const { return inv_freq_; }
  int64_t interleaved() const { return turning_.interleaved; }

  // What code is found by (FindVariant); nothing turns where it is not active.
  const Turning& turning() const { return turning_; }
  // A call of such code. scalars, tables: the mask's; the rotation's, where there is one, come behind them.
  tvm::ffi::Any Call(const VariantCode& code, tvm::ffi::Array<int64_t> scalars, tvm::ffi::Array<Tensor> tables) const;

 private:
  bool is_active_ = false;
  Turning turning_;
  int64_t magnitude_bits_ = 0;  // of a float
  Tensor inv_freq_;
  tvm::ffi::Any call_, sliding_call_;
};

}  // namespace tvm_infer::mlc
