#include "tvm_infer/cuda/merge_states.h"

#include "tvm_infer/error.h"

namespace tvm_infer::cuda {

void LaunchMergeStates(int32_t device_id, void* stream, DTypeTag dtype, const MergeStatesParams& params) {
  (void)device_id, (void)stream, (void)dtype, (void)params;
  TVM_INFER_THROW(ExecutorError) << "merge has no cuda executor yet; merge on the host (the cpu executor)";
}

}  // namespace tvm_infer::cuda
