#include "tvm_infer/cuda/append.h"

#include "tvm_infer/error.h"

namespace tvm_infer::cuda {

void LaunchAppend(int32_t device_id, void* stream, const AppendParams& params) {
  (void)device_id, (void)stream, (void)params;
  TVM_INFER_THROW(ExecutorError) << "append has no cuda executor yet; append on the host (the cpu executor)";
}

}  // namespace tvm_infer::cuda
