// Launches kernels/gemv.cuh: products of a few rows, where only the reading of b takes time.
#pragma once

#include <cstdint>

#include "tvm_infer/cuda/matmul.h"

namespace tvm_infer::cuda {

// Whether LaunchGemv takes the product. It depends on sizes, data types and on whether rows begin on 16-byte boundaries.
bool IsGemv(const MatmulArgs& args);

// As LaunchMatmul, whose promises it keeps, for a product that IsGemv. A row's result does not depend on m.
void LaunchGemv(int32_t device_id, void* stream, const MatmulArgs& args);

}  // namespace tvm_infer::cuda
