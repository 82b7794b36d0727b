#include "tvm_infer/ffi/kv_cache_like.h"

#include <vector>

#include "tvm_infer/ffi/common.h"
#include "tvm_infer/ffi/kv_cache.h"

namespace tvm_infer::ffi_api {

PagedKVCache KVCacheCreateLike(TensorView like, tvm::ffi::Shape sizes, tvm::ffi::Array<double> inv_freq, int64_t interleaved,
                               double magnitude) {
  constexpr size_t kNumSizes = 8;
  return Guarded([&] {
    if (sizes.size() != kNumSizes) {
      TVM_INFER_THROW(ArgumentError) << "argument `sizes` has " << sizes.size() << " entries; it must have " << kNumSizes
                                     << ": num_layers, num_qo_heads, num_kv_heads, head_dim, page_size, num_pages, max_batch, max_tokens";
    }
    PagedKVCache kv =
        KVCacheCreate(sizes[0], sizes[1], sizes[2], sizes[3], like.dtype(), sizes[4], sizes[5], sizes[6], sizes[7], 0, 0, like.device());
    std::vector<float> frequencies;
    for (double frequency : inv_freq) frequencies.push_back(static_cast<float>(frequency));
    int64_t shape = static_cast<int64_t>(frequencies.size()), stride = 1;
    DLTensor tensor{frequencies.data(), DLDevice{kDLCPU, 0}, 1, DLDataType{kDLFloat, 32, 1}, &shape, &stride, 0};
    KVCacheSetRope(kv, TensorView(&tensor), interleaved, magnitude);
    return kv;
  });
}

}  // namespace tvm_infer::ffi_api
