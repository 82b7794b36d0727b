// Types that keys and values in memory may have, and the scales of those that have some: value = element * scale.
#pragma once

#include <tvm/ffi/string.h>

#include <cstdint>
#include <string>

#include "tvm_infer/ffi/attention.h"
#include "tvm_infer/ffi/common.h"

namespace tvm_infer::ffi_api {

#define TVM_INFER_KV_DTYPE_FUNCTIONS(V) \
  V(kv_dtypes, KVDTypes)                \
  V(kv_page_bytes, KVPageBytes)

// A row of the table of types (element_type.h) with DLPack's name of it.
struct KVDType {
  cpu::DType type;
  DLDataType dtype;
  const char* name() const { return RowOf(type).name; }
};
// Null: no row. There are rows without kernels: see the checks below.
const KVDType* FindKVDType(DLDataType dtype);
const KVDType* FindKVDType(const std::string& name);
const char* NameOf(cpu::DType type);
std::string KVDTypeNames();  // of those that there are kernels for, "float32, float16, …", for messages

// The type of keys or values in memory. Throws DTypeError that lists those that there are.
cpu::DType CheckKVDType(const TensorView& tensor, const char* name);
// The same by name, and of a type; for one that has a row and no kernels the pairs of queries and keys that have.
cpu::DType CheckKVDTypeName(const std::string& dtype, const char* name);
cpu::DType CheckKVDTypeOf(DLDataType dtype, const char* name);
// Queries or new tokens of one type beside keys of another: the same, or scaled keys. Throws DTypeError that lists the pairs.
void CheckDTypePair(cpu::DType dtype, const char* name, cpu::DType kv_dtype, const char* kv_name);

// A call's scales: of all KV heads, or tensors with one a KV head.
struct KVScales {
  double k_scale = 1, v_scale = 1;
  OptionalTensor k_scales, v_scales;  // float32 [num_kv_heads], contiguous, where the keys lie
};
// Fills in the scales of `source`, whose type is set. Throws ArgumentError or DTypeError for a tensor of another shape or place, for scales
// of a type that has none, for a scale that is not finite and above 0 (of tensors on the host; on a device see CheckScaleValues).
void SetScales(const KVScales& scales, int64_t num_kv_heads, const Place& place, cpu::KVSource* source);
// The table: name, suffix, bits, scale ("", "head", "group"), "cpu" and "cuda" where there are kernels; a line each, with spaces between.
tvm::ffi::String KVDTypes();
// Bytes of a page in one layer, of any type of the table: a cache of num_layers and num_pages has so many times these, without scales.
int64_t KVPageBytes(int64_t num_kv_heads, int64_t page_size, int64_t head_dim, int64_t head_dim_vo, tvm::ffi::String kv_dtype);

// ArgumentError naming the first value that is not finite and above 0. `scales` is in host memory.
void CheckScaleValues(const float* scales, int64_t count, const char* name);

}  // namespace tvm_infer::ffi_api
