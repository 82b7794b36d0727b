// Variants as the package generates them for the CPU, written by hand: what tests/variant/cpu_variants.py compiles.
#include "tvm_infer/variant/cpu_functions.h"

using tvm_infer::variant::Args;
using tvm_infer::variant::Row;
namespace v = tvm_infer::variant;

// Soft cap: cap * tanh(x / cap).
struct variant_0000000000000000 : v::Defaults {
  static constexpr bool kHasLogits = true, kHasMask = false, kHasOutput = false;
  TVM_INFER_VARIANT static float Logits(const Args& p, const Row&, int32_t, float score, float scale) {
    const float value = score * scale;
    return p.Float(0) * v::Tanh(v::Divide(value, p.Float(0)));
  }
};
TVM_INFER_VARIANT_CPU(variant_0000000000000000);

// ALiBi: a slope for each head, fp32 [num_qo_heads].
struct variant_0000000000000001 : v::Defaults {
  static constexpr bool kHasLogits = true, kHasMask = false, kHasOutput = false;
  TVM_INFER_VARIANT static float Logits(const Args& p, const Row& row, int32_t kv_pos, float score, float scale) {
    const float value = score * scale;
    const v::Table& slopes = p.tables[0];
    return value + v::LoadFp32(slopes, int64_t{row.qo_head} * slopes.strides[0]) * static_cast<float>(kv_pos - row.q_pos);
  }
};
TVM_INFER_VARIANT_CPU(variant_0000000000000001);

// Keys kept by a table, uint8 [sum of kv_len]; request b's begin at int32 [num_requests]. Every few keys before the query are hidden too.
struct variant_0000000000000002 : v::Defaults {
  static constexpr bool kHasLogits = false, kHasMask = true, kHasOutput = false;
  TVM_INFER_VARIANT static bool Mask(const Args& p, const Row& row, int32_t kv_pos) {
    const int32_t begin = v::LoadInt32(p.tables[0], int64_t{row.batch} * p.tables[0].strides[0]);
    return v::LoadUint8(p.tables[1], (int64_t{begin} + kv_pos) * p.tables[1].strides[0]) != 0 &&
           v::FloorModulo(row.q_pos - kv_pos, p.Int(0)) != 1;
  }
};
TVM_INFER_VARIANT_CPU(variant_0000000000000002);

// A bias for each key, fp32 [sum of kv_len], and for each request and head, fp16 [num_requests, num_qo_heads].
struct variant_0000000000000003 : v::Defaults {
  static constexpr bool kHasLogits = true, kHasMask = false, kHasOutput = false;
  TVM_INFER_VARIANT static float Logits(const Args& p, const Row& row, int32_t kv_pos, float score, float scale) {
    const float value = score * scale;
    const int32_t begin = v::LoadInt32(p.tables[0], int64_t{row.batch} * p.tables[0].strides[0]);
    const v::Table& by_head = p.tables[2];
    return value * v::LoadFp16(by_head, int64_t{row.batch} * by_head.strides[0] + int64_t{row.qo_head} * by_head.strides[1]) +
           v::LoadFp32(p.tables[1], (int64_t{begin} + kv_pos) * p.tables[1].strides[0]);
  }
};
TVM_INFER_VARIANT_CPU(variant_0000000000000003);

// A sink for each head, bf16 [num_qo_heads].
struct variant_0000000000000004 : v::Defaults {
  static constexpr bool kHasLogits = false, kHasMask = false, kHasOutput = true;
  TVM_INFER_VARIANT static float Output(const Args& p, const Row& row, float lse, float value) {
    return value * v::Sigmoid(lse - v::LoadBf16(p.tables[0], int64_t{row.qo_head} * p.tables[0].strides[0]));
  }
};
TVM_INFER_VARIANT_CPU(variant_0000000000000004);

