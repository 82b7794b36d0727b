// A chosen layout as the bytes of a plan.
#pragma once

#include <cstdint>

#include "tvm_infer/schedule/attempt.h"
#include "tvm_infer/schedule/forest.h"
#include "tvm_infer/schedule/planner.h"

namespace tvm_infer {

// Elements of a plan's arrays.
struct PlanSizes {
  int64_t works = 0, merges = 0, merge_slots = 0;
  int64_t ordered_tokens = 0;  // of token_order
};
int64_t PlanBytes(const PlanParams& p, const PlanSizes& sizes, int64_t num_requests, int64_t num_lists);

// `forest`: that the items were made by, or nullptr. `bytes`: PlanBytes of `sizes`. `cursor`: scratch, int32[num_ctas].
void WritePlan(const PlanParams& p, const Batch& batch, const Attempt& attempt, Forest* forest, const PlanSizes& sizes, int64_t bytes,
               int32_t* cursor, void* out);

}  // namespace tvm_infer
