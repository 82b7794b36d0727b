#include "tvm_infer/mlc/variant_code.h"

#include <tvm/ffi/any.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

namespace tvm_infer::mlc {

VariantCode FindVariant(const char* mask, const Turning& turning, const Config& config) {
  const auto find = tvm::ffi::Function::GetGlobal("tvm_infer.mlc_variant");
  if (!find.has_value()) {
    TVM_FFI_THROW(CacheStateError) << "the code of mask \"" << mask << "\"" << (turning.turns ? " and of inline rotation" : "")
                                   << " is found by Python, which has not loaded the adapter: call "
                                   << "tvm_infer.runtime.mlc_library.load()";
  }
  const auto found = (*find)(tvm::ffi::String(mask), turning.turns, turning.rotary_dim, turning.interleaved != 0, config.is_cuda())
                         .cast<tvm::ffi::Array<tvm::ffi::Any>>();
  return {found[0].cast<tvm::ffi::String>(), found[1].cast<int64_t>()};
}

}  // namespace tvm_infer::mlc
