// Types that keys and values in memory may have, and the scales of those that have some: value = element * scale.
#pragma once

#include <cstdint>
#include <string>

#include "tvm_infer/ffi/attention.h"
#include "tvm_infer/ffi/common.h"

namespace tvm_infer::ffi_api {

// A row of the table of types.
struct KVDType {
  cpu::DType type;
  DLDataType dtype;
  const char* name;  // "float8_e4m3fn"
};
// Null: keys and values are not kept so.
const KVDType* FindKVDType(DLDataType dtype);
const KVDType* FindKVDType(const std::string& name);
const char* NameOf(cpu::DType type);
std::string KVDTypeNames();  // "float32, float16, …", for messages

// The type of keys or values in memory. Throws DTypeError that lists those that there are.
cpu::DType CheckKVDType(const TensorView& tensor, const char* name);
// The same by name.
cpu::DType CheckKVDTypeName(const std::string& dtype, const char* name);
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
// ArgumentError naming the first value that is not finite and above 0. `scales` is in host memory.
void CheckScaleValues(const float* scales, int64_t count, const char* name);

}  // namespace tvm_infer::ffi_api
