// Launches kernels/append.cuh.
#pragma once

#include <cstdint>

#include "tvm_infer/cuda/dtype.h"
#include "tvm_infer/cuda/params.h"

namespace tvm_infer::cuda {

// New elements of 16 bits, cached ones the same or IsScaled; rows of K and V, new and cached, on 16-byte boundaries. The device's context
// is current.
void LaunchAppend(int32_t device_id, void* stream, DTypeTag dtype, DTypeTag kv_dtype, int32_t head_dim_vo, const AppendParams& params);

}  // namespace tvm_infer::cuda
