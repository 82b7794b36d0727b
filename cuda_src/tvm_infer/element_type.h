// Types that elements of queries, keys and values have: one row each, for both executors, the cache and the planner's cost tables. A type
// whose row says that nobody has kernels for it is refused by its name (ffi/kv_dtype.h); sizes and costs are ready for it.
// tvm_infer/kv_dtypes.py is the same table for Python; a test holds one against the other.
#pragma once

#include <cstdint>

namespace tvm_infer {

enum class ElementType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat8E4M3 = 3, kFloat8E5M2 = 4, kInt8 = 5, kInt4 = 6 };

// What elements share a scale (value = element * scale).
enum class ScaleOf : int32_t {
  kNone = 0,   // elements are values
  kHead = 1,   // all of a tensor, or of a KV head
  kGroup = 2,  // a run of channels of one token's head
};

struct ElementRow {
  ElementType type;
  const char* name;    // "float8_e4m3fn", as DLPack's users have it
  const char* suffix;  // "e4m3", as in kernel names
  int32_t bits;
  ScaleOf scale;
  bool on_cpu, on_cuda;  // whether the executor has kernels that read keys and values of this type
};

inline constexpr ElementRow kElementRows[] = {
    {ElementType::kFloat32, "float32", "fp32", 32, ScaleOf::kNone, true, false},
    {ElementType::kFloat16, "float16", "fp16", 16, ScaleOf::kNone, true, true},
    {ElementType::kBFloat16, "bfloat16", "bf16", 16, ScaleOf::kNone, true, true},
    {ElementType::kFloat8E4M3, "float8_e4m3fn", "e4m3", 8, ScaleOf::kHead, true, true},
    {ElementType::kFloat8E5M2, "float8_e5m2", "e5m2", 8, ScaleOf::kHead, true, true},
    {ElementType::kInt8, "int8", "int8", 8, ScaleOf::kHead, false, false},
    {ElementType::kInt4, "int4", "int4", 4, ScaleOf::kGroup, false, false},
};

constexpr const ElementRow& RowOf(ElementType type) { return kElementRows[static_cast<int32_t>(type)]; }
constexpr bool RowsAreInOrder() {
  for (int32_t i = 0; const ElementRow& row : kElementRows) {
    if (static_cast<int32_t>(row.type) != i++) return false;
  }
  return true;
}
static_assert(RowsAreInOrder());

constexpr int32_t ElementBits(ElementType type) { return RowOf(type).bits; }
// Keys and values that a scale turns into values.
constexpr bool IsScaled(ElementType type) { return RowOf(type).scale != ScaleOf::kNone; }
constexpr bool HasKernels(ElementType type) { return RowOf(type).on_cpu || RowOf(type).on_cuda; }

// Bytes of so many elements, one behind the other; of 4 bits two share a byte, and rows of an even number of them end with one.
constexpr int64_t BytesOf(int64_t elements, int32_t bits) { return (elements * bits + 7) / 8; }

// Bytes of a page's keys and values in one layer, rows of num_kv_heads * page_size tokens each; scales, which are not in the page, apart.
constexpr int64_t PageBytes(int64_t num_kv_heads, int64_t page_size, int64_t head_dim, int64_t head_dim_vo, int32_t bits) {
  return num_kv_heads * page_size * (BytesOf(head_dim, bits) + BytesOf(head_dim_vo, bits));
}

}  // namespace tvm_infer
