#include "tvm_infer/ffi/kv_executor.h"

namespace tvm_infer::ffi_api {

std::vector<int32_t> FillTables::Words(const std::vector<PageFill>& pages) const {
  std::vector<int32_t> words(static_cast<size_t>(size), 0);
  for (size_t i = 0; i < pages.size(); ++i) {
    words[qo_indptr + i + 1] = words[qo_indptr + i] + pages[i].num_tokens;
    words[kv_len + i] = pages[i].num_tokens;
    words[page_indptr + i + 1] = static_cast<int32_t>(i) + 1;
    words[page_indices + i] = pages[i].page;
  }
  return words;
}

std::unique_ptr<KVExecutor> MakeKVExecutor(const KVCacheConfig& config) {
  switch (config.device.device_type) {
    case kDLCPU:
      return MakeHostKVExecutor(config);
    case kDLCUDA:
      return MakeCudaKVExecutor(config);
    default:
      TVM_INFER_THROW(ExecutorError) << "argument `device` is of type " << static_cast<int>(config.device.device_type)
                                     << " (DLPack), for which there is no executor; create the cache with device=\"cpu\" or \"cuda\"";
  }
}

}  // namespace tvm_infer::ffi_api
