#include "tvm_infer/ffi/attention.h"

#include <array>

#include "tvm_infer/ffi/attention_checks.h"
#include "tvm_infer/ffi/attention_cuda.h"
#include "tvm_infer/ffi/common.h"
#include "tvm_infer/ffi/kv_dtype.h"
#include "tvm_infer/ffi/value_checks.h"

namespace tvm_infer::ffi_api {
namespace {

// Fills the part of the arguments that does not depend on where the keys are.
cpu::AttentionArgs QueryArgs(const TensorView& plan, const TensorView& q, double sm_scale, const TensorView& workspace, const TensorView& o,
                             const OptionalTensor& lse) {
  const PlanHeader& header = CheckPlan(plan);
  CheckQuery(q, o, lse, kHost);
  CheckPlanFitsQuery(header, q);
  CheckWorkspace(workspace, kHost);
  CheckPlanFitsWorkspace(header, workspace, o.size(2));

  cpu::AttentionArgs args{};
  args.plan = &header;
  args.dtype = CheckFloat(q, "q");
  args.num_qo_heads = static_cast<int32_t>(q.size(1));
  args.num_kv_heads = header.num_kv_heads;
  args.head_dim = static_cast<int32_t>(q.size(2));
  args.head_dim_vo = static_cast<int32_t>(o.size(2));
  args.q = DataPtr<void>(q);
  args.q_token_stride = Stride(q, 0);
  args.q_head_stride = Stride(q, 1);
  args.sm_scale = static_cast<float>(sm_scale);
  args.o = DataPtr<void>(o);
  args.o_token_stride = Stride(o, 0);
  args.o_head_stride = Stride(o, 1);
  args.lse = DataPtr<float>(lse);
  if (lse.has_value()) {
    args.lse_token_stride = Stride(lse.value(), 0);
    args.lse_head_stride = Stride(lse.value(), 1);
  }
  args.partial_o = DataPtr<float>(workspace);
  args.partial_lse = args.partial_o + static_cast<int64_t>(header.num_partial_rows) * args.head_dim_vo;
  return args;
}

void RunAppend(const TensorView& k, const TensorView& v, const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests,
               const cpu::KVSource& cache, const CacheShape& shape) {
  CheckNewTokens(k, v, shape, kHost);
  CheckNumNewTokens(k, v, qo_indptr[num_requests]);
  cpu::AppendArgs args{};
  args.dtype = CheckFloat(k, "k");
  args.num_requests = num_requests;
  args.num_kv_heads = shape.num_kv_heads;
  args.head_dim = shape.head_dim;
  args.head_dim_vo = shape.head_dim_vo;
  args.qo_indptr = qo_indptr;
  args.kv_len = kv_len;
  args.k = DataPtr<void>(k);
  args.v = DataPtr<void>(v);
  args.k_token_stride = Stride(k, 0);
  args.k_head_stride = Stride(k, 1);
  args.v_token_stride = Stride(v, 0);
  args.v_head_stride = Stride(v, 1);
  args.cache = cache;
  cpu::Append(args, 0);
}

// The cache and its page table, for the plan's lists.
CacheShape PagedKeys(const PlanView& plan, const TensorView& q, const TensorView& o, const TensorView& k_cache,
                     const OptionalTensor& v_cache, int64_t kv_layout, const TensorView& kv_page_indptr, const TensorView& kv_page_indices,
                     const KVScales& scales, cpu::KVSource* source) {
  const CacheShape shape = CheckCache(k_cache, v_cache, kv_layout, kHost, source, scales);
  CheckPlanFitsCache(*plan.header, shape);
  CheckCacheFitsQuery(shape, q);
  CheckValuesFitOutput(shape.head_dim_vo, o);
  CheckPageTable(kv_page_indptr, kv_page_indices, kHost, source);
  CheckPageTableValues({source->page_indptr, kv_page_indptr.size(0), source->page_indices, kv_page_indices.size(0)},
                       plan.header->num_kv_lists, plan.kv_len(), shape, DebugChecks(),
                       plan.header->num_kv_lists != plan.header->num_requests);
  return shape;
}

// The three kinds of attention, with a variant or (nullptr) without.
const variant::Call* CallOf(const VariantCallObj* variant, const Place& place) { return variant == nullptr ? nullptr : variant->At(place); }

void AttendPaged(const TensorView& plan, const TensorView& q, const TensorView& k_cache, const OptionalTensor& v_cache, int64_t kv_layout,
                 const TensorView& kv_page_indptr, const TensorView& kv_page_indices, double sm_scale, const TensorView& workspace,
                 const TensorView& o, const OptionalTensor& lse, const VariantCallObj* variant, const KVScales& scales = KVScales()) {
  const Place place = PlaceOf(q, "q");
  const variant::Call* call = CallOf(variant, place);
  if (place.is_cuda()) {
    return on_cuda::PagedAttention(place, plan, q, k_cache, v_cache, kv_layout, kv_page_indptr, kv_page_indices, sm_scale, workspace, o,
                                   lse, call, scales);
  }
  cpu::AttentionArgs args = QueryArgs(plan, q, sm_scale, workspace, o, lse);
  args.variant = call;
  PagedKeys(PlanView(args.plan), q, o, k_cache, v_cache, kv_layout, kv_page_indptr, kv_page_indices, scales, &args.kv);
  cpu::Attention(args, 0);
}

void AttendRagged(const TensorView& plan, const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& rows,
                  RowTable table, double sm_scale, const TensorView& workspace, const TensorView& o, const OptionalTensor& lse,
                  const VariantCallObj* variant, const KVScales& scales = KVScales()) {
  const Place place = PlaceOf(q, "q");
  const variant::Call* call = CallOf(variant, place);
  if (place.is_cuda()) return on_cuda::RaggedAttention(place, plan, q, k, v, rows, table, sm_scale, workspace, o, lse, call, scales);
  cpu::AttentionArgs args = QueryArgs(plan, q, sm_scale, workspace, o, lse);
  args.variant = call;
  CheckRagged(q, k, v, rows, table, kHost, &args.kv, scales);
  CheckValuesFitOutput(v.size(2), o);
  (table == RowTable::kIndptr ? CheckRaggedValues : CheckStartValues)(args.kv.page_indptr, rows.size(0), k, PlanView(args.plan));
  cpu::Attention(args, 0);
}

void AppendAndAttend(const TensorView& plan, const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& k_cache,
                     const OptionalTensor& v_cache, int64_t kv_layout, const TensorView& kv_page_indptr, const TensorView& kv_page_indices,
                     double sm_scale, const TensorView& workspace, const TensorView& o, const OptionalTensor& lse,
                     const VariantCallObj* variant, const KVScales& scales = KVScales()) {
  const Place place = PlaceOf(q, "q");
  const variant::Call* call = CallOf(variant, place);
  if (place.is_cuda()) {
    return on_cuda::AppendPagedAttention(place, plan, q, k, v, k_cache, v_cache, kv_layout, kv_page_indptr, kv_page_indices, sm_scale,
                                         workspace, o, lse, call, scales);
  }
  cpu::AttentionArgs args = QueryArgs(plan, q, sm_scale, workspace, o, lse);
  CheckPlanAppends(*PlanView(args.plan).header);
  args.variant = call;
  const PlanView view(args.plan);
  const CacheShape shape = PagedKeys(view, q, o, k_cache, v_cache, kv_layout, kv_page_indptr, kv_page_indices, scales, &args.kv);
  CheckAppendLengths(view.qo_indptr(), view.kv_len(), view.header->num_requests);
  RunAppend(k, v, view.qo_indptr(), view.kv_len(), view.header->num_requests, args.kv, shape);
  cpu::Attention(args, 0);
}

void AppendTo(const TensorView& k, const TensorView& v, const TensorView& qo_indptr, const TensorView& kv_len, const TensorView& k_cache,
              const OptionalTensor& v_cache, int64_t kv_layout, const TensorView& kv_page_indptr, const TensorView& kv_page_indices,
              const KVScales& scales) {
  if (const Place place = PlaceOf(k, "k"); place.is_cuda()) {
    return on_cuda::AppendPaged(place, k, v, qo_indptr, kv_len, k_cache, v_cache, kv_layout, kv_page_indptr, kv_page_indices, scales);
  }
  CheckAppendTensors(qo_indptr, kv_len, kHost);
  const int32_t num_requests = static_cast<int32_t>(kv_len.size(0));
  CheckAppendLengths(DataPtr<int32_t>(qo_indptr), DataPtr<int32_t>(kv_len), num_requests);
  cpu::KVSource cache{};
  const CacheShape shape = CheckCache(k_cache, v_cache, kv_layout, kHost, &cache, scales);
  CheckPageTable(kv_page_indptr, kv_page_indices, kHost, &cache);
  CheckPageTableValues({cache.page_indptr, kv_page_indptr.size(0), cache.page_indices, kv_page_indices.size(0)}, num_requests,
                       DataPtr<int32_t>(kv_len), shape, DebugChecks());
  RunAppend(k, v, DataPtr<int32_t>(qo_indptr), DataPtr<int32_t>(kv_len), num_requests, cache, shape);
}

const VariantCallObj* Get(const tvm::ffi::Optional<VariantCall>& variant) { return variant.has_value() ? variant.value().get() : nullptr; }

}  // namespace

void PagedAttention(TensorView plan, TensorView q, TensorView k_cache, OptionalTensor v_cache, int64_t kv_layout, TensorView kv_page_indptr,
                    TensorView kv_page_indices, double sm_scale, TensorView workspace, TensorView o, OptionalTensor lse) {
  Guarded(
      [&] { AttendPaged(plan, q, k_cache, v_cache, kv_layout, kv_page_indptr, kv_page_indices, sm_scale, workspace, o, lse, nullptr); });
}

void VariantPagedAttention(TensorView plan, TensorView q, TensorView k_cache, OptionalTensor v_cache, int64_t kv_layout,
                           TensorView kv_page_indptr, TensorView kv_page_indices, double sm_scale, TensorView workspace, TensorView o,
                           OptionalTensor lse, VariantCall variant) {
  Guarded([&] {
    AttendPaged(plan, q, k_cache, v_cache, kv_layout, kv_page_indptr, kv_page_indices, sm_scale, workspace, o, lse, variant.get());
  });
}

void RaggedAttention(TensorView plan, TensorView q, TensorView k, TensorView v, TensorView kv_indptr, double sm_scale, TensorView workspace,
                     TensorView o, OptionalTensor lse) {
  Guarded([&] { AttendRagged(plan, q, k, v, kv_indptr, RowTable::kIndptr, sm_scale, workspace, o, lse, nullptr); });
}

void VariantRaggedAttention(TensorView plan, TensorView q, TensorView k, TensorView v, TensorView kv_indptr, double sm_scale,
                            TensorView workspace, TensorView o, OptionalTensor lse, VariantCall variant) {
  Guarded([&] { AttendRagged(plan, q, k, v, kv_indptr, RowTable::kIndptr, sm_scale, workspace, o, lse, variant.get()); });
}

void AppendPaged(TensorView k, TensorView v, TensorView qo_indptr, TensorView kv_len, TensorView k_cache, OptionalTensor v_cache,
                 int64_t kv_layout, TensorView kv_page_indptr, TensorView kv_page_indices) {
  Guarded([&] { AppendTo(k, v, qo_indptr, kv_len, k_cache, v_cache, kv_layout, kv_page_indptr, kv_page_indices, KVScales()); });
}

void AppendPagedAttention(TensorView plan, TensorView q, TensorView k, TensorView v, TensorView k_cache, OptionalTensor v_cache,
                          int64_t kv_layout, TensorView kv_page_indptr, TensorView kv_page_indices, double sm_scale, TensorView workspace,
                          TensorView o, OptionalTensor lse) {
  Guarded([&] {
    AppendAndAttend(plan, q, k, v, k_cache, v_cache, kv_layout, kv_page_indptr, kv_page_indices, sm_scale, workspace, o, lse, nullptr);
  });
}

void VariantAppendAttention(TensorView plan, TensorView q, TensorView k, TensorView v, TensorView k_cache, OptionalTensor v_cache,
                            int64_t kv_layout, TensorView kv_page_indptr, TensorView kv_page_indices, double sm_scale, TensorView workspace,
                            TensorView o, OptionalTensor lse, VariantCall variant) {
  Guarded([&] {
    AppendAndAttend(plan, q, k, v, k_cache, v_cache, kv_layout, kv_page_indptr, kv_page_indices, sm_scale, workspace, o, lse,
                    variant.get());
  });
}

void ScaledPagedAttention(TensorView plan, TensorView q, TensorView k_cache, OptionalTensor v_cache, int64_t kv_layout,
                          TensorView kv_page_indptr, TensorView kv_page_indices, double sm_scale, TensorView workspace, TensorView o,
                          OptionalTensor lse, double k_scale, double v_scale, OptionalTensor k_scales, OptionalTensor v_scales,
                          tvm::ffi::Optional<VariantCall> variant) {
  Guarded([&] {
    AttendPaged(plan, q, k_cache, v_cache, kv_layout, kv_page_indptr, kv_page_indices, sm_scale, workspace, o, lse, Get(variant),
                {k_scale, v_scale, k_scales, v_scales});
  });
}

void ScaledRaggedAttention(TensorView plan, TensorView q, TensorView k, TensorView v, TensorView kv_indptr, double sm_scale,
                           TensorView workspace, TensorView o, OptionalTensor lse, double k_scale, double v_scale, OptionalTensor k_scales,
                           OptionalTensor v_scales, tvm::ffi::Optional<VariantCall> variant) {
  Guarded([&] {
    AttendRagged(plan, q, k, v, kv_indptr, RowTable::kIndptr, sm_scale, workspace, o, lse, Get(variant),
                 {k_scale, v_scale, k_scales, v_scales});
  });
}

namespace {

constexpr const char* kBuffers = "[num_rows, num_kv_heads, head_dim], or [num_buffers, max_len, num_kv_heads, head_dim]";

// Rows from one buffer to the next of a tensor [num_buffers, max_len, …]: they need not touch, nor does a buffer's head.
int64_t BufferStride(const TensorView& x, const char* name) {
  CheckRank(x, name, 4, kBuffers);
  if (x.numel() == 0 || x.size(0) == 1) return x.size(1);
  const int64_t buffer = Stride(x, 0), row = Stride(x, 1);
  if (x.size(1) == 1 && buffer > 0) return 1;  // the buffers are the rows
  if (row <= 0 || buffer < 0 || buffer % row != 0) {
    TVM_INFER_THROW(ArgumentError) << "argument `" << name << "`, shape " << ShapeString(x) << ", has strides " << buffer
                                   << " from one buffer to the next and " << row
                                   << " from one token to the next; the first must be a multiple of the second, so that the buffers are "
                                      "rows of one tensor. Pass them as one tensor [num_rows, num_kv_heads, head_dim], or copy them";
  }
  return buffer / row;
}

// [num_buffers, max_len, num_kv_heads, head_dim] as [num_rows, num_kv_heads, head_dim], what lies between the buffers included.
class AsRows {
 public:
  AsRows(const TensorView& x, const char* name) : of_(x), shape_{}, strides_{}, tensor_{} {
    if (x.ndim() == 3) return;
    const int64_t stride = BufferStride(x, name), buffers = x.size(0);
    shape_ = {x.numel() == 0 ? 0 : (buffers - 1) * stride + x.size(1), x.size(2), x.size(3)};
    strides_ = {x.size(1) == 1 ? Stride(x, 0) : Stride(x, 1), Stride(x, 2), Stride(x, 3)};
    tensor_ = {DataPtr<void>(x), x.device(), 3, x.dtype(), shape_.data(), strides_.data(), 0};
    of_ = TensorView(&tensor_);
  }
  AsRows(const AsRows&) = delete;
  const TensorView& view() const { return of_; }

