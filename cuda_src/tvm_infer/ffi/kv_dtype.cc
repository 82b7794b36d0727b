#include "tvm_infer/ffi/kv_dtype.h"

#include <cmath>

namespace tvm_infer::ffi_api {
namespace {

using cpu::DType;

constexpr KVDType kKVDTypes[] = {
    {DType::kFloat32, {kDLFloat, 32, 1}, "float32"},
    {DType::kFloat16, {kDLFloat, 16, 1}, "float16"},
    {DType::kBFloat16, {kDLBfloat, 16, 1}, "bfloat16"},
    {DType::kFloat8E4M3, {kDLFloat8_e4m3fn, 8, 1}, "float8_e4m3fn"},
    {DType::kFloat8E5M2, {kDLFloat8_e5m2, 8, 1}, "float8_e5m2"},
};

std::string ScaledNames() {
  std::string names;
  for (const KVDType& row : kKVDTypes) {
    if (cpu::IsScaled(row.type)) names += (names.empty() ? "" : " or ") + std::string(row.name);
  }
  return names;
}

bool IsScale(double scale) { return std::isfinite(scale) && scale > 0; }

void SetScale(double all, const OptionalTensor& heads, const char* name, const char* heads_name, int64_t num_kv_heads, const Place& place,
              DType dtype, cpu::KVScale* scale) {
  if (!IsScale(all) || !IsScale(static_cast<float>(all))) {
    TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` is " << all << "; a scale is finite and above 0, in float32";
  }
  if (!cpu::IsScaled(dtype) && (all != 1 || heads.has_value())) {
    TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` is "
                                   << (heads.has_value() ? "a tensor " + ShapeString(heads.value()) : std::to_string(all))
                                   << ", but keys and values of " << NameOf(dtype) << " have no scale; leave it 1, or keep them in "
                                   << ScaledNames();
  }
  scale->all = static_cast<float>(all);
  scale->heads = nullptr;
  if (!heads.has_value()) return;
  const TensorView& tensor = heads.value();
  CheckPlace(tensor, heads_name, place);
  CheckRank(tensor, heads_name, 1, "[num_kv_heads]");
  CheckDType(tensor, heads_name, DLDataType{kDLFloat, 32, 1}, "scales are float32");
  CheckDim(tensor, heads_name, 0, num_kv_heads, "one a KV head");
  CheckContiguous(tensor, heads_name);
  scale->heads = DataPtr<const float>(tensor);
  if (!place.is_cuda()) CheckScaleValues(scale->heads, num_kv_heads, heads_name);
}

}  // namespace

const KVDType* FindKVDType(DLDataType dtype) {
  for (const KVDType& row : kKVDTypes) {
    if (row.dtype.code == dtype.code && row.dtype.bits == dtype.bits && row.dtype.lanes == dtype.lanes) return &row;
  }
  return nullptr;
}

const KVDType* FindKVDType(const std::string& name) {
  for (const KVDType& row : kKVDTypes) {
    if (name == row.name) return &row;
  }
  return nullptr;
}

const char* NameOf(cpu::DType type) {
  for (const KVDType& row : kKVDTypes) {
    if (row.type == type) return row.name;
  }
  return "";
}

std::string KVDTypeNames() {
  std::string names;
  for (const KVDType& row : kKVDTypes) names += (names.empty() ? "" : ", ") + std::string(row.name);
  return names;
}

cpu::DType CheckKVDType(const TensorView& tensor, const char* name) {
  if (const KVDType* row = FindKVDType(tensor.dtype()); row != nullptr) return row->type;
  TVM_INFER_THROW(DTypeError) << "argument `" << name << "` has dtype " << DTypeString(tensor.dtype()) << "; it must be one of "
                              << KVDTypeNames() << ". Cast it first";
}

cpu::DType CheckKVDTypeName(const std::string& dtype, const char* name) {
  if (const KVDType* row = FindKVDType(dtype); row != nullptr) return row->type;
  TVM_INFER_THROW(DTypeError) << "argument `" << name << "` is \"" << dtype << "\"; it must be one of " << KVDTypeNames();
}

void CheckDTypePair(cpu::DType dtype, const char* name, cpu::DType kv_dtype, const char* kv_name) {
  if (dtype == kv_dtype || cpu::IsScaled(kv_dtype)) return;
  TVM_INFER_THROW(DTypeError) << "argument `" << name << "` has dtype " << NameOf(dtype) << ", `" << kv_name << "` has " << NameOf(kv_dtype)
                              << "; they must be the same, or `" << kv_name << "` " << ScaledNames()
                              << " beside float32 (cpu), float16 or bfloat16. Cast one of them";
}

void SetScales(const KVScales& scales, int64_t num_kv_heads, const Place& place, cpu::KVSource* source) {
  SetScale(scales.k_scale, scales.k_scales, "k_scale", "k_scales", num_kv_heads, place, source->dtype, &source->k_scale);
  SetScale(scales.v_scale, scales.v_scales, "v_scale", "v_scales", num_kv_heads, place, source->dtype, &source->v_scale);
}

void CheckScaleValues(const float* scales, int64_t count, const char* name) {
  for (int64_t i = 0; i < count; ++i) {
    if (IsScale(scales[i])) continue;
    TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` has " << scales[i] << " at entry " << i
                                   << "; a scale is finite and above 0";
  }
}

}  // namespace tvm_infer::ffi_api
