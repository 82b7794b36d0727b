// Functions with the argument lists that TVM's own paged KV cache calls under the backend tag "flashinfer", for those who keep that cache
// object: ["flashinfer", run, plan] in its creation. Registered as tvm_infer.mlc.<name>.
//
// The plan lies at the start of the int workspace; plan_info says what was planned. LSE is base 2, that cache's convention.
#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/runtime/tensor.h>

#include <cstdint>

namespace tvm_infer::mlc {

using tvm::runtime::Tensor;
using PlanInfo = tvm::ffi::Array<int64_t>;

// qo_indptr, kv_indptr int32 [batch + 1] (pages; tokens of ragged keys), kv_len int32 [batch], all on the host.
// fixed_split_size > 0 cuts KV at its multiples, otherwise disable_split_kv decides whether it is cut at all.
PlanInfo PrefillPlan(Tensor float_workspace, Tensor int_workspace, Tensor pinned_int_workspace, Tensor qo_indptr, Tensor kv_indptr,
                     Tensor kv_len, int64_t total_qo_len, int64_t batch_size, int64_t num_qo_heads, int64_t num_kv_heads, int64_t page_size,
                     bool enable_cuda_graph, int64_t head_dim_qk, int64_t head_dim_vo, bool causal, int64_t window_left,
                     int64_t fixed_split_size, bool disable_split_kv, int64_t num_colocated_ctas);

// indptr: pages, int32 [batch + 1]. How much of each last page is filled comes with the run only: the first run after a plan reads it, on
// cuda by waiting for the stream, and plans; those of the other layers take that plan.
PlanInfo DecodePlan(Tensor float_workspace, Tensor int_workspace, Tensor pinned_int_workspace, Tensor indptr, int64_t batch_size,
                    int64_t num_qo_heads, int64_t num_kv_heads, int64_t page_size, bool enable_cuda_graph, int64_t window_left,
                    double logits_soft_cap, int64_t head_dim_qk, int64_t head_dim_vo, Tensor empty_q, Tensor empty_kv);

// layout: 0 NHD, 1 HND. The rope arguments belong to rotation within attention, which that cache does not ask of this backend.
void PagedRun(Tensor float_workspace, Tensor int_workspace, PlanInfo plan_info, Tensor q, Tensor k_cache, Tensor v_cache, Tensor qo_indptr,
              Tensor kv_indptr, Tensor kv_indices, Tensor last_page_len, Tensor o, Tensor lse, int64_t mask_mode, int64_t layout,
              int64_t window_left, bool enable_pdl, double sm_scale, double rope_rcp_scale, double rope_rcp_theta);
void RaggedRun(Tensor float_workspace, Tensor int_workspace, PlanInfo plan_info, Tensor q, Tensor k, Tensor v, Tensor qo_indptr,
               Tensor kv_indptr, Tensor o, Tensor lse, int64_t mask_mode, int64_t layout, int64_t window_left, bool enable_pdl,
               double sm_scale, double rope_rcp_scale, double rope_rcp_theta);
void DecodeRun(Tensor float_workspace, Tensor int_workspace, PlanInfo plan_info, Tensor q, Tensor k_cache, Tensor v_cache, Tensor kv_indptr,
               Tensor kv_indices, Tensor last_page_len, Tensor o, Tensor lse, int64_t layout, int64_t window_left, bool enable_pdl,
               double sm_scale, double rope_rcp_scale, double rope_rcp_theta);

}  // namespace tvm_infer::mlc
