// Packed function between bases of an LSE.
#pragma once

#include <tvm/ffi/container/tensor.h>

#define TVM_INFER_SCALE_LSE_FUNCTIONS(V) V(scale_lse, ScaleLse)

namespace tvm_infer::ffi_api {

// lse *= factor, in place. Attention and merge have natural logarithms; log2(e) turns them into base 2, ln(2) turns them back.
//   lse      float32 [num_rows, num_heads], any strides
//   factor   finite, above 0, so that -inf stays
void ScaleLse(tvm::ffi::TensorView lse, double factor);

}  // namespace tvm_infer::ffi_api