// All hooks, all fields of a row.
struct variant_0000000000000005 : v::Defaults {
  static constexpr bool kHasLogits = true, kHasMask = true, kHasOutput = true;
  TVM_INFER_VARIANT static float Logits(const Args& p, const Row& row, int32_t kv_pos, float score, float scale) {
    const float value = score * scale;
    return p.Float(0) * v::Tanh(value) + 0.01f * static_cast<float>(kv_pos - row.q_pos + row.kv_head);
  }
  TVM_INFER_VARIANT static bool Mask(const Args& p, const Row& row, int32_t kv_pos) {
    return v::FloorModulo(kv_pos + row.batch + row.qo_head, p.Int(1)) != 0 && kv_pos < row.kv_len - 2;
  }
  TVM_INFER_VARIANT static float Output(const Args&, const Row& row, float lse, float value) {
    return value * v::Sigmoid(lse) + 0.1f * static_cast<float>(row.batch) + 0.001f * static_cast<float>(row.q_len + row.q_pos);
  }
};
TVM_INFER_VARIANT_CPU(variant_0000000000000005);

// No hook at all.
struct variant_0000000000000006 : v::Defaults {
  static constexpr bool kHasLogits = false, kHasMask = false, kHasOutput = false;
};
TVM_INFER_VARIANT_CPU(variant_0000000000000006);

// Counts its calls. Tables: int32 qo_indptr [num_requests + 1], calls [num_tokens, num_qo_heads, max_kv], int32 rows [num_tokens,
// num_qo_heads, 4] (kv_head, q_pos, q_len, kv_len), strays [1], outputs [num_tokens, num_qo_heads], fp32 lse [num_tokens, num_qo_heads].
struct variant_0000000000000007 : v::Defaults {
  static constexpr bool kHasLogits = true, kHasMask = false, kHasOutput = true;
  static int32_t* At(const Args& p, int table, const Row& row, int32_t last) {
    const v::Table& t = p.tables[table];
    const int64_t token = v::LoadInt32(p.tables[0], row.batch) + row.q_pos - (row.kv_len - row.q_len);
    const int64_t at = token * t.strides[0] + int64_t{row.qo_head} * t.strides[1] + int64_t{last} * t.strides[2];
    return static_cast<int32_t*>(const_cast<void*>(t.data)) + at;
  }
  static float Logits(const Args& p, const Row& row, int32_t kv_pos, float score, float scale) {
    const float value = score * scale;
    if (kv_pos < 0 || kv_pos >= row.kv_len) {
      __atomic_fetch_add(static_cast<int32_t*>(const_cast<void*>(p.tables[3].data)), 1, __ATOMIC_RELAXED);
      return value;
    }
    *At(p, 1, row, kv_pos) += 1;
    *At(p, 2, row, 0) = row.kv_head;
    *At(p, 2, row, 1) = row.q_pos;
    *At(p, 2, row, 2) = row.q_len;
    *At(p, 2, row, 3) = row.kv_len;
    return value;
  }
  static float Output(const Args& p, const Row& row, float lse, float value) {
    *At(p, 4, row, 0) += 1;
    *reinterpret_cast<float*>(At(p, 5, row, 0)) = lse;
    return value;
  }
};
TVM_INFER_VARIANT_CPU(variant_0000000000000007);

// Logits that are no numbers at key 3: NaN in head 1, +inf in head 2; -inf at every key in head 3.
struct variant_0000000000000008 : v::Defaults {
  static constexpr bool kHasLogits = true, kHasMask = false, kHasOutput = false;
  TVM_INFER_VARIANT static float Logits(const Args&, const Row& row, int32_t kv_pos, float score, float scale) {
    const float value = score * scale;
    if (row.qo_head == 1 && kv_pos == 3) return __builtin_nanf("");
    if (row.qo_head == 2 && kv_pos == 3) return __builtin_huge_valf();
    return row.qo_head == 3 ? -__builtin_huge_valf() : value;
  }
};
TVM_INFER_VARIANT_CPU(variant_0000000000000008);

// As compiled against other headers.
extern "C" __attribute__((visibility("default")))
const v::CpuFunctions variant_00000000000000ff_cpu{v::kVariantAbi + 41, nullptr, nullptr, nullptr, nullptr, nullptr, 0, 1};
