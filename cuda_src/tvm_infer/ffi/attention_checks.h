// What the attention bindings check before anything runs. Each throws a typed Error that names the argument; none allocates.
#pragma once

#include <cstdint>

#include "tvm_infer/cpu/attention.h"
#include "tvm_infer/ffi/attention.h"
#include "tvm_infer/ffi/common.h"
#include "tvm_infer/schedule/plan.h"

namespace tvm_infer::ffi_api {

struct CacheShape {
  cpu::DType dtype;
  int64_t num_pages;
  int32_t num_kv_heads, page_size, head_dim;
};

// The header of a plan tensor: right magic, version and size (PlanMismatchError).
const PlanHeader& CheckPlan(const TensorView& plan);
// q, o and lse against each other and the plan's tokens and heads.
void CheckQuery(const PlanHeader& header, const TensorView& q, const TensorView& o, const OptionalTensor& lse);
void CheckWorkspace(const PlanHeader& header, const TensorView& workspace, int64_t head_dim);
// Any of the four cache forms (combined or separate, HND or NHD) as strides; page tables are left empty.
CacheShape CheckCache(const TensorView& k_cache, const OptionalTensor& v_cache, int64_t kv_layout, cpu::KVSource* source);
void CheckSameHeads(const PlanHeader& header, const CacheShape& shape, const TensorView& q);
// Every list has pages for its keys; with debug checks on, every page index that is used is within the pool.
void CheckPageTable(const TensorView& indptr, const TensorView& indices, int32_t num_lists, const int32_t* kv_len, const CacheShape& shape,
                    cpu::KVSource* source);
void CheckRagged(const PlanView& plan, const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& kv_indptr,
                 cpu::KVSource* source);
// 0 = qo_indptr[0] <= qo_indptr[1] <= …, and no request has more new tokens than keys.
void CheckAppendLengths(const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests);
void CheckNewTokens(const TensorView& k, const TensorView& v, int64_t num_tokens, const CacheShape& shape);
cpu::DType CheckMergeOperand(const TensorView& o, const OptionalTensor& lse, const TensorView& like, const char* o_name,
                             const char* lse_name);
bool DebugChecks();
bool ExchangeDebugChecks(bool enabled);

}  // namespace tvm_infer::ffi_api
