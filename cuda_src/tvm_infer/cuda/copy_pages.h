// Launches kernels/copy_pages.cuh.
#pragma once

#include <cstdint>

#include "tvm_infer/cuda/params.h"

namespace tvm_infer::cuda {

// Pages of a multiple of 16 bytes on 16-byte boundaries. The device's context is current.
void LaunchCopyPages(int32_t device_id, void* stream, const CopyPagesParams& params);

}  // namespace tvm_infer::cuda
