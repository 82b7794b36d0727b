#include "tvm_infer/ffi/c_api.h"

#include <exception>
#include <string>

#include "tvm_infer/cpu/attention.h"
#include "tvm_infer/error.h"
#include "tvm_infer/schedule/planner.h"

namespace tvm_infer {
namespace {

thread_local std::string last_error;

template <typename F>
int32_t Status(F&& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& e) {
    last_error = e.what();
    return 1;
  }
}

cpu::DType ToDType(int32_t dtype) {
  if (dtype < 0 || dtype > 2) {
    TVM_INFER_THROW(DTypeError) << "argument `dtype` is " << dtype << "; it must be 0 (float32), 1 (float16) or 2 (bfloat16)";
  }
  return static_cast<cpu::DType>(dtype);
}

// [num_pages, 2, num_kv_heads, page_size, head_dim] as strides.
cpu::KVSource DensePages(const void* pages, int32_t dtype, int32_t num_kv_heads, int32_t page_size, int32_t head_dim, const int32_t* indptr,
                         const int32_t* indices) {
  if (page_size < 1) TVM_INFER_THROW(ArgumentError) << "argument `page_size` is " << page_size << "; it must be at least 1";
  const int64_t token = head_dim, head = token * page_size, plane = head * num_kv_heads;
  cpu::KVSource source{};
  source.dtype = ToDType(dtype);
  source.k = pages;
  source.v = static_cast<const char*>(pages) + tvm_infer::BytesOf(plane, ElementBits(ToDType(dtype)));
  source.k_page_stride = source.v_page_stride = 2 * plane;
  source.k_head_stride = source.v_head_stride = head;
  source.k_token_stride = source.v_token_stride = token;
  source.page_size = page_size;
  source.page_indptr = indptr;
  source.page_indices = indices;
  return source;
}

void CheckHeadDim(int32_t head_dim) {
  if (head_dim < 8 || head_dim > 256 || head_dim % 8 != 0) {
    TVM_INFER_THROW(ArgumentError) << "argument `head_dim` is " << head_dim << "; it must be a multiple of 8, from 8 to 256";
  }
}

}  // namespace
}  // namespace tvm_infer

using tvm_infer::PlanView;
namespace cpu = tvm_infer::cpu;

const char* tvm_infer_last_error() { return tvm_infer::last_error.c_str(); }

int32_t tvm_infer_plan(const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests, int32_t num_qo_heads, int32_t num_kv_heads,
                       int32_t head_dim, int32_t dtype, int32_t causal, int32_t num_ctas, int32_t* plan, int32_t plan_words,
                       int32_t max_partial_rows) {
  return tvm_infer::Status([&] {
    tvm_infer::PlanParams params{};
    params.num_ctas = num_ctas;
    params.num_qo_heads = num_qo_heads;
    params.num_kv_heads = num_kv_heads;
    params.band.right = causal ? 0 : tvm_infer::kUnbounded;
    params.fixed_split_size = tvm_infer::kSplitAuto;
    const cpu::DType type = tvm_infer::ToDType(dtype);
    params.SetCosts(cpu::TileTable(type, type, head_dim, head_dim));
    thread_local tvm_infer::Planner planner;
    planner.Plan(params, qo_indptr, kv_len, num_requests, plan, int64_t{4} * plan_words, max_partial_rows);
  });
}

int32_t tvm_infer_paged_attention(const int32_t* plan, int32_t dtype, int32_t head_dim, const void* q, const void* kv_pages,
                                  int32_t page_size, const int32_t* kv_page_indptr, const int32_t* kv_page_indices, float sm_scale,
                                  float* workspace, void* o, float* lse) {
  return tvm_infer::Status([&] {
    const tvm_infer::PlanHeader& header = *PlanView(plan).header;
    if (header.magic != tvm_infer::kPlanMagic || header.version != tvm_infer::kPlanVersion) {
      TVM_INFER_THROW(PlanMismatchError) << "argument `plan` is not a plan of version " << tvm_infer::kPlanVersion;
    }
    tvm_infer::CheckHeadDim(head_dim);
    cpu::AttentionArgs args{};
    args.plan = plan;
    args.dtype = tvm_infer::ToDType(dtype);
    args.num_kv_heads = header.num_kv_heads;
    args.num_qo_heads = header.num_kv_heads * header.group_size;
    args.head_dim = args.head_dim_vo = head_dim;
    args.q = q;
    args.o = o;
    args.q_head_stride = args.o_head_stride = head_dim;
    args.q_token_stride = args.o_token_stride = int64_t{head_dim} * args.num_qo_heads;
    args.kv = tvm_infer::DensePages(kv_pages, dtype, header.num_kv_heads, page_size, head_dim, kv_page_indptr, kv_page_indices);
    args.sm_scale = sm_scale;
    args.lse = lse;
    args.lse_token_stride = args.num_qo_heads;
    args.lse_head_stride = 1;
    args.partial_o = workspace;
    args.partial_lse = workspace + int64_t{header.num_partial_rows} * head_dim;
    cpu::Attention(args, 0);
  });
}

int32_t tvm_infer_append(const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests, int32_t dtype, int32_t num_kv_heads,
                         int32_t head_dim, const void* k, const void* v, void* kv_pages, int32_t page_size, const int32_t* kv_page_indptr,
                         const int32_t* kv_page_indices) {
  return tvm_infer::Status([&] {
    tvm_infer::CheckHeadDim(head_dim);
    cpu::AppendArgs args{};
    args.dtype = tvm_infer::ToDType(dtype);
    args.num_requests = num_requests;
    args.num_kv_heads = num_kv_heads;
    args.head_dim = args.head_dim_vo = head_dim;
    args.qo_indptr = qo_indptr;
    args.kv_len = kv_len;
    args.k = k;
    args.v = v;
    args.k_head_stride = args.v_head_stride = head_dim;
    args.k_token_stride = args.v_token_stride = int64_t{head_dim} * num_kv_heads;
    args.cache = tvm_infer::DensePages(kv_pages, dtype, num_kv_heads, page_size, head_dim, kv_page_indptr, kv_page_indices);
    cpu::Append(args, 0);
  });
}

int32_t tvm_infer_merge(int32_t dtype, int32_t num_rows, int32_t num_heads, int32_t head_dim, const void* o_a, const float* lse_a,
                        const void* o_b, const float* lse_b, void* o, float* lse) {
  return tvm_infer::Status([&] {
    tvm_infer::CheckHeadDim(head_dim);
    cpu::MergeArgs args{};
    args.dtype = tvm_infer::ToDType(dtype);
    args.num_rows = num_rows;
    args.num_heads = num_heads;
    args.head_dim = head_dim;
    args.o_a = o_a;
    args.o_b = o_b;
    args.o = o;
    args.o_a_head_stride = args.o_b_head_stride = args.o_head_stride = head_dim;
    args.o_a_row_stride = args.o_b_row_stride = args.o_row_stride = int64_t{head_dim} * num_heads;
    args.lse_a = lse_a;
    args.lse_b = lse_b;
    args.lse = lse;
    args.lse_a_row_stride = args.lse_b_row_stride = args.lse_row_stride = num_heads;
    args.lse_a_head_stride = args.lse_b_head_stride = args.lse_head_stride = 1;
    cpu::Merge(args, 0);
  });
}
