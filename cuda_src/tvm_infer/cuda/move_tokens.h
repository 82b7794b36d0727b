// Launches kernels/move_tokens.cuh.
#pragma once

#include <cstdint>

#include "tvm_infer/cuda/params.h"

namespace tvm_infer::cuda {

// Rows of a multiple of 16 bytes on 16-byte boundaries. The device's context is current.
void LaunchMoveTokens(int32_t device_id, void* stream, const MoveTokensParams& params);

}  // namespace tvm_infer::cuda