 private:
  TensorView of_;
  std::array<int64_t, 3> shape_, strides_;
  DLTensor tensor_;
};

}  // namespace

int64_t ContiguousStride(TensorView k, TensorView v) {
  return Guarded([&] {
    const int64_t stride = BufferStride(k, "k"), stride_v = BufferStride(v, "v");
    if (stride != stride_v) {
      TVM_INFER_THROW(ArgumentError) << "arguments `k` and `v` have " << stride << " and " << stride_v
                                     << " rows from one buffer to the next; they must have the same, since one `kv_start` is for both. Lay "
                                        "them out alike";
    }
    return stride;
  });
}

void ContiguousAttention(TensorView plan, TensorView q, TensorView k, TensorView v, TensorView kv_start, double sm_scale,
                         TensorView workspace, TensorView o, OptionalTensor lse, double k_scale, double v_scale, OptionalTensor k_scales,
                         OptionalTensor v_scales, tvm::ffi::Optional<VariantCall> variant) {
  Guarded([&] {
    if (k.ndim() == 4 && v.ndim() == 4) ContiguousStride(k, v);
    const AsRows k_rows(k, "k"), v_rows(v, "v");
    AttendRagged(plan, q, k_rows.view(), v_rows.view(), kv_start, RowTable::kStart, sm_scale, workspace, o, lse, Get(variant),
                 {k_scale, v_scale, k_scales, v_scales});
  });
}

void ScaledAppend(TensorView k, TensorView v, TensorView qo_indptr, TensorView kv_len, TensorView k_cache, OptionalTensor v_cache,
                  int64_t kv_layout, TensorView kv_page_indptr, TensorView kv_page_indices, double k_scale, double v_scale,
                  OptionalTensor k_scales, OptionalTensor v_scales) {
  Guarded([&] {
    AppendTo(k, v, qo_indptr, kv_len, k_cache, v_cache, kv_layout, kv_page_indptr, kv_page_indices, {k_scale, v_scale, k_scales, v_scales});
  });
}

void ScaledAppendAttention(TensorView plan, TensorView q, TensorView k, TensorView v, TensorView k_cache, OptionalTensor v_cache,
                           int64_t kv_layout, TensorView kv_page_indptr, TensorView kv_page_indices, double sm_scale, TensorView workspace,
                           TensorView o, OptionalTensor lse, double k_scale, double v_scale, OptionalTensor k_scales,
                           OptionalTensor v_scales, tvm::ffi::Optional<VariantCall> variant) {
  Guarded([&] {
    AppendAndAttend(plan, q, k, v, k_cache, v_cache, kv_layout, kv_page_indptr, kv_page_indices, sm_scale, workspace, o, lse, Get(variant),
                    {k_scale, v_scale, k_scales, v_scales});
  });
}

void MergeStates(TensorView o_a, TensorView lse_a, TensorView o_b, TensorView lse_b, TensorView o, OptionalTensor lse) {
  Guarded([&] {
    if (const Place place = PlaceOf(o_a, "o_a"); place.is_cuda()) return on_cuda::MergeStates(place, o_a, lse_a, o_b, lse_b, o, lse);
    cpu::MergeArgs args{};
    args.dtype = CheckMergeOperand(o_a, lse_a, o_a, "o_a", "lse_a", kHost);
    CheckMergeOperand(o_b, lse_b, o_a, "o_b", "lse_b", kHost);
    CheckMergeOperand(o, lse, o_a, "o", "lse", kHost);
    args.num_rows = o_a.size(0);
    args.num_heads = static_cast<int32_t>(o_a.size(1));
    args.head_dim = static_cast<int32_t>(o_a.size(2));
    args.o_a = DataPtr<void>(o_a);
    args.o_b = DataPtr<void>(o_b);
    args.o_a_row_stride = Stride(o_a, 0);
    args.o_a_head_stride = Stride(o_a, 1);
    args.o_b_row_stride = Stride(o_b, 0);
    args.o_b_head_stride = Stride(o_b, 1);
    args.lse_a = DataPtr<float>(lse_a);
    args.lse_b = DataPtr<float>(lse_b);
    args.lse_a_row_stride = Stride(lse_a, 0);
    args.lse_a_head_stride = Stride(lse_a, 1);
    args.lse_b_row_stride = Stride(lse_b, 0);
    args.lse_b_head_stride = Stride(lse_b, 1);
    args.o = DataPtr<void>(o);
    args.o_row_stride = Stride(o, 0);
    args.o_head_stride = Stride(o, 1);
    args.lse = DataPtr<float>(lse);
    if (lse.has_value()) {
      args.lse_row_stride = Stride(lse.value(), 0);
      args.lse_head_stride = Stride(lse.value(), 1);
    }
    cpu::Merge(args, 0);
  });
}

bool SetDebugChecks(bool enabled) { return ExchangeDebugChecks(enabled); }

}  // namespace tvm_infer::ffi_api
