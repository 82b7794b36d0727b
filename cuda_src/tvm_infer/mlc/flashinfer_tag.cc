#include "tvm_infer/mlc/flashinfer_tag.h"

#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <atomic>
#include <string>
#include <unordered_map>
#include <vector>

#include "tvm_infer/mlc/registry.h"
#include "tvm_infer/mlc/tensors.h"

namespace tvm_infer::mlc {
namespace {

constexpr double kLog2OfE = 1.44269504088896340736;  // natural logarithm -> base 2
constexpr int64_t kPlannedAtRun = -1;                // plan_info[kWords] of a decode plan
// plan_info: words of the plan in the int workspace, causal, window_left, head_dim, num_kv_heads, page_size, number of the plan.
enum Info : size_t { kWords, kCausal, kWindowLeft, kHeadDim, kNumKvHeads, kPageSize, kSerial, kInfoSize };

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

void CheckPlannable(int64_t head_dim_qk, int64_t head_dim_vo, int64_t page_size) {
  if (head_dim_qk != head_dim_vo) {
    TVM_FFI_THROW(ArgumentError) << "argument `head_dim_vo` is " << head_dim_vo << " and `head_dim_qk` is " << head_dim_qk
                                 << "; keys and values must have one width: pad the narrower with zeros";
  }
  if (page_size < 1) TVM_FFI_THROW(ArgumentError) << "argument `page_size` is " << page_size << "; it must be at least 1";
}

int64_t NextSerial() {
  static std::atomic<int64_t> last{0};
  return ++last;
}

struct PlanSettings {
  int64_t num_qo_heads, num_kv_heads, head_dim, causal, window_left, fixed_split_size;
};

struct Executor {
  int64_t num_ctas;
  Shape tile_table;
};

// The tile table is that of one dtype, since TVM does not say which there will be: on the cpu a plan runs in every dtype, on cuda the two
// that there are have one table.
Executor ExecutorOf(DLDevice device, int64_t head_dim) {
  if (device.device_type == kDLCUDA) {
    const std::string info = Library().cuda_info(int64_t{device.device_id}).cast<std::string>();  // "arch SMs name"
    return {std::stoll(info.substr(info.find(' ') + 1)), Library().cuda_tile_table("bfloat16", head_dim).cast<Shape>()};
  }
  const std::string info = Library().cpu_info().cast<std::string>();  // "isa threads"
  return {std::stoll(info.substr(info.find(' ') + 1)), Library().cpu_tile_table("float32", head_dim).cast<Shape>()};
}

// Plans into the int workspace, on cuda by way of `host`, and returns the words used.
int64_t MakePlan(const Tensor& float_workspace, const Tensor& int_workspace, TensorView host, TensorView qo_indptr, TensorView kv_len,
                 const PlanSettings& s) {
  const Executor executor = ExecutorOf(int_workspace->device, s.head_dim);
  const int64_t max_partial_rows = float_workspace->shape[0] / 4 / (s.head_dim + 1);
  const int64_t words = Library()
                            .plan(qo_indptr, kv_len, s.num_qo_heads, s.num_kv_heads, executor.num_ctas,
                                  BandOf(s.window_left, s.causal != 0), s.fixed_split_size, executor.tile_table, max_partial_rows, host)
                            .cast<int64_t>() /
                        4;
  if (int_workspace->device.device_type == kDLCUDA) {
    const WordsView on_device(int_workspace, kDLInt, words);
    Library().plan_upload(host, TensorView(on_device));
  }
  return words;
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
  Library().scale_lse(lse, kLog2OfE);
}

// An int32 tensor [size], wherever it lies. Waits for the device's current stream.
std::vector<int32_t> Int32Values(const Tensor& tensor, const char* name, int64_t size) {
  const DLTensor& t = *tensor.GetDLTensorPtr();
  if (t.ndim != 1 || t.shape[0] != size || t.dtype.code != kDLInt || t.dtype.bits != 32 || t.dtype.lanes != 1) {
    TVM_FFI_THROW(ArgumentError) << "argument `" << name << "` has shape " << DimsText(t) << "; it must be int32 [" << size << "]";
  }
  std::vector<int32_t> values(size);
  void* const stream = t.device.device_type == kDLCPU ? nullptr : TVMFFIEnvGetStream(t.device.device_type, t.device.device_id);
  if (size > 0) Tensor::CopyToBytes(&t, values.data(), size * sizeof(int32_t), stream);
  return values;
}

// What the first run of a decode plan planned, by int workspace; of this thread, as its cache is.
struct DecodePlanned {
  int64_t serial, words;
};
std::unordered_map<const void*, DecodePlanned>& DecodePlans() {
  static thread_local std::unordered_map<const void*, DecodePlanned> plans;
  return plans;
}

// Words of the plan for this batch: every sequence attends with one token.
int64_t PlanDecode(const Tensor& float_workspace, const Tensor& int_workspace, const PlanInfo& info, const Tensor& q,
                   const Tensor& kv_indptr, const Tensor& last_page_len) {
  DecodePlanned& planned = DecodePlans()[int_workspace->data];
  if (planned.serial == info[kSerial]) return planned.words;
  const int64_t batch = q->shape[0];
  const std::vector<int32_t> pages = Int32Values(kv_indptr, "kv_indptr", batch + 1);
  const std::vector<int32_t> filled = Int32Values(last_page_len, "last_page_len", batch);
  IndexArray qo_indptr, kv_len, host;
  for (int64_t r = 0; r <= batch; ++r) qo_indptr.host().push_back(static_cast<int32_t>(r));
  for (int64_t r = 0; r < batch; ++r) {
    const int64_t num_pages = pages[r + 1] - pages[r];
    kv_len.host().push_back(static_cast<int32_t>(num_pages > 0 ? (num_pages - 1) * info[kPageSize] + filled[r] : 0));
  }
  constexpr DLDevice kHost = {kDLCPU, 0};
  qo_indptr.Publish(kHost);
  kv_len.Publish(kHost);
  const PlanSettings settings{q->shape[1], info[kNumKvHeads], info[kHeadDim], 0, info[kWindowLeft], 0};
  const bool is_cuda = int_workspace->device.device_type == kDLCUDA;
  if (is_cuda) host.host().resize(int_workspace->shape[0] / 4);
  host.Publish(kHost);
  const WordsView in_place(int_workspace, kDLInt, -1);
  const int64_t words =
      MakePlan(float_workspace, int_workspace, is_cuda ? host.OnHost() : TensorView(in_place), qo_indptr.Here(), kv_len.Here(), settings);
  planned = {info[kSerial], words};
  return words;
}

}  // namespace

PlanInfo PrefillPlan(Tensor float_workspace, Tensor int_workspace, Tensor pinned_int_workspace, Tensor qo_indptr, Tensor, Tensor kv_len,
                     int64_t, int64_t, int64_t num_qo_heads, int64_t num_kv_heads, int64_t page_size, bool, int64_t head_dim_qk,
                     int64_t head_dim_vo, bool causal, int64_t window_left, int64_t fixed_split_size, bool disable_split_kv, int64_t) {
  CheckPlannable(head_dim_qk, head_dim_vo, page_size);
  constexpr int64_t kAutomatic = 0, kNever = -1;
  const int64_t split = fixed_split_size > 0 ? fixed_split_size : disable_split_kv ? kNever : kAutomatic;
  const bool is_cuda = int_workspace->device.device_type == kDLCUDA;
  const WordsView host(is_cuda ? pinned_int_workspace : int_workspace, kDLInt, -1);
  const int64_t words = MakePlan(float_workspace, int_workspace, host, qo_indptr, kv_len,
                                 {num_qo_heads, num_kv_heads, head_dim_qk, int64_t{causal}, window_left, split});
  return {words, int64_t{causal}, window_left, head_dim_qk, num_kv_heads, page_size, NextSerial()};
}

PlanInfo DecodePlan(Tensor, Tensor, Tensor, Tensor, int64_t, int64_t, int64_t num_kv_heads, int64_t page_size, bool, int64_t window_left,
                    double logits_soft_cap, int64_t head_dim_qk, int64_t head_dim_vo, Tensor, Tensor) {
  CheckPlannable(head_dim_qk, head_dim_vo, page_size);
  if (logits_soft_cap != 0) {
    TVM_FFI_THROW(ArgumentError) << "argument `logits_soft_cap` is " << logits_soft_cap << ", and soft caps are not supported yet; pass 0";
  }
  return {kPlannedAtRun, 0, window_left, head_dim_qk, num_kv_heads, page_size, NextSerial()};
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
  Library().scale_lse(lse, kLog2OfE);
}

void DecodeRun(Tensor float_workspace, Tensor int_workspace, PlanInfo plan_info, Tensor q, Tensor k_cache, Tensor v_cache, Tensor kv_indptr,
               Tensor kv_indices, Tensor last_page_len, Tensor o, Tensor lse, int64_t layout, int64_t window_left, bool, double sm_scale,
               double, double) {
  CheckRun(plan_info, 0, window_left);
  if (q->ndim != 3) TVM_FFI_THROW(ArgumentError) << "argument `q` has shape " << DimsText(*q.GetDLTensorPtr()) << "; it must have 3 axes";
  const int64_t words = PlanDecode(float_workspace, int_workspace, plan_info, q, kv_indptr, last_page_len);
  RunPaged(float_workspace, int_workspace, words, q, k_cache, v_cache, layout, kv_indptr, kv_indices, sm_scale, o, lse);
}

}  // namespace tvm_infer::mlc
