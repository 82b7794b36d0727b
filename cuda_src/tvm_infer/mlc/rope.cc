#include "tvm_infer/mlc/rope.h"

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

namespace tvm_infer::mlc {

using tvm::ffi::Any;

RopeTables MakeRopeTables(const RopeArgs& args, double theta, double scale) {
  const auto tables = tvm::ffi::Function::GetGlobal("tvm_infer.mlc_rope_tables");
  if (!tables.has_value()) {
    TVM_FFI_THROW(ArgumentError) << "argument `rope_mode` says that queries and keys turn, and the tables for it are made in Python, which "
                                 << "has not loaded the adapter: call tvm_infer.runtime.mlc_library.load()";
  }
  const auto made = (*tables)(args.rotary_dim, theta, scale, args.scaling, args.has_factors() ? args.ext_factors : Any(nullptr))
                        .cast<tvm::ffi::Array<Any>>();
  return {made[0].cast<Tensor>(), made[1].cast<Tensor>(), made[2].cast<int64_t>(), made[3].cast<int64_t>(), made[4].cast<double>()};
}

Tensor OnDevice(const Tensor& host, DLDevice device) { return device.device_type == kDLCPU ? host : host.CopyTo(device); }

void CheckRotaryDim(const RopeArgs& args, const Config& config) {
  if (args.rotary_dim >= 2 && args.rotary_dim <= config.head_dim && args.rotary_dim % 2 == 0) return;
  TVM_FFI_THROW(ArgumentError) << "argument `rotary_dim` is " << args.rotary_dim
                               << "; it must be even, from 2 to head_dim = " << config.head_dim;
}

Rope::Rope(const RopeArgs& args, const Config& config) {
  if (!config.rotates_before_storing) return;
  CheckRotaryDim(args, config);
  const RopeTables tables = MakeRopeTables(args, args.theta, args.scale);
  host_ = tables.few_tokens;
  short_ = OnDevice(tables.few_tokens, config.device);
  long_ = OnDevice(tables.many_tokens, config.device);
  long_above_ = tables.long_above;
  interleaved_ = tables.interleaved;
  magnitude_ = tables.magnitude;
  is_active_ = true;
}

}  // namespace tvm_infer::mlc
