// Launches kernels/rope_append.cuh.
#pragma once

#include <cstdint>

#include "tvm_infer/cuda/dtype.h"
#include "tvm_infer/cuda/params.h"

namespace tvm_infer::cuda {

// Throws Error("ExecutorError") where the kernel does not take such heads; `name`: the argument that has them.
void CheckRopeShape(int32_t head_dim, int32_t head_dim_vo, int32_t rotary_dim, const char* name);

// float16 or bfloat16, the cache the same or IsScaled, a shape that CheckRopeShape takes; rows of q, k, v, q_out and the caches on 16-byte
// boundaries. The device's context is current.
void LaunchRopeAppend(int32_t device_id, void* stream, DTypeTag dtype, DTypeTag kv_dtype, const RopeAppendParams& params);

}  // namespace tvm_infer::cuda
