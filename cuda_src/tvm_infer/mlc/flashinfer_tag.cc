#include "tvm_infer/mlc/flashinfer_tag.h"

#include <tvm/ffi/error.h>

#include <string>
#include <vector>

#include "tvm_infer/mlc/registry.h"
#include "tvm_infer/mlc/tensors.h"

namespace tvm_infer::mlc {
namespace {

constexpr double kLog2OfE = 1.44269504088896340736;  // natural logarithm -> base 2
constexpr int64_t kPlannedAtRun = -1;                // plan_info[kWords] of a decode plan
// plan_info: words of the plan in the int workspace, causal, window_left, head_dim, num_kv_heads, page_size.
enum Info : size_t { kWords, kCausal, kWindowLeft, kHeadDim, kNumKvHeads, kPageSize, kInfoSize };

// The start of a workspace of bytes as so many elements of 4 bytes.
struct WordsView {
  WordsView(const Tensor& bytes, DLDataTypeCode code, int64_t words)
      : size(words < 0 ? bytes->shape[0] / 4 : words), view(*bytes.GetDLTensorPtr()) {
    view.dtype = {static_cast<uint8_t>(code), 32, 1};
    view.shape = &size;
    view.strides = nullptr;
  }
  operator TensorView() const { return TensorView(&view); }  // NOLINT(google-explicit-constructor)
  int64_t size;
  DLTensor view;
};

void CheckPlannable(const Tensor& int_workspace, int64_t head_dim_qk, int64_t head_dim_vo, int64_t page_size) {
  if (int_workspace->device.device_type != kDLCPU) {
    TVM_FFI_THROW(ExecutorError)
        << "the functions of backend tag \"flashinfer\" are not there on cuda yet: TVM's cache wants LSE in base 2 "
        << "and the kernels give natural logarithms; use tvm_infer.runtime.MLCPagedKVCache in place of TVM's cache";
  }
  if (head_dim_qk != head_dim_vo) {
    TVM_FFI_THROW(ArgumentError) << "argument `head_dim_vo` is " << head_dim_vo << " and `head_dim_qk` is " << head_dim_qk
                                 << "; keys and values must have one width: pad the narrower with zeros";
  }
  if (page_size < 1) TVM_FFI_THROW(ArgumentError) << "argument `page_size` is " << page_size << "; it must be at least 1";
}

struct PlanSettings {
  int64_t num_qo_heads, num_kv_heads, head_dim, causal, window_left, fixed_split_size;
};

// Plans into the int workspace and returns the words used. The tile table is that of float32: a plan made with it runs in every dtype, and
// TVM does not say which there will be.
int64_t MakePlan(const Tensor& float_workspace, const Tensor& int_workspace, TensorView qo_indptr, TensorView kv_len,
                 const PlanSettings& s) {
  const std::string info = Library().cpu_info().cast<std::string>();  // "isa threads"
  const int64_t num_ctas = std::stoll(info.substr(info.find(' ') + 1));
  const Shape tile_table = Library().cpu_tile_table("float32", s.head_dim).cast<Shape>();
  const int64_t max_partial_rows = float_workspace->shape[0] / 4 / (s.head_dim + 1);
  const WordsView plan(int_workspace, kDLInt, -1);
  return Library()
             .plan(qo_indptr, kv_len, s.num_qo_heads, s.num_kv_heads, num_ctas, s.causal, s.window_left, s.fixed_split_size, tile_table,
                   max_partial_rows, TensorView(plan))
             .cast<int64_t>() /
         4;
}

void CheckRun(const PlanInfo& info, int64_t mask_mode, int64_t window_left) {
  if (info.size() != kInfoSize) {
    TVM_FFI_THROW(PlanMismatchError) << "argument `plan_info` has " << info.size() << " numbers; plans of tvm_infer.mlc have "
                                     << static_cast<int>(kInfoSize) << ": pass plan and run of one backend";
  }
  if (mask_mode != info[kCausal] || window_left != info[kWindowLeft]) {
    TVM_FFI_THROW(PlanMismatchError) << "arguments `mask_mode` and `window_left` are " << mask_mode << " and " << window_left
                                     << " but the plan was made for " << info[kCausal] << " and " << info[kWindowLeft]
                                     << "; a plan leaves out keys by its mask (mask_mode 0 is none, 1 is causal)";
  }
}

void CheckLayout(int64_t layout, int64_t expected, const char* name) {
  if (layout != expected) {
    TVM_FFI_THROW(ArgumentError) << "argument `layout` is " << layout << "; it must be " << expected << " (" << name << ") here";
  }
}

void RunPaged(const Tensor& float_workspace, const Tensor& int_workspace, int64_t words, const Tensor& q, const Tensor& k_cache,
              const Tensor& v_cache, int64_t layout, const Tensor& kv_indptr, const Tensor& kv_indices, double sm_scale, const Tensor& o,
              const Tensor& lse) {
  if (layout != 0 && layout != 1) TVM_FFI_THROW(ArgumentError) << "argument `layout` is " << layout << "; it must be 0 (NHD) or 1 (HND)";
  const int64_t kv_layout = 1 - layout;  // ours: 0 HND, 1 NHD
  const WordsView plan(int_workspace, kDLInt, words), workspace(float_workspace, kDLFloat, -1);
  Library().paged_attention(TensorView(plan), q, k_cache, v_cache, kv_layout, kv_indptr, kv_indices, sm_scale, TensorView(workspace), o,
                            lse);
  Scale(lse, kLog2OfE);
}

const int32_t* Int32Values(const Tensor& tensor, const char* name, int64_t size) {
  const DLTensor& t = *tensor.GetDLTensorPtr();
  const bool is_right = t.ndim == 1 && t.shape[0] == size && t.dtype.code == kDLInt && t.dtype.bits == 32 && t.dtype.lanes == 1;
  if (!is_right || t.device.device_type != kDLCPU) {
    TVM_FFI_THROW(ArgumentError) << "argument `" << name << "` has shape " << DimsText(t) << "; it must be int32 [" << size
                                 << "], on the host";
  }
  return reinterpret_cast<const int32_t*>(static_cast<const char*>(t.data) + t.byte_offset);
}

}  // namespace

PlanInfo PrefillPlan(Tensor float_workspace, Tensor int_workspace, Tensor, Tensor qo_indptr, Tensor, Tensor kv_len, int64_t, int64_t,
                     int64_t num_qo_heads, int64_t num_kv_heads, int64_t page_size, bool, int64_t head_dim_qk, int64_t head_dim_vo,
                     bool causal, int64_t window_left, int64_t fixed_split_size, bool disable_split_kv, int64_t) {
  CheckPlannable(int_workspace, head_dim_qk, head_dim_vo, page_size);
  constexpr int64_t kAutomatic = 0, kNever = -1;
  const int64_t split = fixed_split_size > 0 ? fixed_split_size : disable_split_kv ? kNever : kAutomatic;
  const int64_t words = MakePlan(float_workspace, int_workspace, qo_indptr, kv_len,
                                 {num_qo_heads, num_kv_heads, head_dim_qk, int64_t{causal}, window_left, split});
  return {words, int64_t{causal}, window_left, head_dim_qk, num_kv_heads, page_size};
}

PlanInfo DecodePlan(Tensor, Tensor int_workspace, Tensor, Tensor, int64_t, int64_t, int64_t num_kv_heads, int64_t page_size, bool,
                    int64_t window_left, double logits_soft_cap, int64_t head_dim_qk, int64_t head_dim_vo, Tensor, Tensor) {
  CheckPlannable(int_workspace, head_dim_qk, head_dim_vo, page_size);
  if (logits_soft_cap != 0) {
    TVM_FFI_THROW(ArgumentError) << "argument `logits_soft_cap` is " << logits_soft_cap << ", and soft caps are not supported yet; pass 0";
  }
  return {kPlannedAtRun, 0, window_left, head_dim_qk, num_kv_heads, page_size};
}

void PagedRun(Tensor float_workspace, Tensor int_workspace, PlanInfo plan_info, Tensor q, Tensor k_cache, Tensor v_cache, Tensor,
              Tensor kv_indptr, Tensor kv_indices, Tensor, Tensor o, Tensor lse, int64_t mask_mode, int64_t layout, int64_t window_left,
              bool, double sm_scale, double, double) {
  CheckRun(plan_info, mask_mode, window_left);
  RunPaged(float_workspace, int_workspace, plan_info[kWords], q, k_cache, v_cache, layout, kv_indptr, kv_indices, sm_scale, o, lse);
}

void RaggedRun(Tensor float_workspace, Tensor int_workspace, PlanInfo plan_info, Tensor q, Tensor k, Tensor v, Tensor, Tensor kv_indptr,
               Tensor o, Tensor lse, int64_t mask_mode, int64_t layout, int64_t window_left, bool, double sm_scale, double, double) {
  CheckRun(plan_info, mask_mode, window_left);
  CheckLayout(layout, 0, "NHD: [tokens, heads, head_dim]");
  const WordsView plan(int_workspace, kDLInt, plan_info[kWords]), workspace(float_workspace, kDLFloat, -1);
  Library().ragged_attention(TensorView(plan), q, k, v, kv_indptr, sm_scale, TensorView(workspace), o, lse);
  Scale(lse, kLog2OfE);
}

void DecodeRun(Tensor float_workspace, Tensor int_workspace, PlanInfo plan_info, Tensor q, Tensor k_cache, Tensor v_cache, Tensor kv_indptr,
               Tensor kv_indices, Tensor last_page_len, Tensor o, Tensor lse, int64_t layout, int64_t window_left, bool, double sm_scale,
               double, double) {
  CheckRun(plan_info, 0, window_left);
  if (q->ndim != 3) TVM_FFI_THROW(ArgumentError) << "argument `q` has shape " << DimsText(*q.GetDLTensorPtr()) << "; it must have 3 axes";
  const int64_t batch = q->shape[0];
  const int32_t* const pages = Int32Values(kv_indptr, "kv_indptr", batch + 1);
  const int32_t* const filled = Int32Values(last_page_len, "last_page_len", batch);
  IndexArray qo_indptr, kv_len;
  for (int64_t r = 0; r <= batch; ++r) qo_indptr.host().push_back(static_cast<int32_t>(r));
  for (int64_t r = 0; r < batch; ++r) {
    const int64_t num_pages = pages[r + 1] - pages[r];
    kv_len.host().push_back(static_cast<int32_t>(num_pages > 0 ? (num_pages - 1) * plan_info[kPageSize] + filled[r] : 0));
  }
  qo_indptr.Publish({kDLCPU, 0});
  kv_len.Publish({kDLCPU, 0});
  const int64_t words = MakePlan(float_workspace, int_workspace, qo_indptr.Here(), kv_len.Here(),
                                 {q->shape[1], plan_info[kNumKvHeads], plan_info[kHeadDim], 0, window_left, 0});
  RunPaged(float_workspace, int_workspace, words, q, k_cache, v_cache, layout, kv_indptr, kv_indices, sm_scale, o, lse);
}

}  // namespace tvm_infer::mlc
