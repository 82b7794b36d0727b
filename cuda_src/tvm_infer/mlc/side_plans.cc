#include "tvm_infer/mlc/side_plans.h"

#include <tvm/ffi/error.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "tvm_infer/mlc/registry.h"

namespace tvm_infer::mlc {
namespace {

constexpr int64_t kAllKeys = -1;       // window_left
constexpr int64_t kSplitAuto = 0;      // fixed_split_size
constexpr int64_t kHeadsFirst = 0;     // kv_layout: [num_pages, 2, num_kv_heads, page_size, head_dim]
constexpr int64_t kConfigNumCtas = 8;  // of what kv_cache_config returns

Shape TileTable(const Config& config) {
  const tvm::ffi::Function& table = config.is_cuda() ? Library().cuda_tile_table : Library().cpu_tile_table;
  return table(tvm::ffi::DLDataTypeToString(config.dtype), config.head_dim).cast<Shape>();
}

// The first `words` of a plan's buffer, as a call takes them.
struct PlanView {
  PlanView(const Tensor& buffer, int64_t words) : size(words), view(*buffer.GetDLTensorPtr()) { view.shape = &size; }
  operator TensorView() const { return TensorView(&view); }  // NOLINT(google-explicit-constructor)
  int64_t size;
  DLTensor view;
};

}  // namespace

SidePlans::SidePlans(const Config& config, const InlineRope& inline_rope, tvm::ffi::Any cache)
    : config_(config),
      inline_rope_(inline_rope),
      cache_(std::move(cache)),
      num_ctas_(Library().kv_cache_config(cache_).cast<Shape>()[kConfigNumCtas]),
      tile_table_(TileTable(config)) {}

void SidePlans::NewStep() {
  has_query_indptr_ = has_page_table_ = turns_.is_ready = cross_turns_.is_ready = false;
  self_.is_ready = cross_.is_ready = whole_.is_ready = sliding_.is_ready = false;
}

// Buffers for any step within the cache's limits, when the first fine-grained call comes: most models make none.
void SidePlans::Allocate() {
  if (workspace_.defined()) return;
  int64_t plan_bytes = 0;
  for (const Shape& band : {BandOf(kAllKeys, false), BandOf(kAllKeys, true), BandOf(config_.layer_window - 1, true)}) {
    const Shape capacity = Library()
                               .plan_capacity(config_.num_qo_heads, config_.num_kv_heads, num_ctas_, band, kSplitAuto, tile_table_,
                                              config_.max_batch, config_.max_tokens, int64_t{0})
                               .cast<Shape>();
    plan_bytes = std::max(plan_bytes, capacity[0]);
    partial_rows_ = std::max(partial_rows_, capacity[1]);
  }
  for (Planned* planned : {&self_, &cross_, &whole_, &sliding_}) {
    planned->plan = Tensor::Empty({plan_bytes / 4}, {kDLInt, 32, 1}, {kDLCPU, 0});
    planned->device_plan = config_.is_cuda() ? Tensor::Empty({plan_bytes / 4}, {kDLInt, 32, 1}, config_.device) : planned->plan;
  }
  workspace_ = Tensor::Empty({partial_rows_ * (config_.head_dim + 1)}, {kDLFloat, 32, 1}, config_.device);
}

void SidePlans::Prepare(const Step& step, bool needs_page_table) {
  // A replay would find the plan of the step that was captured: begin_forward does not know these plans.
  if (config_.is_cuda() && Library().stream_is_capturing(config_.device).cast<bool>()) {
    TVM_FFI_THROW(CacheStateError)
        << "attention in parts, rotations that the number of tokens chooses (longrope), token trees and windows of "
           "sequences cannot be captured for a CUDA graph: their plans are made within the step. Call them by TVM's own names "
           "(vm.builtin.*), which TVM "
           "leaves out of its graphs, or build the model without relax.backend.use_cuda_graph";
  }
  Allocate();
  if (!has_query_indptr_) {
    qo_indptr_.host().assign(1, 0);
    for (int64_t length : step.append_lengths) qo_indptr_.host().push_back(qo_indptr_.host().back() + static_cast<int32_t>(length));
    qo_indptr_.Publish(config_.device);
    has_query_indptr_ = true;
  }
  if (!needs_page_table || has_page_table_) return;
  page_indptr_.host().assign(1, 0);
  page_indices_.host().clear();
  for (int64_t id : step.ids) {
    const Shape pages = Library().kv_cache_page_table(cache_, id).cast<Shape>();
    // Pages that left the window of all layers are read by nobody, but entries must name a page.
    for (const int64_t page : pages) page_indices_.host().push_back(static_cast<int32_t>(std::max<int64_t>(page, 0)));
    page_indptr_.host().push_back(static_cast<int32_t>(page_indices_.host().size()));
  }
  page_indptr_.Publish(config_.device);
  page_indices_.Publish(config_.device);
  has_page_table_ = true;
}

// From planned->kv_len.
void SidePlans::MakePlan(bool is_causal, int64_t window_left, Planned* planned) {
  planned->kv_len.Publish({kDLCPU, 0});
  const int64_t bytes = Library()
                            .plan(qo_indptr_.OnHost(), planned->kv_len.OnHost(), config_.num_qo_heads, config_.num_kv_heads, num_ctas_,
                                  BandOf(window_left, is_causal), kSplitAuto, tile_table_, partial_rows_, planned->plan)
                            .cast<int64_t>();
  planned->words = bytes / 4;
  if (config_.is_cuda()) {
    const PlanView host(planned->plan, planned->words), device(planned->device_plan, planned->words);
    Library().plan_upload(TensorView(host), TensorView(device));
  }
  planned->is_ready = true;
}

const tvm::ffi::Any& SidePlans::VariantOf(const Step& step, int64_t layer) const {
  return step.has_mask() ? step.mask : inline_rope_.OfLayer(config_.is_sliding(layer));
}

void SidePlans::Self(const Step& step, int64_t layer, TensorView q, TensorView k, TensorView v, double sm_scale, TensorView o,
                     const Tensor& lse) {
  Prepare(step, false);
  if (!self_.is_ready) {
    self_.kv_len.host().assign(step.append_lengths.begin(), step.append_lengths.end());
    MakePlan(true, kAllKeys, &self_);
  }
  const PlanView plan(self_.device_plan, self_.words);
  // Nothing is hidden among the step's own tokens, which follow one another: they turn as they stand in the call.
  const tvm::ffi::Any& rotation = inline_rope_.OfLayer(config_.is_sliding(layer));
  if (rotation != nullptr) {
    Library().variant_ragged_attention(TensorView(plan), q, k, v, qo_indptr_.Here(), sm_scale, workspace_, o, lse, rotation);
    return;
  }
  Library().ragged_attention(TensorView(plan), q, k, v, qo_indptr_.Here(), sm_scale, workspace_, o, lse);
}

void SidePlans::Cross(const Step& step, int64_t layer, TensorView q, double sm_scale, TensorView o, const Tensor& lse) {
  Prepare(step, true);
  if (!cross_.is_ready) {
    std::vector<int32_t>& kv_len = cross_.kv_len.host();
    kv_len.assign(step.start.begin(), step.start.end());
    if (step.is_decode) {
      for (int32_t& length : kv_len) ++length;
    }
    MakePlan(false, kAllKeys, &cross_);
  }
  Paged(step, cross_, layer, q, sm_scale, o, &lse);
}

SidePlans::Planned& SidePlans::PlanWhole(const Step& step, int64_t layer) {
  Prepare(step, true);
  const bool is_sliding = config_.is_sliding(layer);
  Planned& planned = is_sliding ? sliding_ : whole_;
  if (planned.is_ready) return planned;
  std::vector<int32_t>& kv_len = planned.kv_len.host();
  kv_len.clear();
  for (int64_t r = 0; r < step.num_requests(); ++r) kv_len.push_back(static_cast<int32_t>(step.start[r] + step.append_lengths[r]));
  MakePlan(true, is_sliding ? config_.layer_window - 1 : kAllKeys, &planned);
  return planned;
}

void SidePlans::RopeAppend(const Step& step, int64_t layer, const Rope& rope, TensorView q, TensorView k, TensorView v, TensorView q_out) {
  const Planned& planned = PlanWhole(step, layer);
  const Tensor pages = Library().kv_cache_pages(cache_, layer).cast<Tensor>();
  const PlanView plan(planned.device_plan, planned.words);
  const tvm::ffi::Any none = nullptr;
  Library().rope_append_paged(q, k, v, rope.inv_freq(step.num_tokens), rope.interleaved(), rope.magnitude(), TensorView(plan), none, none,
                              pages, none, kHeadsFirst, page_indptr_.Here(), page_indices_.Here(), q_out);
}

// By the function that rotates and stores, with each token a request of its own, whose last token it is, and a row of k_out as its one
// page: all slots of the page are the row, so that it is written wherever the token stands.
void SidePlans::Turn(const Step& step, const std::vector<int32_t>& positions, Turns* turns, const Tensor& inv_freq, int64_t interleaved,
                     double magnitude, TensorView q, TensorView k, TensorView v, TensorView q_out, const Tensor& k_out) {
  Prepare(step, false);
  if (!turns->is_ready) {
    token_indptr_.host().resize(step.num_tokens + 1);
    std::iota(token_indptr_.host().begin(), token_indptr_.host().end(), 0);
    token_indices_.host().assign(token_indptr_.host().begin(), token_indptr_.host().end() - 1);
    turns->ends.host().clear();
    for (const int32_t position : positions) turns->ends.host().push_back(position + 1);
    for (IndexArray* array : {&token_indptr_, &token_indices_, &turns->ends}) array->Publish(config_.device);
    turns->is_ready = true;
  }
  if (!values_.defined())
    values_ = Tensor::Empty({config_.max_tokens, config_.num_kv_heads, config_.head_dim}, config_.dtype, config_.device);
  int64_t shape[] = {step.num_tokens, config_.num_kv_heads, INT32_MAX, config_.head_dim};
  int64_t strides[] = {config_.num_kv_heads * config_.head_dim, config_.head_dim, 0, 1};
  const auto as_pages = [&](const Tensor& rows) {
    DLTensor pages = *rows.GetDLTensorPtr();
    pages.ndim = 4;
    pages.shape = shape;
    pages.strides = strides;
    return pages;
  };
  DLTensor k_pages = as_pages(k_out), v_pages = as_pages(values_);
  const tvm::ffi::Any none = nullptr;
  Library().rope_append_paged(q, k, v, inv_freq, interleaved, magnitude, none, token_indptr_.Here(), turns->ends.Here(),
                              TensorView(&k_pages), TensorView(&v_pages), kHeadsFirst, token_indptr_.Here(), token_indices_.Here(), q_out);
}

void SidePlans::Rotate(const Step& step, const Rope& rope, TensorView q, TensorView k, TensorView v, TensorView q_out,
                       const Tensor& k_out) {
  Turn(step, step.positions, &turns_, rope.inv_freq(step.num_tokens), rope.interleaved(), rope.magnitude(), q, k, v, q_out, k_out);
}

void SidePlans::TurnAhead(const Step& step, TensorView q, TensorView k, TensorView q_out, const Tensor& k_out) {
  constexpr double kNoFactor = 1;  // attention has it
  Turn(step, step.cross_turns, &cross_turns_, inline_rope_.inv_freq(), inline_rope_.interleaved(), kNoFactor, q, k, k, q_out, k_out);
}

void SidePlans::AppendMasked(const Step& step, int64_t layer, TensorView q, TensorView k, TensorView v, double sm_scale, TensorView o) {
  const Planned& planned = PlanWhole(step, layer);
  const Tensor pages = Library().kv_cache_pages(cache_, layer).cast<Tensor>();
  const PlanView plan(planned.device_plan, planned.words);
  const tvm::ffi::Any none = nullptr;
  Library().variant_append_attention(TensorView(plan), q, k, v, pages, none, kHeadsFirst, page_indptr_.Here(), page_indices_.Here(),
                                     sm_scale, workspace_, o, none, step.mask);
}

void SidePlans::Whole(const Step& step, int64_t layer, TensorView q, double sm_scale, TensorView o) {
  Paged(step, PlanWhole(step, layer), layer, q, sm_scale, o, nullptr);
}

void SidePlans::Paged(const Step& step, const Planned& planned, int64_t layer, TensorView q, double sm_scale, TensorView o,
                      const Tensor* lse) {
  const Tensor pages = Library().kv_cache_pages(cache_, layer).cast<Tensor>();
  const PlanView plan(planned.device_plan, planned.words);
  const tvm::ffi::Any none = nullptr;
  const tvm::ffi::Any lse_or_none = lse == nullptr ? none : tvm::ffi::Any(*lse);
  const tvm::ffi::Any& variant = VariantOf(step, layer);
  if (variant != nullptr) {
    Library().variant_paged_attention(TensorView(plan), q, pages, none, kHeadsFirst, page_indptr_.Here(), page_indices_.Here(), sm_scale,
                                      workspace_, o, lse_or_none, variant);
    return;
  }
  Library().paged_attention(TensorView(plan), q, pages, none, kHeadsFirst, page_indptr_.Here(), page_indices_.Here(), sm_scale, workspace_,
                            o, lse_or_none);
}

}  // namespace tvm_infer::mlc
