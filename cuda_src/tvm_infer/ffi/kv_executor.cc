#include "tvm_infer/ffi/kv_executor.h"

namespace tvm_infer::ffi_api {

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
