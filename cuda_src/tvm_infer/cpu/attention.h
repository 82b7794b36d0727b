// The CPU executor of a Plan: the same works, splits and merges as the CUDA kernels, on host threads.
#pragma once

#include <cstdint>

#include "tvm_infer/element_type.h"
#include "tvm_infer/schedule/plan.h"
#include "tvm_infer/schedule/tile_costs.h"
#include "tvm_infer/variant/cpu_functions.h"

namespace tvm_infer::cpu {

// What elements may be: queries, outputs and new tokens the first three, keys and values in memory any.
using DType = ElementType;
inline constexpr int32_t ScaledIndex(DType dtype) { return static_cast<int32_t>(dtype) - static_cast<int32_t>(DType::kFloat8E4M3); }

// value = element * scale, of keys or of values in memory.
struct KVScale {
  float all = 1;
  const float* heads = nullptr;  // [num_kv_heads]: one a KV head, instead of `all`
  float Of(int32_t kv_head) const { return heads == nullptr ? all : heads[kv_head]; }
};

// Where the keys and values of a list live. Strides in elements; head_dim is contiguous.
//   paged:   key j of list l is slot j % page_size of page page_indices[page_indptr[l] + j / page_size]
//   ragged:  page_indices == nullptr; key j of list l is row page_indptr[l] + j (page_stride unused, page_size 1)
struct KVSource {
  DType dtype;
  const void* k;
  const void* v;
  int64_t k_page_stride, k_head_stride, k_token_stride;
  int64_t v_page_stride, v_head_stride, v_token_stride;
  int32_t page_size;
  const int32_t* page_indptr;   // [num_kv_lists + 1]
  const int32_t* page_indices;  // pages of all lists, or nullptr
  KVScale k_scale, v_scale;     // 1 where !IsScaled(dtype)
};

struct AttentionArgs {
  const void* plan;  // PlanHeader and its arrays
  DType dtype;       // of q and o; kv.dtype is the same, or IsScaled
  int32_t num_qo_heads, num_kv_heads;
  int32_t head_dim;     // of q and keys
  int32_t head_dim_vo;  // of values and o, at most head_dim
  const void* q;        // [num_tokens, num_qo_heads, head_dim]
  int64_t q_token_stride, q_head_stride;
  KVSource kv;
  float sm_scale;
  void* o;  // [num_tokens, num_qo_heads, head_dim_vo]
  int64_t o_token_stride, o_head_stride;
  float* lse;  // natural log, [num_tokens, num_qo_heads], or nullptr
  int64_t lse_token_stride, lse_head_stride;
  float* partial_o;              // [header.num_partial_rows, head_dim_vo]
  float* partial_lse;            // [header.num_partial_rows], natural log
  const variant::Call* variant;  // or nullptr: plain attention
};

// O and LSE of every row of the plan; rows that see no key get O = 0, LSE = -inf. num_threads <= 0: DefaultNumThreads().
void Attention(const AttentionArgs& args, int num_threads);

struct AppendArgs {
  DType dtype;  // of k and v; cache.dtype is the same, or IsScaled
  int32_t num_requests, num_kv_heads;
  int32_t head_dim, head_dim_vo;  // of k, of v
  const int32_t* qo_indptr;       // [num_requests + 1]: new tokens of each request
  const int32_t* kv_len;          // [num_requests]: keys of each request, new tokens included
  const void* k;                  // [num_tokens, num_kv_heads, head_dim]
  const void* v;                  // [num_tokens, num_kv_heads, head_dim_vo]
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  KVSource cache;  // written through; never ragged
};

// New token t of request r goes to position kv_len[r] - (qo_indptr[r + 1] - t) of its pages. A scaled cache gets x / scale, in float,
// rounded to nearest even; what is beyond its largest finite value becomes that one; a NaN stays a NaN.
void Append(const AppendArgs& args, int num_threads);

struct MergeArgs {
  DType dtype;  // of o_a, o_b and o
  int64_t num_rows;
  int32_t num_heads, head_dim;
  const void *o_a, *o_b;  // [num_rows, num_heads, head_dim], strides in elements
  int64_t o_a_row_stride, o_a_head_stride, o_b_row_stride, o_b_head_stride;
  const float *lse_a, *lse_b;  // natural log, [num_rows, num_heads]
  int64_t lse_a_row_stride, lse_a_head_stride, lse_b_row_stride, lse_b_head_stride;
  void* o;
  int64_t o_row_stride, o_head_stride;
  float* lse;  // or nullptr
  int64_t lse_row_stride, lse_head_stride;
};

// (O, LSE) = (O_a, LSE_a) (+) (O_b, LSE_b), section 2.2 of arXiv 2501.01005. -inf is the identity. Outputs may alias inputs.
void Merge(const MergeArgs& args, int num_threads);

// TVM_INFER_NUM_THREADS, else the processors this process may run on.
int DefaultNumThreads();
// Costs measured for this executor, by the type of queries and of keys in memory, the width of keys and that of values.
TileCosts TileTable(DType dtype, DType kv_dtype, int32_t head_dim, int32_t head_dim_vo);
// The hooks of a standard variant, or of one that an exported model embeds (embedded.h), in the chosen instruction set, for as long as the
// library is loaded; nullptr: `digest`, 16 hexadecimal digits, is none of theirs.
const variant::CpuFunctions* VariantFunctions(const char* digest);
// "avx512", "avx2" or "portable": what the run-time choice gave; TVM_INFER_CPU_ISA lowers it (an unavailable value is an error).
const char* IsaName();

}  // namespace tvm_infer::cpu
