#include "tvm_infer/mlc/rope.h"

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

namespace tvm_infer::mlc {
namespace {

constexpr int64_t kNone = 0, kNormal = 1;

Tensor OnDevice(const tvm::ffi::Any& host, DLDevice device) {
  const Tensor values = host.cast<Tensor>();
  return device.device_type == kDLCPU ? values : values.CopyTo(device);
}

}  // namespace

Rope::Rope(const RopeArgs& args, const Config& config) {
  if (args.mode == kNone) return;
  if (args.mode != kNormal) {
    TVM_FFI_THROW(ArgumentError) << "argument `rope_mode` is " << args.mode << (args.mode == 2 ? " (inline)" : "")
                                 << "; this cache has 0 (none) and 1 (normal: keys are stored rotated). Build the model with rope_mode "
                                 << "\"normal\", or keep TVM's own cache";
  }
  if (args.rotary_dim < 2 || args.rotary_dim > config.head_dim || args.rotary_dim % 2 != 0) {
    TVM_FFI_THROW(ArgumentError) << "argument `rotary_dim` is " << args.rotary_dim
                                 << "; it must be even, from 2 to head_dim = " << config.head_dim;
  }
  // What a model's configuration says is read in Python (tvm_infer/runtime/mlc_rope.py).
  const auto tables = tvm::ffi::Function::GetGlobal("tvm_infer.mlc_rope_tables");
  if (!tables.has_value()) {
    TVM_FFI_THROW(ArgumentError)
        << "argument `rope_mode` is 1 (normal), and the tables for it are made in Python, which has not loaded the "
        << "adapter: call tvm_infer.runtime.mlc_library.load()";
  }
  const Tensor* ext_factors = nullptr;
  const auto maybe_factors = args.ext_factors.as<Tensor>();
  if (maybe_factors.has_value()) ext_factors = &maybe_factors.value();
  const auto made = (*tables)(args.rotary_dim, args.theta, args.scale, args.scaling,
                              ext_factors == nullptr ? tvm::ffi::Any(nullptr) : tvm::ffi::Any(*ext_factors))
                        .cast<tvm::ffi::Array<tvm::ffi::Any>>();
  host_ = made[0].cast<Tensor>();
  short_ = OnDevice(made[0], config.device);
  long_ = OnDevice(made[1], config.device);
  long_above_ = made[2].cast<int64_t>();
  interleaved_ = made[3].cast<int64_t>();
  magnitude_ = made[4].cast<double>();
  is_active_ = true;
}

}  // namespace tvm_infer::mlc
