// Rotary positions: what a cache was created with, as the tables that tvm_infer.rope_append_paged takes. Inline rotation: inline_rope.h.
#pragma once

#include <tvm/ffi/any.h>
#include <tvm/ffi/string.h>

#include <cstdint>

#include "tvm_infer/mlc/config.h"

namespace tvm_infer::mlc {

// As MLC has them.
struct RopeArgs {
  double scale, theta;
  String scaling;             // JSON, "" for none
  tvm::ffi::Any ext_factors;  // a tensor float32 [rotary_dim], long factors first, or anything else for none
  int64_t rotary_dim;

  // NOTE: None is a Tensor, too.
  bool has_factors() const { return ext_factors.as<Tensor>().has_value() && ext_factors.cast<Tensor>().defined(); }
};

// On the host; float32 [rotary_dim / 2], radians a token.
struct RopeTables {
  Tensor few_tokens, many_tokens;  // the second holds for steps of more than `long_above` tokens
  int64_t long_above, interleaved;
  double magnitude;
};

// Throws ArgumentError for a scaling that there is not, and where Python, which reads what a model's configuration says
// (tvm_infer/runtime/mlc_rope.py), has not loaded the adapter.
RopeTables MakeRopeTables(const RopeArgs& args, double theta, double scale);
Tensor OnDevice(const Tensor& host, DLDevice device);
// Throws ArgumentError where rotary_dim is no number of elements of a head.
void CheckRotaryDim(const RopeArgs& args, const Config& config);

// Queries and keys are turned before they are stored.
class Rope {
 public:
  // Throws ArgumentError for a scaling that the cache does not have.
  Rope(const RopeArgs& args, const Config& config);

  bool is_active() const { return is_active_; }
  int64_t interleaved() const { return interleaved_; }
  double magnitude() const { return magnitude_; }
  // One table serves every step. Of two (longrope) the step's number of tokens chooses, so a captured step may not keep either.
  bool is_fixed() const { return long_above_ == kNever; }
  // The table of a fixed rotation, on the host.
  const Tensor& host_inv_freq() const { return host_; }
  // float32 [rotary_dim / 2] on the cache's device, radians a token. Long factors hold for steps of many tokens, as in TVM.
  const Tensor& inv_freq(int64_t num_tokens) const { return num_tokens > long_above_ ? long_ : short_; }

 private:
  bool is_active_ = false;
  int64_t interleaved_ = 0;
  double magnitude_ = 1;
  static constexpr int64_t kNever = int64_t{1} << 62;  // tvm_infer/runtime/mlc_rope.py
  int64_t long_above_ = 0;
  Tensor host_, short_, long_;
};

}  // namespace tvm_infer::mlc
