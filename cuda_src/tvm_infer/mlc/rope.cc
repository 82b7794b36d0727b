#include "tvm_infer/mlc/rope.h"

#include <tvm/ffi/error.h>

namespace tvm_infer::mlc {

void CheckRope(const RopeArgs& rope) {
  if (rope.mode == 0) return;
  if (rope.mode == 2) {
    TVM_FFI_THROW(ArgumentError)
        << "argument `rope_mode` is 2 (inline), and this cache stores keys as they are given or rotated; build the "
        << "model with rope_mode \"normal\", or keep TVM's own cache";
  }
  TVM_FFI_THROW(ArgumentError) << "argument `rope_mode` is " << rope.mode
                               << ", which this cache does not have yet; it has 0 (none): let the "
                               << "model rotate q and k itself";
}

}  // namespace tvm_infer::mlc
