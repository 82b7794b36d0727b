// What is checked of the values in plans, tables and lengths. The CPU path reads its arguments; the CUDA path reads nothing of the
// device's memory unless debug checks are on, and checks copies then. Each throws a typed Error that names the argument.
#pragma once

#include <cstdint>

#include "tvm_infer/ffi/attention_checks.h"
#include "tvm_infer/schedule/plan.h"

namespace tvm_infer::ffi_api {

// The header of a plan in host memory: right magic, version and size (PlanMismatchError).
const PlanHeader& CheckPlanBytes(const void* plan, int64_t bytes);
const PlanHeader& CheckPlan(const TensorView& plan);
// The plan was made for these tokens and heads. `is_padded`: q may have more rows than the plan has tokens.
void CheckPlanFitsQuery(const PlanHeader& header, const TensorView& q, bool is_padded = false);
void CheckPlanFitsCache(const PlanHeader& header, const CacheShape& shape);
void CheckPlanFitsWorkspace(const PlanHeader& header, const TensorView& workspace, int64_t head_dim);
// Every list has pages for its keys; with `check_pages`, every page index that is used is within the pool. `is_by_head`: lists are not
// requests', but their KV heads'.
struct PageTable {
  const int32_t* indptr;
  int64_t num_indptr;  // entries
  const int32_t* indices;
  int64_t num_indices;
};
void CheckPageTableValues(const PageTable& table, int32_t num_lists, const int32_t* kv_len, const CacheShape& shape, bool check_pages,
                          bool is_by_head = false);
// indptr gives each list the plan's number of keys, within the rows of k.
void CheckRaggedValues(const int32_t* indptr, int64_t num_indptr, const TensorView& k, const PlanView& plan);
// Each list's rows, as many as the plan has keys of it from start on, lie within those of k.
void CheckStartValues(const int32_t* start, int64_t num_starts, const TensorView& k, const PlanView& plan);
// Appending takes a request's length from the plan: PlanMismatchError for a plan with a length for each KV head.
void CheckPlanAppends(const PlanHeader& header);
// 0 = qo_indptr[0] <= qo_indptr[1] <= …, and no request has more new tokens than keys.
void CheckAppendLengths(const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests);
void CheckNumNewTokens(const TensorView& k, const TensorView& v, int64_t num_tokens);
bool DebugChecks();
bool ExchangeDebugChecks(bool enabled);

}  // namespace tvm_infer::ffi_api
