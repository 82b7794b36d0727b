// Tile classes of the CUDA attention kernels, with their measured costs: what plans for a CUDA device are made with.
#pragma once

#include <cstdint>

#include "tvm_infer/cuda/dtype.h"
#include "tvm_infer/schedule/tile_costs.h"

namespace tvm_infer::cuda {

// By the types of queries and of keys and values, the width of keys and that of values. Throws Error("ExecutorError") for a dtype or a pair
// of widths that has no kernel.
TileCosts TileTable(DTypeTag dtype, DTypeTag kv_dtype, int32_t head_dim, int32_t head_dim_vo);

// The same check alone. `name`: the argument it is said of.
void CheckKernelShape(DTypeTag dtype, DTypeTag kv_dtype, int32_t head_dim, int32_t head_dim_vo, const char* name);

}  // namespace tvm_infer::cuda
