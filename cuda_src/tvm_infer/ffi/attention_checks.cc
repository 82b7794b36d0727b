#include "tvm_infer/ffi/attention_checks.h"

namespace tvm_infer::ffi_api {
namespace {

constexpr DLDataType kFloat32 = {kDLFloat, 32, 1};
constexpr int32_t kMaxHeadDim = 256;

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

// Values as wide as keys, or narrower.
void CheckHeadDimVo(const TensorView& v, const char* name, int64_t head_dim) {
  CheckHeadDim(v, name);
  const int64_t head_dim_vo = v.size(v.ndim() - 1);
  if (head_dim_vo <= head_dim) return;
  TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` has shape " << ShapeString(v) << ": a head_dim_vo of " << head_dim_vo
                                 << " beside keys of head_dim " << head_dim
                                 << "; values are as wide as keys or narrower (on CUDA head_dim 192 with head_dim_vo 128, else equal). Pad "
                                    "queries and keys with zeros (and keep sm_scale that of the unpadded width)";
}

}  // namespace

void CheckQuery(const TensorView& q, const TensorView& o, const OptionalTensor& lse, const Place& place) {
  CheckPlace(q, "q", place);
  CheckFloat(q, "q");
  CheckRank(q, "q", 3, "[num_tokens, num_qo_heads, head_dim]");
  CheckHeadDim(q, "q");
  CheckLastDimContiguous(q, "q");
  CheckPlace(o, "o", place);
  CheckRank(o, "o", 3, "[num_tokens, num_qo_heads, head_dim_vo]");
  CheckSameDType(o, "o", q, "q");
  for (int axis = 0; axis < 2; ++axis) CheckDim(o, "o", axis, q.size(axis), "as q");
  CheckLastDimContiguous(o, "o");
  if (lse.has_value()) {
    CheckPlace(lse.value(), "lse", place);
    CheckRank(lse.value(), "lse", 2, "[num_tokens, num_qo_heads]");
    CheckDType(lse.value(), "lse", kFloat32, "log-sum-exp is kept in float32");
    for (int axis = 0; axis < 2; ++axis) CheckDim(lse.value(), "lse", axis, q.size(axis), "as q");
  }
}

void CheckWorkspace(const TensorView& workspace, const Place& place) {
  CheckPlace(workspace, "workspace", place);
  CheckDType(workspace, "workspace", kFloat32, "partial results are float32");
  CheckContiguous(workspace, "workspace");
}

CacheShape CheckCache(const TensorView& k_cache, const OptionalTensor& v_cache, int64_t kv_layout, const Place& place,
                      cpu::KVSource* source, const KVScales& scales) {
  const bool combined = !v_cache.has_value();
  const bool nhd = kv_layout == 1;
  if (kv_layout != 0 && kv_layout != 1) {
    TVM_INFER_THROW(ArgumentError) << "argument `kv_layout` is " << kv_layout << "; it must be 0 (HND) or 1 (NHD)";
  }
  const char* dims = nhd ? "[num_pages, page_size, num_kv_heads, head_dim]" : "[num_pages, num_kv_heads, page_size, head_dim]";
  CheckPlace(k_cache, "k_cache", place);
  const cpu::DType dtype = CheckKVDType(k_cache, "k_cache");
  if (combined) {
    CheckRank(k_cache, "k_cache", 5, "[num_pages, 2, …] holding keys and values, because v_cache is None");
    CheckDim(k_cache, "k_cache", 1, 2, "keys and values");
  } else {
    CheckRank(k_cache, "k_cache", 4, dims);
    CheckRank(v_cache.value(), "v_cache", 4, dims);
    CheckPlace(v_cache.value(), "v_cache", place);
    CheckSameDType(v_cache.value(), "v_cache", k_cache, "k_cache");
    for (int axis = 0; axis < 3; ++axis) CheckDim(v_cache.value(), "v_cache", axis, k_cache.size(axis), "as k_cache");
    CheckHeadDimVo(v_cache.value(), "v_cache", k_cache.size(3));
    CheckLastDimContiguous(v_cache.value(), "v_cache");
  }
  CheckHeadDim(k_cache, "k_cache");
  CheckLastDimContiguous(k_cache, "k_cache");

  const int first = combined ? 2 : 1;  // axis of heads (HND) or tokens (NHD)
  const int head_axis = nhd ? first + 1 : first, token_axis = nhd ? first : first + 1;
  const TensorView& v = combined ? k_cache : v_cache.value();
  source->dtype = dtype;
  source->k = DataPtr<void>(k_cache);
  source->v = DataPtr<void>(v);
  if (combined) {
    source->v = static_cast<const char*>(source->v) + BytesOf(Stride(k_cache, 1), k_cache.dtype().bits);
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
  shape.head_dim_vo = static_cast<int32_t>(v.size(first + 2));
  if (shape.page_size < 1) {
    TVM_INFER_THROW(ArgumentError) << "argument `k_cache` has shape " << ShapeString(k_cache) << ": page_size must be at least 1";
  }
  source->page_size = shape.page_size;
  SetScales(scales, shape.num_kv_heads, place, source);
  return shape;
}

void CheckCacheFitsQuery(const CacheShape& shape, const TensorView& q) {
  if (shape.head_dim != q.size(2)) {
    TVM_INFER_THROW(ArgumentError) << "argument `q` has head_dim " << q.size(2) << ", `k_cache` has " << shape.head_dim
                                   << "; they must be the same";
  }
  CheckDTypePair(CheckFloat(q, "q"), "q", shape.dtype, "k_cache");
}

void CheckValuesFitOutput(int64_t head_dim_vo, const TensorView& o) { CheckDim(o, "o", 2, head_dim_vo, "head_dim_vo, of values"); }

void CheckPageTable(const TensorView& indptr, const TensorView& indices, const Place& place, cpu::KVSource* source) {
  CheckIndex(indptr, "kv_page_indptr", place);
  CheckIndex(indices, "kv_page_indices", place);
  if (indptr.size(0) < 1) TVM_INFER_THROW(ArgumentError) << "argument `kv_page_indptr` is empty; it has one entry more than requests";
  source->page_indptr = DataPtr<const int32_t>(indptr);
  source->page_indices = DataPtr<const int32_t>(indices);
}

void CheckRagged(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& rows, RowTable table, const Place& place,
                 cpu::KVSource* source, const KVScales& scales) {
  const TensorView* tensors[] = {&k, &v};
  const char* names[] = {"k", "v"};
  for (int i = 0; i < 2; ++i) {
    CheckPlace(*tensors[i], names[i], place);
    CheckRank(*tensors[i], names[i], 3, "[num_kv_tokens, num_kv_heads, head_dim]");
    CheckDTypePair(CheckFloat(q, "q"), "q", CheckKVDType(*tensors[i], names[i]), names[i]);
    CheckLastDimContiguous(*tensors[i], names[i]);
  }
  CheckDim(k, "k", 2, q.size(2), "head_dim of q");
  CheckHeadDimVo(v, "v", q.size(2));
  CheckSameDType(v, "v", k, "k");
  for (int axis = 0; axis < 2; ++axis) CheckDim(v, "v", axis, k.size(axis), "as k");
  CheckIndex(rows, NameOf(table), place);
  if (NumLists(table, rows) < 0) TVM_INFER_THROW(ArgumentError) << "argument `kv_indptr` is empty; it has one entry more than requests";
  source->dtype = CheckKVDType(k, "k");
  source->k = DataPtr<void>(k);
  source->v = DataPtr<void>(v);
  source->k_page_stride = source->v_page_stride = 0;
  source->k_token_stride = Stride(k, 0);
  source->k_head_stride = Stride(k, 1);
  source->v_token_stride = Stride(v, 0);
  source->v_head_stride = Stride(v, 1);
  source->page_size = 1;
  source->page_indptr = DataPtr<const int32_t>(rows);
  source->page_indices = nullptr;
  SetScales(scales, k.size(1), place, source);
}

void CheckNewTokens(const TensorView& k, const TensorView& v, const CacheShape& shape, const Place& place) {
  const TensorView* tensors[] = {&k, &v};
  const char* names[] = {"k", "v"};
  for (int i = 0; i < 2; ++i) {
    CheckPlace(*tensors[i], names[i], place);
    CheckRank(*tensors[i], names[i], 3, "[num_tokens, num_kv_heads, head_dim]");
    CheckDTypePair(CheckFloat(*tensors[i], names[i]), names[i], shape.dtype, "k_cache");
    CheckDim(*tensors[i], names[i], 1, shape.num_kv_heads, "num_kv_heads of the cache");
    CheckDim(*tensors[i], names[i], 2, i == 0 ? shape.head_dim : shape.head_dim_vo,
             i == 0 ? "head_dim of the cache" : "head_dim of the cache's values");
    CheckLastDimContiguous(*tensors[i], names[i]);
  }
  CheckSameDType(v, "v", k, "k");
}

void CheckAppendTensors(const TensorView& qo_indptr, const TensorView& kv_len, const Place& place) {
  CheckIndex(qo_indptr, "qo_indptr", place);
  CheckIndex(kv_len, "kv_len", place);
  CheckDim(qo_indptr, "qo_indptr", 0, kv_len.size(0) + 1, "one more than kv_len has entries");
}

cpu::DType CheckMergeOperand(const TensorView& o, const OptionalTensor& lse, const TensorView& like, const char* o_name,
                             const char* lse_name, const Place& place) {
  CheckPlace(o, o_name, place);
  const cpu::DType dtype = CheckFloat(o, o_name);
  CheckRank(o, o_name, 3, "[num_rows, num_heads, head_dim]");
  CheckHeadDim(o, o_name);
  CheckSameDType(o, o_name, like, "o_a");
  for (int axis = 0; axis < 3; ++axis) CheckDim(o, o_name, axis, like.size(axis), "as o_a");
  CheckLastDimContiguous(o, o_name);
  if (lse.has_value()) {
    CheckPlace(lse.value(), lse_name, place);
    CheckRank(lse.value(), lse_name, 2, "[num_rows, num_heads]");
    CheckDType(lse.value(), lse_name, kFloat32, "log-sum-exp is kept in float32");
    for (int axis = 0; axis < 2; ++axis) CheckDim(lse.value(), lse_name, axis, like.size(axis), "as o_a");
  }
  return dtype;
}

}  // namespace tvm_infer::ffi_api
