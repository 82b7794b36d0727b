// The generated code of what a layer computes besides softmax(q k) v.
#pragma once

#include <tvm/ffi/string.h>

#include <cstdint>

#include "tvm_infer/mlc/config.h"

namespace tvm_infer::mlc {

// How attention turns queries and keys as it reads them.
struct Turning {
  bool turns = false;
  int64_t rotary_dim = 0;  // elements of a head, from the first on; 0: all
  int64_t interleaved = 0;
};

struct VariantCode {
  tvm::ffi::String digest;
  int64_t cpu_functions = 0;  // 0 for CUDA
};

// Of a mask of tvm_infer/variant/cache_masks.py ("" for none) and a rotation. Compiled at the first use, or found in the library: which is
// Python's to know (tvm_infer/runtime/mlc_variants.py). Throws CacheStateError where Python has not loaded the adapter.
VariantCode FindVariant(const char* mask, const Turning& turning, const Config& config);

}  // namespace tvm_infer::mlc
