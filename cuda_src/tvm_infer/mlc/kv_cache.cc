#include "tvm_infer/mlc/kv_cache.h"

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <numeric>
#include <utility>
#include <vector>

#include "tvm_infer/mlc/registry.h"
#include "tvm_infer/mlc/tensors.h"

namespace tvm_infer::mlc {
namespace {

constexpr double kLog2E = 1.44269504088896340736;  // natural logarithm -> base 2
constexpr double kLn2 = 0.693147180559945309417;   // base 2 -> natural

tvm::ffi::Any CreateCache(const Config& c) {
  constexpr int64_t kDefault = 0;  // num_ctas, num_threads: the executor's own
  return Library().kv_cache_create(c.num_layers, c.num_qo_heads, c.num_kv_heads, c.head_dim, c.dtype, c.page_size, c.num_pages, c.max_batch,
                                   c.max_tokens, kDefault, kDefault, c.device);
}

}  // namespace

MLCPagedKVCacheObj::MLCPagedKVCacheObj(const Config& config, const RopeArgs& rope)
    : config_(config),
      rope_(rope, config),
      inline_rope_(rope, config),
      cache_(CreateCache(config)),
      side_plans_(config, inline_rope_, cache_),
      masks_(config, inline_rope_) {
  constexpr int64_t kAnyCausality = -1, kAllKeys = -1;
  if (inline_rope_.is_active()) {
    std::vector<int64_t> layers(config_.num_layers);
    std::iota(layers.begin(), layers.end(), 0);
    Library().kv_cache_set_variant(cache_, Shape(layers.begin(), layers.end()), inline_rope_.OfLayer(false), kAnyCausality,
                                   BandOf(kAllKeys, true));
  }
  if (!config_.sliding_layers.empty()) {
    const Shape layers(config_.sliding_layers.begin(), config_.sliding_layers.end());
    Library().kv_cache_set_variant(cache_, layers, inline_rope_.OfLayer(true), kAnyCausality, BandOf(config_.layer_window - 1, true));
  }
  if (rope_.is_active() && rope_.is_fixed()) {
    Library().kv_cache_set_rope(cache_, rope_.host_inv_freq(), rope_.interleaved(), rope_.magnitude());
  }
}

bool MLCPagedKVCacheObj::InForward() const { return Library().kv_cache_in_forward(cache_).cast<bool>(); }

const Step& MLCPagedKVCacheObj::ActiveStep(const char* operation) const {
  if (!InForward()) {
    TVM_FFI_THROW(CacheStateError) << "operation " << operation << " came outside of a step; call vm.builtin.kv_state_begin_forward first";
  }
  return step_;
}

void MLCPagedKVCacheObj::CheckLayer(const char* name, int64_t layer) const {
  if (layer < 0 || layer >= config_.num_layers) {
    TVM_FFI_THROW(ArgumentError) << "argument `" << name << "` is " << layer << " but the cache has " << config_.num_layers
                                 << " layers; it must be from 0 to " << config_.num_layers - 1;
  }
}

int64_t MLCPagedKVCacheObj::Length(int64_t seq_id) const { return Library().kv_cache_seq_len(cache_, seq_id).cast<int64_t>(); }

int64_t MLCPagedKVCacheObj::VisibleLength(int64_t seq_id) const { return Length(seq_id) - windows_.num_hidden(seq_id); }

void MLCPagedKVCacheObj::Clear() {
  EndForward();  // TVM clears at any time
  Library().kv_cache_clear(cache_);
  trees_.Clear();
  windows_.Clear();
  has_step_ = false;
}

void MLCPagedKVCacheObj::AddSequence(int64_t seq_id) { Library().kv_cache_add(cache_, seq_id); }
void MLCPagedKVCacheObj::RemoveSequence(int64_t seq_id) {
  Library().kv_cache_remove(cache_, seq_id);
  trees_.Forget(seq_id);
  windows_.Forget(seq_id);
}
void MLCPagedKVCacheObj::ForkSequence(int64_t parent_seq_id, int64_t child_seq_id, int64_t fork_pos) {
  trees_.CheckCommitted(parent_seq_id, "fork_sequence");
  if (config_.has_sequence_windows && windows_.Find(parent_seq_id) != nullptr) {
    windows_.CheckFork(parent_seq_id, Length(parent_seq_id), fork_pos);
  }
  Library().kv_cache_fork(cache_, parent_seq_id, child_seq_id, fork_pos);
}
void MLCPagedKVCacheObj::PopN(int64_t seq_id, int32_t n) {
  if (config_.has_sequence_windows) windows_.CheckPop(seq_id, Length(seq_id), n);
  Library().kv_cache_pop(cache_, seq_id, int64_t{n});
  trees_.Pop(seq_id, n);
}

void MLCPagedKVCacheObj::EnableSlidingWindowForSeq(int64_t seq_id, int32_t sliding_window_size, int32_t attn_sink_size) {
  if (!config_.has_sequence_windows && config_.sliding_layers.empty()) {
    TVM_FFI_THROW(ArgumentError) << "operation enable_sliding_window_for_seq(seq_id=" << seq_id
                                 << ", sliding_window_size=" << sliding_window_size << ", attn_sink_size=" << attn_sink_size
                                 << ") on a cache that was created with support_sliding_window = 0; create it with 1";
  }
  Length(seq_id);  // throws where there is no such sequence
  windows_.Enable(seq_id, sliding_window_size, attn_sink_size);
}

void MLCPagedKVCacheObj::BeginForward(const Shape& seq_ids, const Shape& append_lengths, const Optional<Shape>& token_tree_parent_ptr) {
  std::vector<TokenTree> trees = trees_.Grown(seq_ids, append_lengths, token_tree_parent_ptr);
  CheckTrees(trees);
  EndForward();
  Step step{seq_ids, append_lengths};
  step.start.reserve(seq_ids.size());
  for (int64_t id : seq_ids) step.start.push_back(Length(id));
  step.is_decode = !config_.has_sequence_windows;  // with windows of sequences TVM stores new keys behind attention
  for (int64_t length : append_lengths) {
    step.num_tokens += length;
    step.is_decode = step.is_decode && length == 1;
  }
  if (append_lengths.size() == seq_ids.size()) {  // else the call below says so
    SetPositions(trees, &step);
    SetMask(trees, &step);
  }
  Library().kv_cache_begin_forward(cache_, seq_ids, append_lengths, int64_t{1});
  for (size_t r = 0; r < trees.size(); ++r) trees_.Set(seq_ids[r], std::move(trees[r]));
  step_ = std::move(step);
  has_step_ = true;
  has_positions_ = false;
  side_plans_.NewStep();
}

void MLCPagedKVCacheObj::EndForward() {
  if (!InForward()) return;
  Library().kv_cache_end_forward(cache_);
  if (!config_.has_sequence_windows) return;
  for (int64_t id : step_.ids) {
    const Slide slide = windows_.SlideTo(id, Length(id), config_.page_size);
    if (slide.num_pages > 0) Library().kv_cache_drop_pages(cache_, id, slide.first_page, slide.num_pages);
  }
}

bool MLCPagedKVCacheObj::Empty() const { return Library().kv_cache_sequences(cache_).cast<Shape>().empty(); }

int32_t MLCPagedKVCacheObj::GetNumAvailablePages() const { return Library().kv_cache_num_free_pages(cache_).cast<int32_t>(); }

int32_t MLCPagedKVCacheObj::GetTotalSequenceLength() const {
  int64_t total = 0;
  for (int64_t id : Library().kv_cache_sequences(cache_).cast<Shape>()) total += VisibleLength(id);
  return static_cast<int32_t>(total);
}

int32_t MLCPagedKVCacheObj::GetSequenceLength(int64_t seq_id) const { return static_cast<int32_t>(VisibleLength(seq_id)); }

void MLCPagedKVCacheObj::AttentionWithFusedQKV(int64_t layer_id, Tensor qkv_data, Optional<Tensor> mask, Tensor o_data, double sm_scale) {
  if (mask.has_value()) {
    TVM_FFI_THROW(ArgumentError) << "argument `mask` has shape " << DimsText(*mask.value().GetDLTensorPtr())
                                 << ", and masks are not supported yet by tvm_infer's cache; pass none: attention is causal";
  }
  const Step& step = ActiveStep("attention_with_fused_qkv");
  const int64_t h_q = config_.num_qo_heads, h_kv = config_.num_kv_heads;
  CheckTokens(qkv_data, "qkv_data", config_, h_q + 2 * h_kv, "num_qo_heads + 2 * num_kv_heads", step.num_tokens, true);
  CheckTokens(o_data, "o_data", config_, h_q, "num_qo_heads", step.num_tokens, true);
  const TokensView q(qkv_data, step.num_tokens, 0, h_q), k(qkv_data, step.num_tokens, h_q, h_kv),
      v(qkv_data, step.num_tokens, h_q + h_kv, h_kv), o(o_data, step.num_tokens, 0, h_q);
  if (step.has_mask()) {
    CheckLayer("layer_id", layer_id);
    MaskedAttention(layer_id, q, k, v, sm_scale, o);
    return;
  }
  if (!rope_.is_active()) {
    Library().attention_with_kv_cache(cache_, layer_id, TensorView(q), TensorView(k), TensorView(v), sm_scale, int64_t{1}, TensorView(o));
    return;
  }
  if (rope_.is_fixed()) {
    const TokensView qkv(qkv_data, step.num_tokens, 0, h_q + 2 * h_kv);
    Library().attention_with_kv_cache_fused_qkv(cache_, layer_id, TensorView(qkv), sm_scale, int64_t{1}, TensorView(o));
    return;
  }
  CheckLayer("layer_id", layer_id);
  if (step.num_tokens == 0) return;
  const TokensView rotated(Rotated(&rotated_q_, h_q), step.num_tokens, 0, h_q);
  side_plans_.RopeAppend(step, layer_id, rope_, q, k, v, rotated);
  side_plans_.Whole(step, layer_id, rotated, sm_scale, o);
}

void MLCPagedKVCacheObj::SelfAttention(int64_t layer_id, Tensor q_data, Tensor k_data, Tensor v_data, Tensor o_data, Tensor lse_data,
                                       double sm_scale) {
  const Step& step = ActiveStep("self_attention");
  CheckLayer("layer_id", layer_id);
  CheckParts("self_attention", "layer_id", layer_id);
  CheckTokens(q_data, "q_data", config_, config_.num_qo_heads, "num_qo_heads", step.num_tokens, false);
  CheckTokens(k_data, "k_data", config_, config_.num_kv_heads, "num_kv_heads", step.num_tokens, false);
  CheckTokens(v_data, "v_data", config_, config_.num_kv_heads, "num_kv_heads", step.num_tokens, false);
  CheckTokens(o_data, "o_data", config_, config_.num_qo_heads, "num_qo_heads", step.num_tokens, false);
  CheckLse(lse_data, "lse_data", config_, step.num_tokens);
  side_plans_.Self(step, layer_id, q_data, k_data, v_data, sm_scale, o_data, lse_data);
  Library().scale_lse(lse_data, kLog2E);
}

void MLCPagedKVCacheObj::CrossAttention(int64_t layer_id, Tensor q_data, Tensor o_data, Tensor lse_data, double sm_scale) {
  const Step& step = ActiveStep("cross_attention");
  CheckLayer("layer_id", layer_id);
  CheckParts("cross_attention", "layer_id", layer_id);
  CheckTokens(q_data, "q_data", config_, config_.num_qo_heads, "num_qo_heads", step.num_tokens, false);
  CheckTokens(o_data, "o_data", config_, config_.num_qo_heads, "num_qo_heads", step.num_tokens, false);
  CheckLse(lse_data, "lse_data", config_, step.num_tokens);
  if (step.cross_turns.empty()) {
    side_plans_.Cross(step, layer_id, q_data, sm_scale, o_data, lse_data);
  } else {
    const TokensView turned(Rotated(&rotated_q_, config_.num_qo_heads), step.num_tokens, 0, config_.num_qo_heads);
    const TokensView any_keys(q_data, step.num_tokens, 0, config_.num_kv_heads);
    side_plans_.TurnAhead(step, q_data, any_keys, turned, Rotated(&rotated_k_, config_.num_kv_heads));
    side_plans_.Cross(step, layer_id, turned, sm_scale, o_data, lse_data);
  }
  Library().scale_lse(lse_data, kLog2E);
}

// The source layer has stored the step's keys by now (its attention runs first, TVM's contract), so they are read from the cache, as TVM
// reads them in a decode step.
void MLCPagedKVCacheObj::AttentionWithSharedKV(int64_t source_layer_id, Tensor q_data, Tensor current_k_data, Tensor current_v_data,
                                               Tensor o_data, double sm_scale) {
  const Step& step = ActiveStep("attention_with_shared_kv");
  CheckLayer("source_layer_id", source_layer_id);
  CheckTokens(q_data, "q_data", config_, config_.num_qo_heads, "num_qo_heads", step.num_tokens, false);
  CheckTokens(current_k_data, "current_k_data", config_, config_.num_kv_heads, "num_kv_heads", step.num_tokens, false);
  CheckTokens(current_v_data, "current_v_data", config_, config_.num_kv_heads, "num_kv_heads", step.num_tokens, false);
  CheckTokens(o_data, "o_data", config_, config_.num_qo_heads, "num_qo_heads", step.num_tokens, false);
  side_plans_.Whole(step, source_layer_id, q_data, sm_scale, o_data);
}

tvm::ffi::Array<Tensor> MLCPagedKVCacheObj::MergeAttnOutputInplace(Tensor o_self_attn, Tensor lse_self_attn, Tensor o_cross_attn,
                                                                   Tensor lse_cross_attn) {
  CheckLse(lse_self_attn, "lse_self_attn", config_, lse_self_attn->ndim > 0 ? lse_self_attn->shape[0] : 0);
  CheckLse(lse_cross_attn, "lse_cross_attn", config_, lse_self_attn->shape[0]);
  // The other operand is given back as it came: its logarithms are changed on a copy.
  Tensor lse_cross = Tensor::Empty({lse_cross_attn->shape[0], lse_cross_attn->shape[1]}, lse_cross_attn->dtype, config_.device);
  Tensor::CopyFromTo(lse_cross_attn.GetDLTensorPtr(), const_cast<DLTensor*>(lse_cross.GetDLTensorPtr()),
                     TVMFFIEnvGetStream(config_.device.device_type, config_.device.device_id));
  Library().scale_lse(lse_cross, kLn2);
  Library().scale_lse(lse_self_attn, kLn2);
  try {
    Library().merge(o_self_attn, lse_self_attn, o_cross_attn, lse_cross, o_self_attn, lse_self_attn);
  } catch (...) {
    Library().scale_lse(lse_self_attn, kLog2E);
    throw;
  }
  Library().scale_lse(lse_self_attn, kLog2E);
  return {o_self_attn, lse_self_attn};
}

Tensor MLCPagedKVCacheObj::GetQueryPositions() {
  if (!has_step_) {
    TVM_FFI_THROW(CacheStateError) << "operation get_query_positions came before the first step; call vm.builtin.kv_state_begin_forward "
                                   << "first";
  }
  constexpr DLDataType kInt32 = {kDLInt, 32, 1};
  if (!positions_.defined()) positions_ = Tensor::Empty({config_.max_tokens}, kInt32, config_.device);
  Tensor view = positions_.CreateView({step_.num_tokens}, kInt32);
  if (has_positions_ || step_.num_tokens == 0) return view;
  DLTensor host = *view.GetDLTensorPtr();
  host.data = step_.positions.data();
  host.byte_offset = 0;
  host.device = {kDLCPU, 0};
  // From pageable memory: the driver has taken the values when this returns.
  Tensor::CopyFromTo(&host, const_cast<DLTensor*>(view.GetDLTensorPtr()),
                     TVMFFIEnvGetStream(config_.device.device_type, config_.device.device_id));
  has_positions_ = true;
  return view;
}

}  // namespace tvm_infer::mlc
