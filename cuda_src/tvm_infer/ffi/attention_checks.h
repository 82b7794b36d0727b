// What the attention bindings check of tensors before anything runs: shapes, data types, devices. Both executors share them; what they
// hold is checked in value_checks.h. Each throws a typed Error that names the argument; none allocates.
#pragma once

#include <cstdint>

#include "tvm_infer/cpu/attention.h"
#include "tvm_infer/ffi/attention.h"
#include "tvm_infer/ffi/common.h"
#include "tvm_infer/ffi/kv_dtype.h"

namespace tvm_infer::ffi_api {

struct CacheShape {
  cpu::DType dtype;  // of keys and values in memory
  int64_t num_pages;
  int32_t num_kv_heads, page_size;
  int32_t head_dim, head_dim_vo;  // of keys, of values
};

// q, o and lse against each other, but for the width of o, which is that of values.
void CheckQuery(const TensorView& q, const TensorView& o, const OptionalTensor& lse, const Place& place);
void CheckWorkspace(const TensorView& workspace, const Place& place);
// Any of the four cache forms (combined or separate, HND or NHD) as strides; page tables are left empty.
CacheShape CheckCache(const TensorView& k_cache, const OptionalTensor& v_cache, int64_t kv_layout, const Place& place,
                      cpu::KVSource* source, const KVScales& scales = KVScales());
// Head_dim of the cache is that of q, and their data types are a pair.
void CheckCacheFitsQuery(const CacheShape& shape, const TensorView& q);
// The width of o is that of values.
void CheckValuesFitOutput(int64_t head_dim_vo, const TensorView& o);
void CheckPageTable(const TensorView& indptr, const TensorView& indices, const Place& place, cpu::KVSource* source);
// Where each list's rows are: kIndptr, rows indptr[l] … indptr[l + 1], [num_lists + 1]; kStart, from row start[l] on, [num_lists].
enum class RowTable { kIndptr, kStart };
inline const char* NameOf(RowTable table) { return table == RowTable::kIndptr ? "kv_indptr" : "kv_start"; }
inline int64_t NumLists(RowTable table, const TensorView& rows) { return rows.size(0) - (table == RowTable::kIndptr ? 1 : 0); }

// Keys without pages: k and v against each other and q.
void CheckRagged(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& rows, RowTable table, const Place& place,
                 cpu::KVSource* source, const KVScales& scales = KVScales());
// New tokens against the cache.
void CheckNewTokens(const TensorView& k, const TensorView& v, const CacheShape& shape, const Place& place);
// The tensors of an append without a plan.
void CheckAppendTensors(const TensorView& qo_indptr, const TensorView& kv_len, const Place& place);
cpu::DType CheckMergeOperand(const TensorView& o, const OptionalTensor& lse, const TensorView& like, const char* o_name,
                             const char* lse_name, const Place& place);

}  // namespace tvm_infer::ffi_api
