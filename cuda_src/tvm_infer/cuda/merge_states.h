// Launches kernels/merge_states.cuh.
#pragma once

#include <cstdint>

#include "tvm_infer/cuda/dtype.h"
#include "tvm_infer/cuda/params.h"

namespace tvm_infer::cuda {

// Rows of O on 16-byte boundaries. The device's context is current.
void LaunchMergeStates(int32_t device_id, void* stream, DTypeTag dtype, const MergeStatesParams& params);

}  // namespace tvm_infer::cuda
