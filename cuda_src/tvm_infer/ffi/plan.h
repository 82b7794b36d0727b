// Packed functions of the planner.
#pragma once

#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>

#include <cstdint>

#include "tvm_infer/schedule/planner.h"

#define TVM_INFER_PLAN_FUNCTIONS(V)                    \
  V(abi_version, AbiVersion)                           \
  V(plan, MakePlan)                                    \
  V(plan_shared, MakeSharedPlan)                       \
  V(plan_head_lists, MakeHeadListsPlan)                \
  V(plan_capacity, PlanCapacityOf)                     \
  V(plan_shared_capacity, PlanSharedCapacityOf)        \
  V(plan_head_lists_capacity, PlanHeadListsCapacityOf) \
  V(plan_upload, UploadPlan)                           \
  V(cpu_tile_table, CpuTileTable)                      \
  V(cpu_kv_tile_table, CpuKVTileTable)                 \
  V(cpu_vo_tile_table, CpuVOTileTable)                 \
  V(cpu_info, CpuInfo)

namespace tvm_infer::ffi_api {

int64_t AbiVersion();

// (window_left, window_right, num_sink, chunk). ArgumentError: not four, or none of 32 bits.
MaskBand MakeBand(const tvm::ffi::Shape& band);

// Writes the plan of a batch and returns the bytes used.
//   qo_indptr      int32[num_requests + 1], kv_len int32[num_requests]
//   band           window_left, window_right: keys before and after the query's own position that it sees, -1 for all (causal: 0 after
//                  it); num_sink: first keys that it sees besides; chunk: positions a chunk, outside of which it sees none, 0 for no
//                  chunks. With sinks or chunks the plan runs with a variant that masks them
//   fixed_split_size  0 automatic, -1 never, > 0: KV is cut at its multiples
//   tile_table     5 integers a class: rows, kv_granule, fixed, row, kv (picoseconds); then, where keys are to be shared, the 3 of
//                  SharedMergeCost: each, once, again
//   max_partial_rows  rows of the partial buffers that this plan will run with
//   plan_out       int32, contiguous: receives the plan
int64_t MakePlan(tvm::ffi::TensorView qo_indptr, tvm::ffi::TensorView kv_len, int64_t num_qo_heads, int64_t num_kv_heads, int64_t num_ctas,
                 tvm::ffi::Shape band, int64_t fixed_split_size, tvm::ffi::Shape tile_table, int64_t max_partial_rows,
                 tvm::ffi::TensorView plan_out);

// The same, of requests that begin with the same keys, which are read once where that shortens the plan and the plan fits.
//   levels         int32, on the host: for each group of each level, outermost level first, its level, the number of its keys, the number
//                  of its requests, the requests (schedule/levels.h)
int64_t MakeSharedPlan(tvm::ffi::TensorView qo_indptr, tvm::ffi::TensorView kv_len, tvm::ffi::TensorView levels, int64_t num_qo_heads,
                       int64_t num_kv_heads, int64_t num_ctas, tvm::ffi::Shape band, int64_t fixed_split_size, tvm::ffi::Shape tile_table,
                       int64_t max_partial_rows, tvm::ffi::TensorView plan_out);

// MakePlan where each KV head of a request has a list of keys of its own.
//   kv_len         int32[num_requests * num_kv_heads]: keys of KV head h of request r at r * num_kv_heads + h
int64_t MakeHeadListsPlan(tvm::ffi::TensorView qo_indptr, tvm::ffi::TensorView kv_len, int64_t num_qo_heads, int64_t num_kv_heads,
                          int64_t num_ctas, tvm::ffi::Shape band, int64_t fixed_split_size, tvm::ffi::Shape tile_table,
                          int64_t max_partial_rows, tvm::ffi::TensorView plan_out);

// (plan bytes, partial rows) that suffice for every batch within the limits.
tvm::ffi::Shape PlanCapacityOf(int64_t num_qo_heads, int64_t num_kv_heads, int64_t num_ctas, tvm::ffi::Shape band, int64_t fixed_split_size,
                               tvm::ffi::Shape tile_table, int64_t max_requests, int64_t max_tokens, int64_t max_kv_tokens);

// The same with room for shared works: runs around a request, and query tokens of all requests within runs (PlanLimits).
tvm::ffi::Shape PlanSharedCapacityOf(int64_t num_qo_heads, int64_t num_kv_heads, int64_t num_ctas, tvm::ffi::Shape band,
                                     int64_t fixed_split_size, tvm::ffi::Shape tile_table, int64_t max_requests, int64_t max_tokens,
                                     int64_t max_kv_tokens, int64_t max_levels, int64_t max_shared_tokens);

// PlanCapacityOf for plans of MakeHeadListsPlan; max_kv_tokens counts the keys of all lists.
tvm::ffi::Shape PlanHeadListsCapacityOf(int64_t num_qo_heads, int64_t num_kv_heads, int64_t num_ctas, tvm::ffi::Shape band,
                                        int64_t fixed_split_size, tvm::ffi::Shape tile_table, int64_t max_requests, int64_t max_tokens,
                                        int64_t max_kv_tokens);

// Copies a plan to a cuda device, in the order of the current stream: its bytes_used, through pinned memory, so that plan_host may be
// written again at once.
//   plan_host    int32, contiguous, on the host: from MakePlan
//   plan_device  int32, contiguous, on the device, 16-byte aligned, at least as many bytes as the plan uses
void UploadPlan(tvm::ffi::TensorView plan_host, tvm::ffi::TensorView plan_device);

// A `tile_table`, as above.
tvm::ffi::Shape FlatCosts(const TileCosts& costs);

// The CPU executor's tile table for a dtype ("float32", "float16", "bfloat16").
tvm::ffi::Shape CpuTileTable(tvm::ffi::String dtype, int64_t head_dim);
// The same where keys and values are kept in another type than queries have.
tvm::ffi::Shape CpuKVTileTable(tvm::ffi::String dtype, int64_t head_dim, tvm::ffi::String kv_dtype);
// The same where values (and outputs) are narrower than keys (and queries).
tvm::ffi::Shape CpuVOTileTable(tvm::ffi::String dtype, int64_t head_dim, int64_t head_dim_vo, tvm::ffi::String kv_dtype);

// "isa threads": e.g. "avx512 2".
tvm::ffi::String CpuInfo();

}  // namespace tvm_infer::ffi_api
