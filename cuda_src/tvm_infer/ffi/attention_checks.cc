#include "tvm_infer/ffi/attention_checks.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace tvm_infer::ffi_api {
namespace {

constexpr DLDataType kFloat32 = {kDLFloat, 32, 1};
constexpr int32_t kMaxHeadDim = 256;

std::atomic<bool>& DebugFlag() {
  static std::atomic<bool> flag([] {
    const char* value = std::getenv("TVM_INFER_DEBUG_CHECKS");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }());
  return flag;
}

void CheckHeadDim(const TensorView& tensor, const char* name) {
  const int64_t head_dim = tensor.size(tensor.ndim() - 1);
  if (head_dim <= 0 || head_dim > kMaxHeadDim || head_dim % 8 != 0) {
    TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` has shape " << ShapeString(tensor) << ": head_dim " << head_dim
                                   << " is not supported; it must be a multiple of 8, from 8 to " << kMaxHeadDim
                                   << ". Pad the heads with zeros (and keep sm_scale that of the unpadded width)";
  }
}

void CheckSameDType(const TensorView& tensor, const char* name, const TensorView& like, const char* like_name) {
  const DLDataType a = tensor.dtype(), b = like.dtype();
  if (a.code != b.code || a.bits != b.bits || a.lanes != b.lanes) {
    TVM_INFER_THROW(DTypeError) << "argument `" << name << "` has dtype " << DTypeString(a) << ", `" << like_name << "` has "
                                << DTypeString(b) << "; they must be the same";
  }
}

}  // namespace

bool DebugChecks() { return DebugFlag().load(std::memory_order_relaxed); }
bool ExchangeDebugChecks(bool enabled) { return DebugFlag().exchange(enabled); }

const PlanHeader& CheckPlan(const TensorView& plan) {
  CheckIndex(plan, "plan");
  const int64_t bytes = plan.numel() * static_cast<int64_t>(sizeof(int32_t));
  const PlanHeader* header = DataPtr<const PlanHeader>(plan);
  if (bytes < static_cast<int64_t>(sizeof(PlanHeader)) || header->magic != kPlanMagic) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `plan`, " << bytes << " bytes, is not a plan; make one with tvm_infer.plan";
  }
  if (header->version != kPlanVersion) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `plan` has version " << header->version << ", this library reads version "
                                       << kPlanVersion << "; make the plan with this library's tvm_infer.plan";
  }
  if (header->bytes_used > bytes) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `plan` says it uses " << header->bytes_used << " bytes but has " << bytes
                                       << "; pass the whole buffer";
  }
  return *header;
}

void CheckQuery(const PlanHeader& header, const TensorView& q, const TensorView& o, const OptionalTensor& lse) {
  CheckCpu(q, "q");
  CheckFloat(q, "q");
  CheckRank(q, "q", 3, "[num_tokens, num_qo_heads, head_dim]");
  CheckHeadDim(q, "q");
  CheckLastDimContiguous(q, "q");
  if (q.size(0) != header.num_tokens) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `q` has " << q.size(0) << " tokens, shape " << ShapeString(q)
                                       << ", but the plan was made for " << header.num_tokens << "; plan with this batch's qo_indptr";
  }
  const int64_t plan_heads = static_cast<int64_t>(header.num_kv_heads) * header.group_size;
  if (q.size(1) != plan_heads) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `q` has " << q.size(1) << " heads, shape " << ShapeString(q)
                                       << ", but the plan was made for " << plan_heads << " query heads (" << header.num_kv_heads
                                       << " KV heads); plan with this num_qo_heads";
  }
  CheckCpu(o, "o");
  CheckRank(o, "o", 3, "[num_tokens, num_qo_heads, head_dim]");
  CheckSameDType(o, "o", q, "q");
  for (int axis = 0; axis < 3; ++axis) CheckDim(o, "o", axis, q.size(axis), "as q");
  CheckLastDimContiguous(o, "o");
  if (lse.has_value()) {
    CheckCpu(lse.value(), "lse");
    CheckRank(lse.value(), "lse", 2, "[num_tokens, num_qo_heads]");
    CheckDType(lse.value(), "lse", kFloat32, "log-sum-exp is kept in float32");
    for (int axis = 0; axis < 2; ++axis) CheckDim(lse.value(), "lse", axis, q.size(axis), "as q");
  }
}

void CheckWorkspace(const PlanHeader& header, const TensorView& workspace, int64_t head_dim) {
  CheckCpu(workspace, "workspace");
  CheckDType(workspace, "workspace", kFloat32, "partial results are float32");
  CheckContiguous(workspace, "workspace");
  const int64_t needed = static_cast<int64_t>(header.num_partial_rows) * (head_dim + 1);
  if (workspace.numel() < needed) {
    TVM_INFER_THROW(WorkspaceError) << "argument `workspace` holds " << workspace.numel() << " floats; this plan needs " << needed << " ("
                                    << header.num_partial_rows << " partial rows of head_dim " << head_dim
                                    << " + 1). Size it with tvm_infer.workspace_size";
  }
}

CacheShape CheckCache(const TensorView& k_cache, const OptionalTensor& v_cache, int64_t kv_layout, cpu::KVSource* source) {
  const bool combined = !v_cache.has_value();
  const bool nhd = kv_layout == 1;
  if (kv_layout != 0 && kv_layout != 1) {
    TVM_INFER_THROW(ArgumentError) << "argument `kv_layout` is " << kv_layout << "; it must be 0 (HND) or 1 (NHD)";
  }
  const char* dims = nhd ? "[num_pages, page_size, num_kv_heads, head_dim]" : "[num_pages, num_kv_heads, page_size, head_dim]";
  CheckCpu(k_cache, "k_cache");
  const cpu::DType dtype = CheckFloat(k_cache, "k_cache");
  if (combined) {
    CheckRank(k_cache, "k_cache", 5, "[num_pages, 2, …] holding keys and values, because v_cache is None");
    CheckDim(k_cache, "k_cache", 1, 2, "keys and values");
  } else {
    CheckRank(k_cache, "k_cache", 4, dims);
    CheckRank(v_cache.value(), "v_cache", 4, dims);
    CheckCpu(v_cache.value(), "v_cache");
    CheckSameDType(v_cache.value(), "v_cache", k_cache, "k_cache");
    for (int axis = 0; axis < 4; ++axis) CheckDim(v_cache.value(), "v_cache", axis, k_cache.size(axis), "as k_cache");
    CheckLastDimContiguous(v_cache.value(), "v_cache");
  }
  CheckHeadDim(k_cache, "k_cache");
  CheckLastDimContiguous(k_cache, "k_cache");

  const int first = combined ? 2 : 1;  // axis of heads (HND) or tokens (NHD)
  const int head_axis = nhd ? first + 1 : first, token_axis = nhd ? first : first + 1;
  const TensorView& v = combined ? k_cache : v_cache.value();
  source->k = DataPtr<void>(k_cache);
  source->v = DataPtr<void>(v);
  if (combined) {
    const int64_t bytes = k_cache.dtype().bits / 8;
    source->v = static_cast<const char*>(source->v) + Stride(k_cache, 1) * bytes;
  }
  source->k_page_stride = Stride(k_cache, 0);
  source->k_head_stride = Stride(k_cache, head_axis);
  source->k_token_stride = Stride(k_cache, token_axis);
  source->v_page_stride = Stride(v, 0);
  source->v_head_stride = Stride(v, head_axis);
  source->v_token_stride = Stride(v, token_axis);
  CacheShape shape;
  shape.dtype = dtype;
  shape.num_pages = k_cache.size(0);
  shape.num_kv_heads = static_cast<int32_t>(k_cache.size(head_axis));
  shape.page_size = static_cast<int32_t>(k_cache.size(token_axis));
  shape.head_dim = static_cast<int32_t>(k_cache.size(first + 2));
  if (shape.page_size < 1) {
    TVM_INFER_THROW(ArgumentError) << "argument `k_cache` has shape " << ShapeString(k_cache) << ": page_size must be at least 1";
  }
  source->page_size = shape.page_size;
  return shape;
}

void CheckSameHeads(const PlanHeader& header, const CacheShape& shape, const TensorView& q) {
  if (shape.num_kv_heads != header.num_kv_heads) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `k_cache` has " << shape.num_kv_heads << " KV heads, but the plan was made for "
                                       << header.num_kv_heads << "; plan with this num_kv_heads";
  }
  if (shape.head_dim != q.size(2)) {
    TVM_INFER_THROW(ArgumentError) << "argument `q` has head_dim " << q.size(2) << ", `k_cache` has " << shape.head_dim
                                   << "; they must be the same";
  }
  if (shape.dtype != CheckFloat(q, "q")) {
    TVM_INFER_THROW(DTypeError) << "argument `q` has dtype " << DTypeString(q.dtype())
                                << ", `k_cache` another; they must be the same. Cast one of them";
  }
}

void CheckPageTable(const TensorView& indptr, const TensorView& indices, int32_t num_lists, const int32_t* kv_len, const CacheShape& shape,
                    cpu::KVSource* source) {
  CheckIndex(indptr, "kv_page_indptr");
  CheckIndex(indices, "kv_page_indices");
  if (indptr.size(0) != num_lists + 1) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `kv_page_indptr` has " << indptr.size(0) << " entries; " << num_lists
                                       << " requests need " << num_lists + 1;
  }
  const int32_t* ptr = DataPtr<const int32_t>(indptr);
  const int32_t* pages = DataPtr<const int32_t>(indices);
  if (ptr[0] != 0) TVM_INFER_THROW(ArgumentError) << "argument `kv_page_indptr` starts at " << ptr[0] << "; it must start at 0";
  const bool debug = DebugChecks();
  for (int32_t l = 0; l < num_lists; ++l) {
    const int64_t num_pages = static_cast<int64_t>(ptr[l + 1]) - ptr[l];
    if (num_pages < 0) {
      TVM_INFER_THROW(ArgumentError) << "argument `kv_page_indptr` decreases from " << ptr[l] << " to " << ptr[l + 1] << " at entry "
                                     << l + 1 << "; it must not decrease";
    }
    if (num_pages * shape.page_size < kv_len[l]) {
      TVM_INFER_THROW(PlanMismatchError) << "request " << l << " has kv_len " << kv_len[l] << " but argument `kv_page_indptr` gives it "
                                         << num_pages << " pages of " << shape.page_size << " tokens; it needs "
                                         << (kv_len[l] + static_cast<int64_t>(shape.page_size) - 1) / shape.page_size;
    }
  }
  if (ptr[num_lists] > indices.size(0)) {
    TVM_INFER_THROW(ArgumentError) << "argument `kv_page_indptr` ends at " << ptr[num_lists] << " but `kv_page_indices` has "
                                   << indices.size(0) << " entries";
  }
  for (int32_t l = 0; debug && l < num_lists; ++l) {
    const int32_t used = (kv_len[l] + shape.page_size - 1) / shape.page_size;  // later entries may hold anything
    for (int32_t i = ptr[l]; i < ptr[l] + used; ++i) {
      if (pages[i] < 0 || pages[i] >= shape.num_pages) {
        TVM_INFER_THROW(ArgumentError) << "argument `kv_page_indices` has page " << pages[i] << " at entry " << i << " (request " << l
                                       << "); pages must be in [0, " << shape.num_pages << ")";
      }
    }
  }
  source->page_indptr = ptr;
  source->page_indices = pages;
}

void CheckRagged(const PlanView& plan, const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& kv_indptr,
                 cpu::KVSource* source) {
  const PlanHeader& header = *plan.header;
  const TensorView* tensors[] = {&k, &v};
  const char* names[] = {"k", "v"};
  for (int i = 0; i < 2; ++i) {
    CheckCpu(*tensors[i], names[i]);
    CheckRank(*tensors[i], names[i], 3, "[num_kv_tokens, num_kv_heads, head_dim]");
    CheckSameDType(*tensors[i], names[i], q, "q");
    CheckDim(*tensors[i], names[i], 1, header.num_kv_heads, "num_kv_heads of the plan");
    CheckDim(*tensors[i], names[i], 2, q.size(2), "head_dim of q");
    CheckLastDimContiguous(*tensors[i], names[i]);
  }
  CheckDim(v, "v", 0, k.size(0), "as k");
  CheckIndex(kv_indptr, "kv_indptr");
  CheckDim(kv_indptr, "kv_indptr", 0, header.num_kv_lists + 1, "one more than the plan has requests");
  const int32_t* ptr = DataPtr<const int32_t>(kv_indptr);
  if (ptr[0] != 0) TVM_INFER_THROW(ArgumentError) << "argument `kv_indptr` starts at " << ptr[0] << "; it must start at 0";
  for (int32_t l = 0; l < header.num_kv_lists; ++l) {
    if (ptr[l + 1] - ptr[l] != plan.kv_len()[l]) {
      TVM_INFER_THROW(PlanMismatchError) << "argument `kv_indptr` gives request " << l << " " << ptr[l + 1] - ptr[l]
                                         << " keys, but the plan was made for " << plan.kv_len()[l];
    }
  }
  if (ptr[header.num_kv_lists] > k.size(0)) {
    TVM_INFER_THROW(ArgumentError) << "argument `kv_indptr` ends at " << ptr[header.num_kv_lists] << " but `k` has " << k.size(0)
                                   << " rows";
  }
  source->k = DataPtr<void>(k);
  source->v = DataPtr<void>(v);
  source->k_page_stride = source->v_page_stride = 0;
  source->k_token_stride = Stride(k, 0);
  source->k_head_stride = Stride(k, 1);
  source->v_token_stride = Stride(v, 0);
  source->v_head_stride = Stride(v, 1);
  source->page_size = 1;
  source->page_indptr = ptr;
  source->page_indices = nullptr;
}

void CheckAppendLengths(const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests) {
  if (qo_indptr[0] != 0) TVM_INFER_THROW(ArgumentError) << "argument `qo_indptr` starts at " << qo_indptr[0] << "; it must start at 0";
  for (int32_t r = 0; r < num_requests; ++r) {
    const int32_t qo_len = qo_indptr[r + 1] - qo_indptr[r];
    if (qo_len < 0) {
      TVM_INFER_THROW(ArgumentError) << "argument `qo_indptr` decreases from " << qo_indptr[r] << " to " << qo_indptr[r + 1] << " at entry "
                                     << r + 1 << "; it must not decrease";
    }
    if (qo_len > kv_len[r]) {
      TVM_INFER_THROW(ArgumentError) << "argument `kv_len` is " << kv_len[r] << " for request " << r << ", which appends " << qo_len
                                     << " tokens; kv_len counts the new tokens, so it must be at least " << qo_len;
    }
  }
}

void CheckNewTokens(const TensorView& k, const TensorView& v, int64_t num_tokens, const CacheShape& shape) {
  const TensorView* tensors[] = {&k, &v};
  const char* names[] = {"k", "v"};
  for (int i = 0; i < 2; ++i) {
    CheckCpu(*tensors[i], names[i]);
    CheckRank(*tensors[i], names[i], 3, "[num_tokens, num_kv_heads, head_dim]");
    if (CheckFloat(*tensors[i], names[i]) != shape.dtype) {
      TVM_INFER_THROW(DTypeError) << "argument `" << names[i] << "` has dtype " << DTypeString(tensors[i]->dtype())
                                  << ", the cache another; they must be the same. Cast it first";
    }
    if (tensors[i]->size(0) != num_tokens) {
      TVM_INFER_THROW(ArgumentError) << "argument `" << names[i] << "` has shape " << ShapeString(*tensors[i]) << "; qo_indptr names "
                                     << num_tokens << " new tokens";
    }
    CheckDim(*tensors[i], names[i], 1, shape.num_kv_heads, "num_kv_heads of the cache");
    CheckDim(*tensors[i], names[i], 2, shape.head_dim, "head_dim of the cache");
    CheckLastDimContiguous(*tensors[i], names[i]);
  }
}

cpu::DType CheckMergeOperand(const TensorView& o, const OptionalTensor& lse, const TensorView& like, const char* o_name,
                             const char* lse_name) {
  CheckCpu(o, o_name);
  const cpu::DType dtype = CheckFloat(o, o_name);
  CheckRank(o, o_name, 3, "[num_rows, num_heads, head_dim]");
  CheckHeadDim(o, o_name);
  CheckSameDType(o, o_name, like, "o_a");
  for (int axis = 0; axis < 3; ++axis) CheckDim(o, o_name, axis, like.size(axis), "as o_a");
  CheckLastDimContiguous(o, o_name);
  if (lse.has_value()) {
    CheckCpu(lse.value(), lse_name);
    CheckRank(lse.value(), lse_name, 2, "[num_rows, num_heads]");
    CheckDType(lse.value(), lse_name, kFloat32, "log-sum-exp is kept in float32");
    for (int axis = 0; axis < 2; ++axis) CheckDim(lse.value(), lse_name, axis, like.size(axis), "as o_a");
  }
  return dtype;
}

}  // namespace tvm_infer::ffi_api
