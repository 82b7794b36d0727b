#include "tvm_infer/ffi/kv_dtype.h"

#include <cmath>
#include <iterator>

namespace tvm_infer::ffi_api {
namespace {

using cpu::DType;

constexpr KVDType kKVDTypes[] = {
    {DType::kFloat32, {kDLFloat, 32, 1}},
    {DType::kFloat16, {kDLFloat, 16, 1}},
    {DType::kBFloat16, {kDLBfloat, 16, 1}},
    {DType::kFloat8E4M3, {kDLFloat8_e4m3fn, 8, 1}},
    {DType::kFloat8E5M2, {kDLFloat8_e5m2, 8, 1}},
    {DType::kInt8, {kDLInt, 8, 1}},
    {DType::kInt4, {kDLInt, 4, 1}},
};
static_assert(std::size(kKVDTypes) == std::size(kElementRows));

// The names of rows that `is_one` takes, with `between` them.
template <typename F>
std::string Names(const char* between, F&& is_one) {
  std::string names;
  for (const ElementRow& row : kElementRows) {
    if (is_one(row)) names += (names.empty() ? "" : between) + std::string(row.name);
  }
  return names;
}

// "float32 with float32, … (cpu); float16 with …"
std::string PairNames() {
  std::string pairs;
  for (const ElementRow& queries : kElementRows) {
    if (IsScaled(queries.type)) continue;
    pairs += (pairs.empty() ? "" : "; ") + std::string(queries.name) + " with " + Names(", ", [&](const ElementRow& keys) {
               return keys.type == queries.type || (IsScaled(keys.type) && HasKernels(keys.type));
             });
    pairs += queries.on_cuda ? " (cpu, cuda)" : " (cpu)";
  }
  return pairs;
}

cpu::DType CheckRow(const KVDType* row, const std::string& shown, const char* has, const char* name) {
  if (row != nullptr && HasKernels(row->type)) return row->type;
  ErrorStream error("DTypeError");
  error.stream() << "argument `" << name << "` " << has << " " << shown << "; it must be one of " << KVDTypeNames();
  if (row != nullptr) {
    error.stream() << ". No executor has kernels for " << row->name() << " yet. Queries go with keys and values so: " << PairNames();
  } else {
    error.stream() << ". Cast it first";
  }
}

std::string ScaledNames() {
  return Names(" or ", [](const ElementRow& row) { return IsScaled(row.type) && HasKernels(row.type); });
}

bool IsScale(double scale) { return std::isfinite(scale) && scale > 0; }

void SetScale(double all, const OptionalTensor& heads, const char* name, const char* heads_name, int64_t num_kv_heads, const Place& place,
              DType dtype, cpu::KVScale* scale) {
  if (!IsScale(all) || !IsScale(static_cast<float>(all))) {
    TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` is " << all << "; a scale is finite and above 0, in float32";
  }
  if (!IsScaled(dtype) && (all != 1 || heads.has_value())) {
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
    if (name == row.name()) return &row;
  }
  return nullptr;
}

const char* NameOf(cpu::DType type) { return RowOf(type).name; }

std::string KVDTypeNames() {
  return Names(", ", [](const ElementRow& row) { return HasKernels(row.type); });
}

cpu::DType CheckKVDType(const TensorView& tensor, const char* name) {
  return CheckRow(FindKVDType(tensor.dtype()), DTypeString(tensor.dtype()), "has dtype", name);
}

cpu::DType CheckKVDTypeName(const std::string& dtype, const char* name) {
  return CheckRow(FindKVDType(dtype), '"' + dtype + '"', "is", name);
}

cpu::DType CheckKVDTypeOf(DLDataType dtype, const char* name) { return CheckRow(FindKVDType(dtype), DTypeString(dtype), "is", name); }

tvm::ffi::String KVDTypes() {
  constexpr const char* kScaleNames[] = {"", "head", "group"};
  std::string lines;
  for (const ElementRow& row : kElementRows) {
    lines += std::string(row.name) + " " + row.suffix + " " + std::to_string(row.bits) + " " + kScaleNames[static_cast<int>(row.scale)] +
             " " + (row.on_cpu ? "cpu" : "") + " " + (row.on_cuda ? "cuda" : "") + "\n";
  }
  return lines;
}

int64_t KVPageBytes(int64_t num_kv_heads, int64_t page_size, int64_t head_dim, int64_t head_dim_vo, tvm::ffi::String kv_dtype) {
  return Guarded([&] {
    const KVDType* row = FindKVDType(std::string(kv_dtype));
    if (row == nullptr) CheckRow(nullptr, '"' + std::string(kv_dtype) + '"', "is", "kv_dtype");
    return PageBytes(num_kv_heads, page_size, head_dim, head_dim_vo, RowOf(row->type).bits);
  });
}

void CheckDTypePair(cpu::DType dtype, const char* name, cpu::DType kv_dtype, const char* kv_name) {
  if (dtype == kv_dtype || IsScaled(kv_dtype)) return;
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
