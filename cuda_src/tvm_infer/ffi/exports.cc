// The static object's exports: C symbols that follow tvm-ffi's calling convention. Nothing runs at load.
//
// Each function has two names. `__tvm_ffi_tvm_infer_matmul` is for code that is linked (TIR's call_cpacked). `__tvm_ffi_tvm_infer.matmul`,
// an alias that no C identifier could spell, is what a Relax VM looks for in the model's own library before it asks the global functions:
// a model that links this object calls its own copy, whatever else is loaded in the process.
#include <tvm/ffi/function.h>

#include "tvm_infer/ffi/functions.h"
#include "tvm_infer/ffi/model.h"

namespace tvm_infer::ffi_api {

#define TVM_INFER_EXPORT(name, function)                                                                           \
  TVM_FFI_DLL_EXPORT_TYPED_FUNC(tvm_infer_##name, function)                                                        \
  extern "C" TVM_FFI_DLL_EXPORT int tvm_infer_dotted_##name(void*, const TVMFFIAny*, int32_t, TVMFFIAny*) __asm__( \
      "__tvm_ffi_tvm_infer." #name) __attribute__((alias("__tvm_ffi_tvm_infer_" #name)));
TVM_INFER_FUNCTIONS(TVM_INFER_EXPORT)
TVM_INFER_MODEL_FUNCTIONS(TVM_INFER_EXPORT)
#undef TVM_INFER_EXPORT

}  // namespace tvm_infer::ffi_api
