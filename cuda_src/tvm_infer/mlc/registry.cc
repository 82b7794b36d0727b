#include "tvm_infer/mlc/registry.h"

namespace tvm_infer::mlc {

const Calls& Library() {
  static const Calls calls = [] {
    Calls c;
#define TVM_INFER_MLC_FIND(name) c.name = tvm::ffi::Function::GetGlobalRequired("tvm_infer." #name);
    TVM_INFER_MLC_CALLS(TVM_INFER_MLC_FIND)
#undef TVM_INFER_MLC_FIND
    return c;
  }();
  return calls;
}

}  // namespace tvm_infer::mlc
