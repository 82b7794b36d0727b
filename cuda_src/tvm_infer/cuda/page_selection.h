// Launches kernels/page_bounds.cuh, page_scores.cuh and select_pages.cuh. The device's context is current.
#pragma once

#include <cstdint>

#include "tvm_infer/cuda/dtype.h"
#include "tvm_infer/cuda/params.h"

namespace tvm_infer::cuda {

// `dtype`: of the bounds, 16 bits; `kv_dtype`: of the cache, the same or of 8 bits.
void LaunchPageBounds(int32_t device_id, void* stream, DTypeTag dtype, DTypeTag kv_dtype, const PageBoundsParams& params);

// `dtype`: of queries and bounds, 16 bits. Sets ctas_per_list.
void LaunchPageScores(int32_t device_id, void* stream, DTypeTag dtype, PageScoresParams params);

void LaunchSelectPages(int32_t device_id, void* stream, const SelectPagesParams& params);

// Loads the kernels of all three, so that their launches may be captured. Throws where there are none.
void LoadPageSelection(int32_t device_id, void* stream, DTypeTag dtype, DTypeTag kv_dtype);

}  // namespace tvm_infer::cuda
