// Launches kernels/append.cuh.
#pragma once

#include <cstdint>

#include "tvm_infer/cuda/params.h"

namespace tvm_infer::cuda {

// 16-bit elements; rows of K and V, new and cached, on 16-byte boundaries. The device's context is current.
void LaunchAppend(int32_t device_id, void* stream, const AppendParams& params);

}  // namespace tvm_infer::cuda
