#include "tvm_infer/ffi/attention_cuda.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "tvm_infer/cuda/append.h"
#include "tvm_infer/cuda/attention.h"
#include "tvm_infer/cuda/merge_states.h"
#include "tvm_infer/cuda/rope_append.h"
#include "tvm_infer/cuda/tile_table.h"
#include "tvm_infer/ffi/attention_checks.h"
#include "tvm_infer/ffi/cuda_launch.h"
#include "tvm_infer/ffi/cuda_scope.h"
#include "tvm_infer/ffi/value_checks.h"

namespace tvm_infer::ffi_api::on_cuda {
namespace {

constexpr double kLog2E = 1.4426950408889634;

// The last dimension of values, which are in the keys' tensor where they have none of their own.
int64_t ValueWidth(const TensorView& keys, const OptionalTensor& values) {
  const TensorView& v = values.has_value() ? values.value() : keys;
  return v.ndim() == 0 ? 0 : v.size(v.ndim() - 1);
}

// Everything of a launch but its keys and values, of which only type and width are looked at; `kv_name`: whose type it is.
cuda::AttentionLaunch QueryLaunch(const Place& place, const TensorView& plan, const TensorView& q, double sm_scale,
                                  const TensorView& workspace, const TensorView& o, const OptionalTensor& lse, const TensorView& keys,
                                  const OptionalTensor& values, const char* kv_name) {
  const int32_t max_plan_ctas = CheckPlanTensor(plan, place);
  CheckQuery(q, o, lse, place);
  CheckWorkspace(workspace, place);
  if (lse.has_value()) CheckContiguous(lse.value(), "lse");
  CheckAlignedRows(q, "q");
  CheckAlignedRows(o, "o");
  CheckAligned(workspace, "workspace");
  if (!(sm_scale > 0 && std::isfinite(sm_scale))) {
    TVM_INFER_THROW(ArgumentError) << "argument `sm_scale` is " << sm_scale
                                   << "; on CUDA it must be finite and above 0. For the opposite sign negate q";
  }
  cuda::AttentionLaunch launch{};
  launch.max_plan_ctas = max_plan_ctas;
  launch.dtype = ToTag(CheckFloat(q, "q"));
  launch.kv_dtype = ToTag(CheckKVDType(keys, kv_name));
  launch.head_dim = static_cast<int32_t>(q.size(2));
  launch.head_dim_vo = static_cast<int32_t>(ValueWidth(keys, values));
  cuda::CheckKernelShape(launch.dtype, launch.kv_dtype, launch.head_dim, launch.head_dim_vo, "q");

  cuda::AttentionParams& params = launch.params;
  params.plan = DataPtr<void>(plan);
  params.q = DataPtr<void>(q);
  params.q_stride_token = Stride(q, 0);
  params.q_stride_head = Stride(q, 1);
  params.o = DataPtr<void>(o);
  params.o_stride_token = Stride(o, 0);
  params.o_stride_head = Stride(o, 1);
  params.lse = DataPtr<float>(lse);
  const int64_t capacity = std::min<int64_t>(workspace.numel() / (o.size(2) + 1), INT32_MAX);
  params.partial_o = DataPtr<float>(workspace);
  params.partial_lse = params.partial_o + capacity * o.size(2);
  params.expected.max_tokens = static_cast<int32_t>(q.size(0));
  params.expected.max_partial_rows = static_cast<int32_t>(capacity);
  params.sm_scale_log2 = static_cast<float>(sm_scale * kLog2E);
  params.sm_scale = static_cast<float>(sm_scale);
  return launch;
}

// What plans of the launch may have; behind an append of the same plan, both may have the same.
int32_t PlanFeatures(const cuda::AttentionLaunch& launch, bool appends) {
  if (launch.variant != nullptr) return cuda::kRowMasks;
  return cuda::kSharedWorks | (appends ? 0 : cuda::kHeadLists);
}

void SetKeys(cuda::AttentionParams* params, const cpu::KVSource& source) {
  params->kv_indptr = source.page_indptr;
  params->kv_page_indices = source.page_indices;
  params->k = source.k;
  params->v = source.v;
  params->k_stride_page = source.k_page_stride;
  params->k_stride_head = source.k_head_stride;
  params->k_stride_token = source.k_token_stride;
  params->v_stride_page = source.v_page_stride;
  params->v_stride_head = source.v_head_stride;
  params->v_stride_token = source.v_token_stride;
  params->k_scales = source.k_scale.heads;
  params->v_scales = source.v_scale.heads;
  params->k_scale = source.k_scale.all;
  params->v_scale = source.v_scale.all;
}

// A paged call's launch, and the shape of its cache.
CacheShape PagedLaunch(cuda::AttentionLaunch* launch, cpu::KVSource* source, const Place& place, const TensorView& q, const TensorView& o,
                       const TensorView& k_cache, const OptionalTensor& v_cache, int64_t kv_layout, const TensorView& kv_page_indptr,
                       const TensorView& kv_page_indices, const KVScales& scales, bool appends) {
  const CacheShape shape = CheckCache(k_cache, v_cache, kv_layout, place, source, scales);
  CheckCacheFitsQuery(shape, q);
  CheckValuesFitOutput(shape.head_dim_vo, o);
  CheckAlignedCache(k_cache, v_cache);
  CheckPageTable(kv_page_indptr, kv_page_indices, place, source);
  SetHeads(&launch->params.expected, q, shape.num_kv_heads, "k_cache");
  launch->params.expected.max_kv_lists = static_cast<int32_t>(kv_page_indptr.size(0)) - 1;
  launch->params.expected.features = PlanFeatures(*launch, appends);
  SetKeys(&launch->params, *source);
  cuda::CheckPageSize(launch->kv_dtype, shape.page_size, "k_cache");
  if (launch->variant != nullptr) cuda::CheckTakesVariant(launch->head_dim, launch->head_dim_vo, "k_cache");
  launch->page_size = shape.page_size;
  launch->num_pages = shape.num_pages;
  return shape;
}

const cuda::Kernel& Prepare(const CudaScope& scope, cuda::AttentionLaunch* launch) {
  launch->device_id = scope.device_id();
  launch->stream = scope.stream();
  return cuda::PrepareAttention(*launch);
}
void Launch(const CudaScope& scope, cuda::AttentionLaunch* launch) { cuda::LaunchAttention(*launch, Prepare(scope, launch)); }

// Copies of a paged call's plan and table, checked as the CPU executor checks its own. Returns the plan.
std::vector<int32_t> CheckPagedValues(const CudaScope& scope, const TensorView& plan, const TensorView& q, const TensorView& workspace,
                                      const CacheShape& shape, const TensorView& kv_page_indptr, const TensorView& kv_page_indices) {
  std::vector<int32_t> words = scope.ToHost(plan);
  const PlanHeader& header = CheckPlanBytes(words.data(), static_cast<int64_t>(words.size() * sizeof(int32_t)));
  CheckPlanFitsQuery(header, q, /*is_padded=*/true);
  CheckPlanFitsWorkspace(header, workspace, shape.head_dim_vo);
  CheckPlanFitsCache(header, shape);
  const std::vector<int32_t> indptr = scope.ToHost(kv_page_indptr), indices = scope.ToHost(kv_page_indices);
  CheckPageTableValues({indptr.data(), kv_page_indptr.size(0), indices.data(), kv_page_indices.size(0)}, header.num_kv_lists,
                       PlanView(&header).kv_len(), shape, /*check_pages=*/true, header.num_kv_lists != header.num_requests);
  return words;
}

cuda::RopeAppendParams RopeParams(const cuda::AppendParams& append, const TensorView& q_out, const OwnRotation& rotation) {
  cuda::RopeAppendParams params{};
  params.append = append;
  params.q = DataPtr<void>(rotation.q);
  params.q_stride_token = Stride(rotation.q, 0);
  params.q_stride_head = Stride(rotation.q, 1);
  params.q_out = DataPtr<void>(q_out);
  params.q_out_stride_token = Stride(q_out, 0);
  params.q_out_stride_head = Stride(q_out, 1);
  params.inv_freq = rotation.inv_freq;
  params.magnitude = rotation.magnitude;
  params.rotary_dim = rotation.rotary_dim;
  params.is_interleaved = rotation.is_interleaved;
  return params;
}

}  // namespace

void PagedAttention(const Place& place, const TensorView& plan, const TensorView& q, const TensorView& k_cache,
                    const OptionalTensor& v_cache, int64_t kv_layout, const TensorView& kv_page_indptr, const TensorView& kv_page_indices,
                    double sm_scale, const TensorView& workspace, const TensorView& o, const OptionalTensor& lse,
                    const variant::Call* variant, const KVScales& scales) {
  cuda::AttentionLaunch launch = QueryLaunch(place, plan, q, sm_scale, workspace, o, lse, k_cache, v_cache, "k_cache");
  launch.variant = variant;
  cpu::KVSource source{};
  const CacheShape shape =
      PagedLaunch(&launch, &source, place, q, o, k_cache, v_cache, kv_layout, kv_page_indptr, kv_page_indices, scales, /*appends=*/false);
  const CudaScope scope(place.device);
  if (MayCheckValues(scope)) {
    CheckPagedValues(scope, plan, q, workspace, shape, kv_page_indptr, kv_page_indices);
    CheckDeviceScales(scope, scales);
  }
  Launch(scope, &launch);
}

void RaggedAttention(const Place& place, const TensorView& plan, const TensorView& q, const TensorView& k, const TensorView& v,
                     const TensorView& rows, RowTable table, double sm_scale, const TensorView& workspace, const TensorView& o,
                     const OptionalTensor& lse, const variant::Call* variant, const KVScales& scales) {
  cuda::AttentionLaunch launch = QueryLaunch(place, plan, q, sm_scale, workspace, o, lse, k, v, "k");
  launch.variant = variant;
  cpu::KVSource source{};
  CheckRagged(q, k, v, rows, table, place, &source, scales);
  CheckValuesFitOutput(v.size(2), o);
  CheckAlignedRows(k, "k");
  CheckAlignedRows(v, "v");
  SetHeads(&launch.params.expected, q, k.size(1), "k");
  launch.params.expected.max_kv_lists = static_cast<int32_t>(NumLists(table, rows));
  launch.params.expected.features = PlanFeatures(launch, /*appends=*/false);
  SetKeys(&launch.params, source);
  launch.page_size = cuda::kRagged;
  launch.num_pages = k.size(0);
  const CudaScope scope(place.device);
  if (MayCheckValues(scope)) {
    const std::vector<int32_t> words = scope.ToHost(plan), values = scope.ToHost(rows);
    const PlanHeader& header = CheckPlanBytes(words.data(), static_cast<int64_t>(words.size() * sizeof(int32_t)));
    CheckPlanFitsQuery(header, q, /*is_padded=*/true);
    CheckPlanFitsWorkspace(header, workspace, o.size(2));
    (table == RowTable::kIndptr ? CheckRaggedValues : CheckStartValues)(values.data(), rows.size(0), k, PlanView(&header));
    CheckDeviceScales(scope, scales);
  }
  Launch(scope, &launch);
}

void AppendPaged(const Place& place, const TensorView& k, const TensorView& v, const TensorView& qo_indptr, const TensorView& kv_len,
                 const TensorView& k_cache, const OptionalTensor& v_cache, int64_t kv_layout, const TensorView& kv_page_indptr,
                 const TensorView& kv_page_indices, const KVScales& scales) {
  CheckAppendTensors(qo_indptr, kv_len, place);
  cpu::KVSource cache{};
  const CacheShape shape = CheckCache(k_cache, v_cache, kv_layout, place, &cache, scales);
  CheckPageTable(kv_page_indptr, kv_page_indices, place, &cache);
  cuda::AppendParams params = AppendLaunch(place, k, v, k_cache, v_cache, cache, shape);
  params.num_requests = static_cast<int32_t>(kv_len.size(0));
  params.qo_indptr = DataPtr<const int32_t>(qo_indptr);
  params.kv_len = DataPtr<const int32_t>(kv_len);
  if (kv_page_indptr.size(0) != kv_len.size(0) + 1) {
    TVM_INFER_THROW(ArgumentError) << "argument `kv_page_indptr` has " << kv_page_indptr.size(0) << " entries; " << kv_len.size(0)
                                   << " requests need " << kv_len.size(0) + 1;
  }
  const CudaScope scope(place.device);
  if (MayCheckValues(scope)) {
    const std::vector<int32_t> qo = scope.ToHost(qo_indptr), lengths = scope.ToHost(kv_len);
    const std::vector<int32_t> indptr = scope.ToHost(kv_page_indptr), indices = scope.ToHost(kv_page_indices);
    CheckAppendLengths(qo.data(), lengths.data(), params.num_requests);
    CheckPageTableValues({indptr.data(), kv_page_indptr.size(0), indices.data(), kv_page_indices.size(0)}, params.num_requests,
                         lengths.data(), shape, /*check_pages=*/true);
    CheckDeviceScales(scope, scales);
  }
  if (k.size(0) > 0)
    cuda::LaunchAppend(scope.device_id(), scope.stream(), ToTag(CheckFloat(k, "k")), ToTag(shape.dtype), shape.head_dim_vo, params);
}

void AppendPagedAttention(const Place& place, const TensorView& plan, const TensorView& q, const TensorView& k, const TensorView& v,
                          const TensorView& k_cache, const OptionalTensor& v_cache, int64_t kv_layout, const TensorView& kv_page_indptr,
                          const TensorView& kv_page_indices, double sm_scale, const TensorView& workspace, const TensorView& o,
                          const OptionalTensor& lse, const variant::Call* variant, const KVScales& scales) {
  cuda::AttentionLaunch launch = QueryLaunch(place, plan, q, sm_scale, workspace, o, lse, k_cache, v_cache, "k_cache");
  launch.variant = variant;
  cpu::KVSource source{};
  const CacheShape shape =
      PagedLaunch(&launch, &source, place, q, o, k_cache, v_cache, kv_layout, kv_page_indptr, kv_page_indices, scales, /*appends=*/true);
  cuda::AppendParams params = AppendLaunch(place, k, v, k_cache, v_cache, source, shape);
  CheckDim(k, "k", 0, q.size(0), "tokens of q");
  params.plan = launch.params.plan;
  params.expected = launch.params.expected;
  const CudaScope scope(place.device);
  if (MayCheckValues(scope)) {
    const std::vector<int32_t> words = CheckPagedValues(scope, plan, q, workspace, shape, kv_page_indptr, kv_page_indices);
    const PlanView view(words.data());
    CheckPlanAppends(*view.header);
    CheckAppendLengths(view.qo_indptr(), view.kv_len(), view.header->num_requests);
    CheckDeviceScales(scope, scales);
  }
  const cuda::Kernel& kernel = Prepare(scope, &launch);
  if (k.size(0) > 0) cuda::LaunchAppend(scope.device_id(), scope.stream(), launch.dtype, launch.kv_dtype, shape.head_dim_vo, params);
  cuda::LaunchAttention(launch, kernel);
}

void AppendOwnAttention(const Place& place, const TensorView& plan, uint64_t capture_key, const TensorView& q, const TensorView& k,
                        const TensorView& v, const TensorView& kv_cache, const OptionalTensor& v_cache, const TensorView& kv_page_indptr,
                        const TensorView& kv_page_indices, double sm_scale, const TensorView& workspace, const TensorView& o,
                        const OwnRotation* rotation, const variant::Call* variant, const KVScales& scales, const OwnSelection* selection) {
  // First, for its name: k and v may be parts of the same tensor, and are aligned if it is.
  if (rotation != nullptr) CheckAlignedRows(rotation->q, rotation->q_name);
  cuda::AttentionLaunch launch = QueryLaunch(place, plan, q, sm_scale, workspace, o, OptionalTensor(), kv_cache, v_cache, "kv_cache");
  launch.variant = variant;
  cpu::KVSource source{};
  const CacheShape shape =
      PagedLaunch(&launch, &source, place, q, o, kv_cache, v_cache, /*kv_layout=*/0, kv_page_indptr, kv_page_indices, scales,
                  /*appends=*/true);
  launch.params.expected.capture_key[0] = static_cast<uint32_t>(capture_key);
  launch.params.expected.capture_key[1] = static_cast<uint32_t>(capture_key >> 32);
  cuda::AppendParams params = AppendLaunch(place, k, v, kv_cache, v_cache, source, shape);
  CheckDim(k, "k", 0, q.size(0), "tokens of q");
  params.plan = launch.params.plan;
  params.expected = launch.params.expected;
  // The cache's own, copied to the device by begin_forward. Kernels behind a copy start when it has ended.
  params.plan_is_ready = launch.params.plan_is_ready = 1;
  params.o = launch.params.o;
  params.o_stride_token = launch.params.o_stride_token;
  params.o_stride_head = launch.params.o_stride_head;
  params.num_qo_heads = static_cast<int32_t>(q.size(1));
  const CudaScope scope(place.device);
  const cuda::Kernel& kernel = Prepare(scope, &launch);
  if (k.size(0) > 0 && rotation != nullptr) {
    cuda::LaunchRopeAppend(scope.device_id(), scope.stream(), launch.dtype, launch.kv_dtype, RopeParams(params, q, *rotation));
  } else if (k.size(0) > 0) {
    cuda::LaunchAppend(scope.device_id(), scope.stream(), launch.dtype, launch.kv_dtype, shape.head_dim_vo, params);
  }
  if (selection != nullptr) {
    SelectOwnPages(place, *selection, plan, q, kv_cache, shape, source, kv_page_indptr, kv_page_indices);
    launch.max_plan_ctas = CheckPlanTensor(selection->plan, place);
    launch.params.plan = DataPtr<void>(selection->plan);
    launch.params.plan_is_ready = 0;  // the kernel ahead writes it
    launch.params.kv_indptr = DataPtr<const int32_t>(selection->list_indptr);
    launch.params.expected.max_kv_lists = static_cast<int32_t>(selection->list_indptr.size(0)) - 1;
    launch.params.expected.features = PlanFeatures(launch, /*appends=*/false);
  }
  cuda::LaunchAttention(launch, kernel);
}

void MergeStates(const Place& place, const TensorView& o_a, const TensorView& lse_a, const TensorView& o_b, const TensorView& lse_b,
                 const TensorView& o, const OptionalTensor& lse) {
  const cpu::DType dtype = CheckMergeOperand(o_a, lse_a, o_a, "o_a", "lse_a", place);
  CheckMergeOperand(o_b, lse_b, o_a, "o_b", "lse_b", place);
  CheckMergeOperand(o, lse, o_a, "o", "lse", place);
  CheckAlignedRows(o_a, "o_a");
  CheckAlignedRows(o_b, "o_b");
  CheckAlignedRows(o, "o");
  cuda::MergeStatesParams params{};
  params.o_a = DataPtr<void>(o_a);
  params.o_b = DataPtr<void>(o_b);
  params.o = DataPtr<void>(o);
  params.lse_a = DataPtr<float>(lse_a);
  params.lse_b = DataPtr<float>(lse_b);
  params.lse = DataPtr<float>(lse);
  params.o_a_stride_row = Stride(o_a, 0);
  params.o_a_stride_head = Stride(o_a, 1);
  params.o_b_stride_row = Stride(o_b, 0);
  params.o_b_stride_head = Stride(o_b, 1);
  params.o_stride_row = Stride(o, 0);
  params.o_stride_head = Stride(o, 1);
  params.lse_a_stride_row = Stride(lse_a, 0);
  params.lse_a_stride_head = Stride(lse_a, 1);
  params.lse_b_stride_row = Stride(lse_b, 0);
  params.lse_b_stride_head = Stride(lse_b, 1);
  if (lse.has_value()) {
    params.lse_stride_row = Stride(lse.value(), 0);
    params.lse_stride_head = Stride(lse.value(), 1);
  }
  params.num_rows = static_cast<int32_t>(o_a.size(0));
  params.num_heads = static_cast<int32_t>(o_a.size(1));
  params.head_dim = static_cast<int32_t>(o_a.size(2));
  const CudaScope scope(place.device);
  if (o_a.numel() > 0) cuda::LaunchMergeStates(scope.device_id(), scope.stream(), ToTag(dtype), params);
}

}  // namespace tvm_infer::ffi_api::on_cuda
