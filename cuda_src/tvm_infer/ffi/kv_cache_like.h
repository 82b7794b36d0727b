// How a compiled model makes its cache: it knows its device and data type by a tensor alone.
#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>

#include <cstdint>

#include "tvm_infer/ffi/kv_cache_object.h"

#define TVM_INFER_KV_CACHE_LIKE_FUNCTIONS(V) V(kv_cache_create_like, KVCacheCreateLike)

namespace tvm_infer::ffi_api {

// kv_cache_create with the device and dtype of `like`, and its defaults for plan and threads; then kv_cache_set_rope, with frequencies as
// numbers, because a compiled model's constant tensors lie on its device. No frequencies: nothing rotates.
//   sizes  num_layers, num_qo_heads, num_kv_heads, head_dim, page_size, num_pages, max_batch, max_tokens
PagedKVCache KVCacheCreateLike(tvm::ffi::TensorView like, tvm::ffi::Shape sizes, tvm::ffi::Array<double> inv_freq, int64_t interleaved,
                               double magnitude);

}  // namespace tvm_infer::ffi_api
