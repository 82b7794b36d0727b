#include "tvm_infer/ffi/rope.h"

#include <cmath>

#include "tvm_infer/cpu/rope_append.h"
#include "tvm_infer/ffi/rope_checks.h"
#include "tvm_infer/ffi/rope_cuda.h"
#include "tvm_infer/ffi/value_checks.h"

namespace tvm_infer::ffi_api {
namespace {

// Where tokens belong, on the host.
struct Lengths {
  const int32_t* qo_indptr;
  const int32_t* kv_len;
  int32_t num_requests;
};

// Either a plan or both lengths.
void CheckLengthsGiven(const RopeCall& call) {
  const bool has_plan = call.plan.has_value(), has_qo = call.qo_indptr.has_value(), has_kv = call.kv_len.has_value();
  if (has_plan ? !has_qo && !has_kv : has_qo && has_kv) return;
  const auto given = [](bool has) { return has ? "given" : "None"; };
  TVM_INFER_THROW(ArgumentError) << "arguments `plan`, `qo_indptr`, `kv_len` are " << given(has_plan) << ", " << given(has_qo) << ", "
                                 << given(has_kv) << "; pass either `plan`, or `qo_indptr` and `kv_len`, and None for the others";
}

// Shapes, types and places, whatever the executor.
CacheShape CheckCall(const RopeCall& call, const Place& place, cpu::KVSource* cache) {
  CheckLengthsGiven(call);
  const CacheShape shape = CheckCache(call.k_cache, call.v_cache, call.kv_layout, place, cache, call.scales);
  CheckPageTable(call.kv_page_indptr, call.kv_page_indices, place, cache);
  CheckRank(call.q, "q", 3, "[num_tokens, num_qo_heads, head_dim]");
  CheckLastDimContiguous(call.q, "q");
  CheckCacheFitsQuery(shape, call.q);
  CheckNewTokens(call.k, call.v, shape, place);
  CheckDType(call.k, "k", call.q.dtype(), "as q");
  CheckDim(call.k, "k", 0, call.q.size(0), "tokens of q");
  CheckDim(call.v, "v", 0, call.q.size(0), "tokens of q");
  CheckPlace(call.q_out, "q_out", place);
  CheckRank(call.q_out, "q_out", 3, "[num_tokens, num_qo_heads, head_dim]");
  CheckDType(call.q_out, "q_out", call.q.dtype(), "as q");
  for (int axis = 0; axis < 3; ++axis) CheckDim(call.q_out, "q_out", axis, call.q.size(axis), "as q");
  CheckLastDimContiguous(call.q_out, "q_out");
  return shape;
}

Lengths HostLengths(const RopeCall& call, const CacheShape& shape) {
  Lengths lengths{};
  if (call.plan.has_value()) {
    const PlanHeader& header = CheckPlan(call.plan.value());
    CheckPlanFitsQuery(header, call.q, /*is_padded=*/true);
    CheckPlanFitsCache(header, shape);
    CheckPlanAppends(header);
    const PlanView view(&header);
    lengths = {view.qo_indptr(), view.kv_len(), header.num_requests};
  } else {
    CheckAppendTensors(call.qo_indptr.value(), call.kv_len.value(), kHost);
    lengths = {DataPtr<const int32_t>(call.qo_indptr), DataPtr<const int32_t>(call.kv_len),
               static_cast<int32_t>(call.kv_len.value().size(0))};
  }
  CheckAppendLengths(lengths.qo_indptr, lengths.kv_len, lengths.num_requests);
  if (lengths.qo_indptr[lengths.num_requests] > call.q.size(0)) {
    TVM_INFER_THROW(ArgumentError) << "argument `q` has shape " << ShapeString(call.q) << "; qo_indptr names "
                                   << lengths.qo_indptr[lengths.num_requests] << " new tokens";
  }
  return lengths;
}

void RunOnHost(const RopeCall& call, const CacheShape& shape, const cpu::KVSource& cache) {
  const Lengths lengths = HostLengths(call, shape);
  CheckPageTableValues({cache.page_indptr, call.kv_page_indptr.size(0), cache.page_indices, call.kv_page_indices.size(0)},
                       lengths.num_requests, lengths.kv_len, shape, DebugChecks());
  cpu::RopeAppendArgs args{};
  args.append.dtype = CheckFloat(call.k, "k");
  args.append.num_requests = lengths.num_requests;
  args.append.num_kv_heads = shape.num_kv_heads;
  args.append.head_dim = shape.head_dim;
  args.append.head_dim_vo = shape.head_dim_vo;
  args.append.qo_indptr = lengths.qo_indptr;
  args.append.kv_len = lengths.kv_len;
  args.append.k = DataPtr<void>(call.k);
  args.append.v = DataPtr<void>(call.v);
  args.append.k_token_stride = Stride(call.k, 0);
  args.append.k_head_stride = Stride(call.k, 1);
  args.append.v_token_stride = Stride(call.v, 0);
  args.append.v_head_stride = Stride(call.v, 1);
  args.append.cache = cache;
  args.num_tokens = static_cast<int32_t>(call.q.size(0));
  args.num_qo_heads = static_cast<int32_t>(call.q.size(1));
  args.q = DataPtr<void>(call.q);
  args.q_token_stride = Stride(call.q, 0);
  args.q_head_stride = Stride(call.q, 1);
  args.q_out = DataPtr<void>(call.q_out);
  args.q_out_token_stride = Stride(call.q_out, 0);
  args.q_out_head_stride = Stride(call.q_out, 1);
  args.inv_freq = DataPtr<const float>(call.inv_freq);
  args.rotary_dim = static_cast<int32_t>(2 * call.inv_freq.size(0));
  args.is_interleaved = call.is_interleaved;
  args.magnitude = call.magnitude;
  cpu::RopeAppend(args, 0);
}

}  // namespace

void CheckRotation(const TensorView& inv_freq, int64_t interleaved, double magnitude, int64_t head_dim, const char* heads_of,
                   const Place& place) {
  CheckPlace(inv_freq, "inv_freq", place);
  CheckRank(inv_freq, "inv_freq", 1, "[rotary_dim / 2]");
  CheckDType(inv_freq, "inv_freq", DLDataType{kDLFloat, 32, 1}, "frequencies are float32");
  CheckContiguous(inv_freq, "inv_freq");
  if (2 * inv_freq.size(0) > head_dim) {
    TVM_INFER_THROW(ArgumentError) << "argument `inv_freq` has " << inv_freq.size(0) << " entries, a rotary_dim of " << 2 * inv_freq.size(0)
                                   << "; heads of " << heads_of << " have " << head_dim << " elements. Rotate at most those";
  }
  if (!std::isfinite(magnitude)) {
    TVM_INFER_THROW(ArgumentError) << "argument `magnitude` is " << magnitude
                                   << "; it must be finite (1 where cosine and sine have no factor)";
  }
  if (interleaved != 0 && interleaved != 1) {
    TVM_INFER_THROW(ArgumentError) << "argument `interleaved` is " << interleaved
                                   << "; it must be 0 (pairs (i, i + rotary_dim / 2)) or 1 (pairs (2i, 2i + 1))";
  }
}

void RopeAppendPaged(TensorView q, TensorView k, TensorView v, TensorView inv_freq, int64_t interleaved, double magnitude,
                     OptionalTensor plan, OptionalTensor qo_indptr, OptionalTensor kv_len, TensorView k_cache, OptionalTensor v_cache,
                     int64_t kv_layout, TensorView kv_page_indptr, TensorView kv_page_indices, TensorView q_out) {
  ScaledRopeAppend(q, k, v, inv_freq, interleaved, magnitude, plan, qo_indptr, kv_len, k_cache, v_cache, kv_layout, kv_page_indptr,
                   kv_page_indices, q_out, 1, 1, OptionalTensor(), OptionalTensor());
}

void ScaledRopeAppend(TensorView q, TensorView k, TensorView v, TensorView inv_freq, int64_t interleaved, double magnitude,
                      OptionalTensor plan, OptionalTensor qo_indptr, OptionalTensor kv_len, TensorView k_cache, OptionalTensor v_cache,
                      int64_t kv_layout, TensorView kv_page_indptr, TensorView kv_page_indices, TensorView q_out, double k_scale,
                      double v_scale, OptionalTensor k_scales, OptionalTensor v_scales) {
  Guarded([&] {
    const RopeCall call{q,
                        k,
                        v,
                        inv_freq,
                        interleaved == 1,
                        static_cast<float>(magnitude),
                        plan,
                        qo_indptr,
                        kv_len,
                        k_cache,
                        v_cache,
                        kv_layout,
                        kv_page_indptr,
                        kv_page_indices,
                        q_out,
                        {k_scale, v_scale, k_scales, v_scales}};
    const Place place = PlaceOf(q, "q");
    cpu::KVSource cache{};
    const CacheShape shape = CheckCall(call, place, &cache);
    CheckRotation(inv_freq, interleaved, magnitude, q.size(2), "`q`", place);
    if (place.is_cuda()) return on_cuda::RopeAppendPaged(place, call, shape, cache);
    RunOnHost(call, shape, cache);
  });
}

}  // namespace tvm_infer::ffi_api
