// The shared library's registration: runs when libtvm_infer.so is loaded.
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>

#include "tvm_infer/ffi/functions.h"

namespace tvm_infer::ffi_api {

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef def;
#define TVM_INFER_REGISTER(name, function) def.def("tvm_infer." #name, function);
  TVM_INFER_FUNCTIONS(TVM_INFER_REGISTER)
#undef TVM_INFER_REGISTER
}

}  // namespace tvm_infer::ffi_api
