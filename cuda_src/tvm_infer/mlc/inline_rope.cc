#include "tvm_infer/mlc/inline_rope.h"

#include <tvm/ffi/error.h>

#include <cstring>

#include "tvm_infer/mlc/registry.h"

namespace tvm_infer::mlc {
namespace {

using tvm::ffi::Any;
using tvm::ffi::Array;

// NOTE: with these TVM's cache turns what layers with windows read, whatever it was created with (MHACrossAttnInternal).
constexpr double kSlidingTheta = 1e4, kSlidingScale = 1;
constexpr int64_t kChannels = 16;  // heads turn in so many channels at once

void Check(const RopeArgs& args, const Config& config) {
  if (config.head_dim % kChannels != 0) {
    TVM_FFI_THROW(ArgumentError) << "argument `rope_mode` is inline with qk_head_dim = " << config.head_dim
                                 << "; attention turns heads whose size is a multiple of " << kChannels
                                 << ": take rope_mode 1 (normal) without windows of sequences";
  }
  if (args.rotary_dim % kChannels != 0) {
    TVM_FFI_THROW(ArgumentError) << "argument `rotary_dim` is " << args.rotary_dim << " with inline rotation; it must be a multiple of "
                                 << kChannels << ", from " << kChannels << " to qk_head_dim = " << config.head_dim
                                 << ", or rope_mode 1 (normal) without windows of sequences";
  }
  if (args.has_factors()) {  // as in TVM
    TVM_FFI_THROW(ArgumentError) << "argument `rope_ext_factors` is a tensor with inline rotation, which has none in TVM either; take "
                                 << "rope_mode 1 (normal) without windows of sequences, or pass no factors";
  }
}

int64_t BitsOf(double value) {
  const float x = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

}  // namespace

InlineRope::InlineRope(const RopeArgs& args, const Config& config) {
  if (!config.rotates_inline) return;
  CheckRotaryDim(args, config);
  Check(args, config);
  const RopeTables tables = MakeRopeTables(args, args.theta, args.scale);
  // The tables for few and many tokens differ by longrope's factors, of which there are none here.
  inv_freq_ = OnDevice(tables.few_tokens, config.device);
  turning_ = {true, args.rotary_dim == config.head_dim ? 0 : args.rotary_dim, tables.interleaved};
  magnitude_bits_ = BitsOf(tables.magnitude);
  is_active_ = true;
  const VariantCode code = FindVariant("", turning_, config);
  call_ = Call(code, {}, {});
  if (config.sliding_layers.empty()) return;
  const RopeTables sliding = MakeRopeTables(args, kSlidingTheta, kSlidingScale);
  sliding_call_ = Library().variant_call(code.digest, code.cpu_functions, Array<int64_t>({magnitude_bits_}),
                                         Array<Tensor>({OnDevice(sliding.few_tokens, config.device)}), 0);
}

Any InlineRope::Call(const VariantCode& code, Array<int64_t> scalars, Array<Tensor> tables) const {
  if (is_active_) {
    scalars.push_back(magnitude_bits_);
    tables.push_back(inv_freq_);
  }
  return Library().variant_call(code.digest, code.cpu_functions, scalars, tables, 0);
}

}  // namespace tvm_infer::mlc
