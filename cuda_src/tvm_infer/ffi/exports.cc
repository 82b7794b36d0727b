// The static object's exports: C symbols that follow tvm-ffi's calling convention. Nothing runs at load.
#include <tvm/ffi/function.h>

#include "tvm_infer/ffi/functions.h"

namespace tvm_infer::ffi_api {

#define TVM_INFER_EXPORT(name, function) TVM_FFI_DLL_EXPORT_TYPED_FUNC(tvm_infer_##name, function)
TVM_INFER_FUNCTIONS(TVM_INFER_EXPORT)
#undef TVM_INFER_EXPORT

}  // namespace tvm_infer::ffi_api
