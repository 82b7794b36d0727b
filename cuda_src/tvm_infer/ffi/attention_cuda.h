// The attention functions (attention.h) on a CUDA device: the same arguments, all on that device; their values are not read.
//
// Validate, make the device current, take the environment's stream, launch. No device memory is allocated, nothing synchronises and
// no state is kept, so calls may be captured; a kernel's first call, which loads it, must come before. Beyond attention.h:
//   plan       on the device (tvm_infer.plan_upload); the kernel refuses one that does not fit and says why (tvm_infer.plan_status)
//   q, o       float16 or bfloat16, widths as in cuda/tile_table.cc; may have more rows than the plan has tokens (rows behind are not
//   written) lse        contiguous workspace  holds numel / (head_dim_vo + 1) partial rows sm_scale   > 0: it is folded into the exponent's
//   base variant    or null: of which kernel; copied before the call returns rows of q, o, k, v and of the caches begin on 16-byte
//   boundaries, since copies are of 16 bytes
// With debug checks on, every call copies the plan and the tables to the host and checks them as the CPU executor does. That
// synchronises; while a stream is being captured these checks are left out.
#pragma once

#include <cstdint>

#include "tvm_infer/ffi/attention.h"
#include "tvm_infer/ffi/attention_checks.h"
#include "tvm_infer/ffi/common.h"
#include "tvm_infer/ffi/kv_dtype.h"
#include "tvm_infer/ffi/page_selection_cuda.h"
#include "tvm_infer/variant/cpu_functions.h"

namespace tvm_infer::ffi_api::on_cuda {

void PagedAttention(const Place& place, const TensorView& plan, const TensorView& q, const TensorView& k_cache,
                    const OptionalTensor& v_cache, int64_t kv_layout, const TensorView& kv_page_indptr, const TensorView& kv_page_indices,
                    double sm_scale, const TensorView& workspace, const TensorView& o, const OptionalTensor& lse,
                    const variant::Call* variant, const KVScales& scales);

void RaggedAttention(const Place& place, const TensorView& plan, const TensorView& q, const TensorView& k, const TensorView& v,
                     const TensorView& rows, RowTable table, double sm_scale, const TensorView& workspace, const TensorView& o,
                     const OptionalTensor& lse, const variant::Call* variant, const KVScales& scales);

void AppendPaged(const Place& place, const TensorView& k, const TensorView& v, const TensorView& qo_indptr, const TensorView& kv_len,
                 const TensorView& k_cache, const OptionalTensor& v_cache, int64_t kv_layout, const TensorView& kv_page_indptr,
                 const TensorView& kv_page_indices, const KVScales& scales);

void AppendPagedAttention(const Place& place, const TensorView& plan, const TensorView& q, const TensorView& k, const TensorView& v,
                          const TensorView& k_cache, const OptionalTensor& v_cache, int64_t kv_layout, const TensorView& kv_page_indptr,
                          const TensorView& kv_page_indices, double sm_scale, const TensorView& workspace, const TensorView& o,
                          const OptionalTensor& lse, const variant::Call* variant, const KVScales& scales);

// The same for a caller that made plan and tables itself and keeps them at fixed addresses: what they hold is never read on the host.
// `k_cache` is both planes; tokens of q, k, v and o behind the plan's are padding: nothing is appended for them and o is 0. A plan with
// another capture key is refused by the kernel. Entries of kv_page_indptr may count from anywhere in kv_page_indices. With a rotation,
// `q` is written: its queries and k are rotated on the way (rope.h). With a selection attention runs with its plan and lists, which are
// made in between (five launches; in a step that selects nothing that plan is the step's, and the lists are the requests' tables).
struct OwnRotation {
  const TensorView& q;  // before the rotation
  const char* q_name;   // in messages
  const float* inv_freq;
  int32_t rotary_dim;
  bool is_interleaved;
  float magnitude;
};
void AppendOwnAttention(const Place& place, const TensorView& plan, uint64_t capture_key, const TensorView& q, const TensorView& k,
                        const TensorView& v, const TensorView& kv_cache, const OptionalTensor& v_cache, const TensorView& kv_page_indptr,
                        const TensorView& kv_page_indices, double sm_scale, const TensorView& workspace, const TensorView& o,
                        const OwnRotation* rotation, const variant::Call* variant, const KVScales& scales, const OwnSelection* selection);

void MergeStates(const Place& place, const TensorView& o_a, const TensorView& lse_a, const TensorView& o_b, const TensorView& lse_b,
                 const TensorView& o, const OptionalTensor& lse);

}  // namespace tvm_infer::ffi_api::on_cuda
