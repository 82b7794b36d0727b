// Packed functions about CUDA devices, their kernels, and plans that go to them.
#pragma once

#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/string.h>

#include <cstdint>

#define TVM_INFER_CUDA_FUNCTIONS(V)      \
  V(cuda_tile_table, CudaTileTable)      \
  V(cuda_kv_tile_table, CudaKVTileTable) \
  V(cuda_vo_tile_table, CudaVOTileTable) \
  V(cuda_info, CudaInfo)                 \
  V(add_cubin, AddCubin)                 \
  V(check_plan, CheckPlanFor)            \
  V(plan_status, PlanStatus)

namespace tvm_infer::ffi_api {

// The CUDA attention kernels' tile table for a dtype ("float16", "bfloat16"), a `tile_table` of plan.h. Needs no device.
tvm::ffi::Shape CudaTileTable(tvm::ffi::String dtype, int64_t head_dim);
// The same where keys and values are kept in another type than queries have.
tvm::ffi::Shape CudaKVTileTable(tvm::ffi::String dtype, int64_t head_dim, tvm::ffi::String kv_dtype);
// The same where values (and outputs) are narrower than keys (and queries).
tvm::ffi::Shape CudaVOTileTable(tvm::ffi::String dtype, int64_t head_dim, int64_t head_dim_vo, tvm::ffi::String kv_dtype);

// "arch SMs name": e.g. "sm_90a 132 NVIDIA H200". ExecutorError where there is no driver or no such device.
tvm::ffi::String CudaInfo(int64_t device_id);

// Keeps a cubin that holds kernel `name` for `arch` ("sm_90a"), to be loaded when a call needs it.
void AddCubin(tvm::ffi::String name, tvm::ffi::String arch, tvm::ffi::Bytes cubin);

// Whether a kernel would accept the plan, by the kernel's own rules (PlanRefusal in schedule/plan.h), from the host's copy:
// PlanMismatchError or WorkspaceError where it would not.
//   num_tokens        rows of q; the plan may have fewer
//   max_partial_rows  workspace floats / (head_dim + 1)
//   num_kv_lists      entries of the page table's (or kv_indptr's) indptr, less one; the plan may have fewer
//   num_sms           CTAs that will be launched: one on each SM
void CheckPlanFor(tvm::ffi::TensorView plan_host, int64_t num_tokens, int64_t num_qo_heads, int64_t num_kv_heads, int64_t max_partial_rows,
                  int64_t num_kv_lists, int64_t num_sms);

// What the last launches that were given this plan on a device said of it (a PlanRefusal; 0: nothing). Synchronises the current stream.
int64_t PlanStatus(tvm::ffi::TensorView plan_device);

}  // namespace tvm_infer::ffi_api
