#include "tvm_infer/ffi/kv_cache_like.h"

#include "tvm_infer/ffi/common.h"
#include "tvm_infer/ffi/kv_cache.h"

namespace tvm_infer::ffi_api {

PagedKVCache KVCacheCreateLike(TensorView like, tvm::ffi::Shape sizes) {
  constexpr size_t kNumSizes = 8;
  return Guarded([&] {
    if (sizes.size() != kNumSizes) {
      TVM_INFER_THROW(ArgumentError) << "argument `sizes` has " << sizes.size() << " entries; it must have " << kNumSizes
                                     << ": num_layers, num_qo_heads, num_kv_heads, head_dim, page_size, num_pages, max_batch, max_tokens";
    }
    return KVCacheCreate(sizes[0], sizes[1], sizes[2], sizes[3], like.dtype(), sizes[4], sizes[5], sizes[6], sizes[7], 0, 0, like.device());
  });
}

}  // namespace tvm_infer::ffi_api
