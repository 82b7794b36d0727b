#include "tvm_infer/ffi/rope_cuda.h"

#include <cstdint>
#include <vector>

#include "tvm_infer/cuda/rope_append.h"
#include "tvm_infer/ffi/cuda_launch.h"
#include "tvm_infer/ffi/cuda_scope.h"
#include "tvm_infer/ffi/value_checks.h"

namespace tvm_infer::ffi_api::on_cuda {
namespace {

// Sets the plan, or the lengths.
void SetLengths(cuda::AppendParams* params, const Place& place, const RopeCall& call, const CacheShape& shape) {
  if (call.plan.has_value()) {
    CheckPlanTensor(call.plan.value(), place);
    params->plan = DataPtr<void>(call.plan);
    SetHeads(&params->expected, call.q, shape.num_kv_heads, "k_cache");
    params->expected.max_tokens = params->max_tokens;
    params->expected.max_partial_rows = INT32_MAX;  // no partial rows are written here
    params->expected.max_kv_lists = static_cast<int32_t>(call.kv_page_indptr.size(0)) - 1;
    params->expected.features = cuda::kSharedWorks | cuda::kRowMasks;  // of them an append sees nothing
    return;
  }
  CheckAppendTensors(call.qo_indptr.value(), call.kv_len.value(), place);
  params->qo_indptr = DataPtr<const int32_t>(call.qo_indptr);
  params->kv_len = DataPtr<const int32_t>(call.kv_len);
  params->num_requests = static_cast<int32_t>(call.kv_len.value().size(0));
  CheckDim(call.kv_page_indptr, "kv_page_indptr", 0, int64_t{params->num_requests} + 1, "one more than kv_len has entries");
}

// Copies of lengths and tables, checked as the CPU executor checks its own.
void CheckValues(const CudaScope& scope, const RopeCall& call, const CacheShape& shape) {
  std::vector<int32_t> words, qo_indptr, kv_len;
  if (call.plan.has_value()) {
    words = scope.ToHost(call.plan.value());
    const PlanHeader& header = CheckPlanBytes(words.data(), static_cast<int64_t>(words.size() * sizeof(int32_t)));
    CheckPlanFitsQuery(header, call.q, /*is_padded=*/true);
    CheckPlanFitsCache(header, shape);
    CheckPlanAppends(header);
    const PlanView view(&header);
    qo_indptr.assign(view.qo_indptr(), view.qo_indptr() + header.num_requests + 1);
    kv_len.assign(view.kv_len(), view.kv_len() + header.num_requests);
  } else {
    qo_indptr = scope.ToHost(call.qo_indptr.value());
    kv_len = scope.ToHost(call.kv_len.value());
  }
  const std::vector<int32_t> indptr = scope.ToHost(call.kv_page_indptr), indices = scope.ToHost(call.kv_page_indices);
  const int32_t num_requests = static_cast<int32_t>(kv_len.size());
  CheckAppendLengths(qo_indptr.data(), kv_len.data(), num_requests);
  CheckPageTableValues({indptr.data(), call.kv_page_indptr.size(0), indices.data(), call.kv_page_indices.size(0)}, num_requests,
                       kv_len.data(), shape, /*check_pages=*/true);
  CheckDeviceScales(scope, call.scales);
}

}  // namespace

void RopeAppendPaged(const Place& place, const RopeCall& call, const CacheShape& shape, const cpu::KVSource& cache) {
  const int32_t rotary_dim = static_cast<int32_t>(2 * call.inv_freq.size(0));
  cuda::RopeAppendParams params{};
  params.append = AppendLaunch(place, call.k, call.v, call.k_cache, call.v_cache, cache, shape);
  cuda::CheckRopeShape(shape.head_dim, shape.head_dim_vo, rotary_dim, "q");
  CheckAlignedRows(call.q, "q");
  CheckAlignedRows(call.q_out, "q_out");
  CheckAligned(call.inv_freq, "inv_freq");
  SetLengths(&params.append, place, call, shape);
  params.q = DataPtr<void>(call.q);
  params.q_stride_token = Stride(call.q, 0);
  params.q_stride_head = Stride(call.q, 1);
  params.q_out = DataPtr<void>(call.q_out);
  params.q_out_stride_token = Stride(call.q_out, 0);
  params.q_out_stride_head = Stride(call.q_out, 1);
  params.inv_freq = DataPtr<const float>(call.inv_freq);
  params.magnitude = call.magnitude;
  params.append.num_qo_heads = static_cast<int32_t>(call.q.size(1));
  params.rotary_dim = rotary_dim;
  params.is_interleaved = call.is_interleaved;
  const CudaScope scope(place.device);
  if (MayCheckValues(scope)) CheckValues(scope, call, shape);
  if (call.q.size(0) > 0)
    cuda::LaunchRopeAppend(scope.device_id(), scope.stream(), ToTag(CheckFloat(call.q, "q")), ToTag(shape.dtype), params);
}

}  // namespace tvm_infer::ffi_api::on_cuda
