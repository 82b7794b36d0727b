// Launches kernels/scale_lse.cuh.
#pragma once

#include <cstdint>

#include "tvm_infer/cuda/params.h"

namespace tvm_infer::cuda {

// The device's context is current.
void LaunchScaleLse(int32_t device_id, void* stream, const ScaleLseParams& params);

}  // namespace tvm_infer::cuda
