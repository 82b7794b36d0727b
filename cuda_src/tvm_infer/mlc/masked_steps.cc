// Steps whose tokens see less than all keys up to their own: token trees, and sequences with windows.
#include <tvm/ffi/error.h>

#include <algorithm>
#include <vector>

#include "tvm_infer/mlc/kv_cache.h"
#include "tvm_infer/mlc/registry.h"
#include "tvm_infer/mlc/tensors.h"

namespace tvm_infer::mlc {

void MLCPagedKVCacheObj::CheckTrees(const std::vector<TokenTree>& trees) const {
  if (trees.empty()) return;
  if (config_.has_sequence_windows) {  // as TVM
    TVM_FFI_THROW(ArgumentError) << "argument `token_tree_parent_ptr` on a cache that was created with support_sliding_window = 1; token "
                                 << "trees and windows of sequences do not go together: create the cache with 0";
  }
  const bool is_chains = std::all_of(trees.begin(), trees.end(), [](const TokenTree& tree) { return tree.is_chain; });
  if (!is_chains && !config_.sliding_layers.empty()) {
    TVM_FFI_THROW(ArgumentError)
        << "argument `token_tree_parent_ptr` makes trees that are no chains on a cache with mha_sliding layers (layer "
        << config_.sliding_layers.front() << "), which is not supported yet by tvm_infer's cache; draft chains, or "
        << "keep TVM's own cache for this model";
  }
}

// Of nodes their depth behind the text; of others where they stand among the keys that are seen.
void MLCPagedKVCacheObj::SetPositions(const std::vector<TokenTree>& trees, Step* step) const {
  step->positions.reserve(step->num_tokens);
  for (int64_t r = 0; r < step->num_requests(); ++r) {
    const int64_t length = step->append_lengths[r];
    if (trees.empty()) {
      const int64_t start = step->start[r] - windows_.num_hidden(step->ids[r]);
      for (int64_t t = 0; t < length; ++t) step->positions.push_back(static_cast<int32_t>(start + t));
      continue;
    }
    const int64_t old_nodes = trees[r].size() - length, text = step->start[r] - old_nodes;
    for (int64_t t = 0; t < length; ++t) step->positions.push_back(static_cast<int32_t>(text + trees[r].depths[old_nodes + t]));
  }
  if (inline_rope_.is_active() && !step->is_decode) SetCrossTurns(step);
}

// The executor takes a call's queries for its last keys, and the keys of cross attention end where the step begins, so that it turns
// queries by positions that are too small by the step's length; and what is hidden it leaves out behind the sinks only.
void MLCPagedKVCacheObj::SetCrossTurns(Step* step) const {
  step->cross_turns.reserve(step->num_tokens);
  for (int64_t r = 0; r < step->num_requests(); ++r) {
    const SequenceWindow* window = windows_.Find(step->ids[r]);
    for (int64_t t = 0; t < step->append_lengths[r]; ++t) {
      const int64_t key = step->start[r] - step->append_lengths[r] + t;
      const int64_t hidden = window != nullptr && key >= window->sink ? window->num_hidden() : 0;
      const int64_t position = step->positions[step->cross_turns.size()];
      step->cross_turns.push_back(static_cast<int32_t>(position - (key - hidden)));
    }
  }
}

void MLCPagedKVCacheObj::SetMask(const std::vector<TokenTree>& trees, Step* step) {
  const bool is_chains = std::all_of(trees.begin(), trees.end(), [](const TokenTree& tree) { return tree.is_chain; });
  if (!is_chains) {
    masks_.SetTrees(trees, step);
  } else if (config_.has_sequence_windows) {
    masks_.SetWindows(windows_, step);
  }
}

Tensor& MLCPagedKVCacheObj::Rotated(Tensor* tensor, int64_t heads) const {
  if (!tensor->defined()) *tensor = Tensor::Empty({config_.max_tokens, heads, config_.head_dim}, config_.dtype, config_.device);
  return *tensor;
}

void MLCPagedKVCacheObj::MaskedAttention(int64_t layer, TensorView q, TensorView k, TensorView v, double sm_scale, TensorView o) {
  if (step_.num_tokens == 0) return;
  if (!rope_.is_active()) {
    side_plans_.AppendMasked(step_, layer, q, k, v, sm_scale, o);
    return;
  }
  const TokensView rotated_q(Rotated(&rotated_q_, config_.num_qo_heads), step_.num_tokens, 0, config_.num_qo_heads);
  const TokensView rotated_k(Rotated(&rotated_k_, config_.num_kv_heads), step_.num_tokens, 0, config_.num_kv_heads);
  side_plans_.Rotate(step_, rope_, q, k, v, rotated_q, rotated_k_);
  side_plans_.AppendMasked(step_, layer, rotated_q, rotated_k, v, sm_scale, o);
}

void MLCPagedKVCacheObj::CommitAcceptedTokenTreeNodes(const Shape& seq_ids, const Shape& leaf_indices) {
  if (seq_ids.size() != leaf_indices.size()) {
    TVM_FFI_THROW(ArgumentError) << "argument `leaf_indices` has " << leaf_indices.size() << " entries and `seq_ids` " << seq_ids.size()
                                 << "; they must have one for each sequence";
  }
  if (InForward()) EndForward();  // TVM's may be left out
  std::vector<int64_t> ids, src, dst;
  for (size_t i = 0; i < seq_ids.size(); ++i) {
    const int64_t length = Length(seq_ids[i]);
    const TokenTree* tree = trees_.Find(seq_ids[i]);
    if (tree == nullptr || std::find(seq_ids.begin(), seq_ids.begin() + i, seq_ids[i]) != seq_ids.begin() + i) {
      TVM_FFI_THROW(CacheStateError) << "operation commit_accepted_token_tree_nodes on sequence " << seq_ids[i]
                                     << ", which has no token tree to commit; begin a step with token_tree_parent_ptr first, and commit "
                                     << "its nodes once";
    }
    if (leaf_indices[i] < -1 || leaf_indices[i] >= tree->size()) {
      TVM_FFI_THROW(ArgumentError) << "argument `leaf_indices` is " << leaf_indices[i] << " for sequence " << seq_ids[i]
                                   << ", whose tree has " << tree->size() << " nodes; it must be from 0 to " << tree->size() - 1
                                   << ", or -1 for none of them";
    }
    const std::vector<int64_t> path = tree->PathTo(leaf_indices[i]);
    const int64_t text = length - tree->size();
    for (size_t p = 0; p < path.size(); ++p) {
      if (path[p] == static_cast<int64_t>(p)) continue;
      ids.push_back(seq_ids[i]);
      src.push_back(text + path[p]);
      dst.push_back(text + static_cast<int64_t>(p));
    }
  }
  Library().kv_cache_move_tokens(cache_, Shape(ids.begin(), ids.end()), Shape(src.begin(), src.end()), Shape(dst.begin(), dst.end()));
  for (size_t i = 0; i < seq_ids.size(); ++i) {
    const TokenTree& tree = *trees_.Find(seq_ids[i]);
    const int64_t accepted = leaf_indices[i] < 0 ? 0 : tree.depths[leaf_indices[i]] + 1;
    Library().kv_cache_pop(cache_, seq_ids[i], tree.size() - accepted);
    trees_.Forget(seq_ids[i]);
  }
}

// Self and cross attention are of whole steps: causal among the step's tokens, and all keys from before.
void MLCPagedKVCacheObj::CheckParts(const char* operation, const char* name, int64_t layer) const {
  if (config_.is_sliding(layer)) {  // TVM has none either
    TVM_FFI_THROW(ArgumentError) << "argument `" << name << "` of " << operation << " is " << layer
                                 << ", an mha_sliding layer, whose window attention in parts does not have; call attention_with_fused_qkv";
  }
  if (step_.has_tree) {
    TVM_FFI_THROW(CacheStateError) << "operation " << operation << " in a step of token trees, which attention in parts does not have yet; "
                                   << "call attention_with_fused_qkv, or begin the step with chains";
  }
}

}  // namespace tvm_infer::mlc
