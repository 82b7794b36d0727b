// tvm_infer's paged KV cache as the object that TVM's own builtins take: `vm.builtin.kv_state_*` and `vm.builtin.attention_kv_cache_*` call
// the virtual functions of AttentionKVCacheObj, so that a compiled MLC model runs on our cache and kernels unchanged.
//
// The semantics are those of TVM's src/runtime/vm/paged_kv_cache.cc; where this cache does more or less, docs/mlc.md says so. Not
// thread-safe, as TVM's.
#pragma once

#include <src/runtime/vm/kv_state.h>
#include <tvm/ffi/any.h>

#include "tvm_infer/mlc/config.h"
#include "tvm_infer/mlc/inline_rope.h"
#include "tvm_infer/mlc/masks.h"
#include "tvm_infer/mlc/rope.h"
#include "tvm_infer/mlc/sequence_windows.h"
#include "tvm_infer/mlc/side_plans.h"
#include "tvm_infer/mlc/step.h"
#include "tvm_infer/mlc/token_trees.h"

namespace tvm_infer::mlc {

class MLCPagedKVCacheObj final : public tvm::runtime::vm::AttentionKVCacheObj {
 public:
  MLCPagedKVCacheObj(const Config& config, const RopeArgs& rope);

  // The object of kv_cache_create that holds the pages.
  const tvm::ffi::Any& cache() const { return cache_; }

  // Sequences. Between BeginForward() and EndForward() they throw CacheStateError.
  void Clear() override;
  void AddSequence(int64_t seq_id) override;
  void RemoveSequence(int64_t seq_id) override;
  void ForkSequence(int64_t parent_seq_id, int64_t child_seq_id, int64_t fork_pos) override;
  void PopN(int64_t seq_id, int32_t n) override;

  // The sequence keeps its first and last keys from the end of the next step on: sequence_windows.h. In a cache whose layers have windows
  // there is nothing to it.
  void EnableSlidingWindowForSeq(int64_t seq_id, int32_t sliding_window_size, int32_t attn_sink_size) override;
  // Of the trees that steps since the last commit made: keeps the nodes from a root to the leaf, drops the others; -1: drops all.
  void CommitAcceptedTokenTreeNodes(const Shape& seq_ids, const Shape& leaf_indices) override;

  // A begin ends the step before it, since TVM's EndForward() may be left out; outside of a step EndForward() does nothing.
  void BeginForward(const Shape& seq_ids, const Shape& append_lengths, const Optional<Shape>& token_tree_parent_ptr) override;
  void EndForward() override;

  bool Empty() const override;
  int32_t GetNumAvailablePages() const override;
  int32_t GetTotalSequenceLength() const override;
  int32_t GetSequenceLength(int64_t seq_id) const;  // not in every TVM 0.27, so not marked override

  // Where rotation is inline all kinds of attention turn queries and keys, as in TVM; else the first one alone.
  // LSE that models see is base 2, TVM's convention; the executors' is natural.
  void AttentionWithFusedQKV(int64_t layer_id, Tensor qkv_data, Optional<Tensor> mask, Tensor o_data, double sm_scale) override;
  void SelfAttention(int64_t layer_id, Tensor q_data, Tensor k_data, Tensor v_data, Tensor o_data, Tensor lse_data,
                     double sm_scale) override;
  void CrossAttention(int64_t layer_id, Tensor q_data, Tensor o_data, Tensor lse_data, double sm_scale) override;
  void AttentionWithSharedKV(int64_t source_layer_id, Tensor q_data, Tensor current_k_data, Tensor current_v_data, Tensor o_data,
                             double sm_scale);
  tvm::ffi::Array<Tensor> MergeAttnOutputInplace(Tensor o_self_attn, Tensor lse_self_attn, Tensor o_cross_attn,
                                                 Tensor lse_cross_attn) override;

  // int32 [num_tokens] on the cache's device; a view that the next step overwrites.
  Tensor GetQueryPositions() override;

  // [num_layers, length, num_kv_heads, head_dim]. Setting refuses pages that forks share.
  void DebugGetKV(int64_t seq_id, int64_t start_pos, int64_t end_pos, Tensor k_data, Tensor v_data) override;
  void DebugSetKV(int64_t seq_id, int64_t start_pos, Tensor k_data, Tensor v_data) override;

  // Refused by name: unsupported.cc.
  Shape DisaggPrepareRecv(int64_t seq_id, int length) override;
  void DisaggMarkSend(int64_t seq_id, int64_t begin, const Shape& compressed_remote_position_map, int32_t recver_pe_offset) override;
  void AppendMLAKV(int64_t layer_id, Tensor kv_data) override;
  void DebugGetKVMLA(int64_t seq_id, int64_t start_pos, int64_t end_pos, Tensor kv_data) override;
  void LinearAttention(int64_t layer_id, Tensor q_data, Tensor k_data, Tensor v_data, double sm_scale) override;
  String GetCheckpointMetadata(int64_t seq_id) const;
  String GetLayoutHash() const;
  void ExportPageGroup(int64_t seq_id, int64_t group_id, Tensor dst);
  void PrepareImport(int64_t seq_id, String metadata_json);
  void ImportPageGroup(int64_t seq_id, int64_t group_id, Tensor src);
  void FinishImport(int64_t seq_id);

  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("tvm_infer.MLCPagedKVCache", MLCPagedKVCacheObj, tvm::runtime::vm::AttentionKVCacheObj);

 private:
  bool InForward() const;
  const Step& ActiveStep(const char* operation) const;  // throws CacheStateError
  void CheckLayer(const char* name, int64_t layer) const;
  int64_t Length(int64_t seq_id) const;         // tokens in the cache below
  int64_t VisibleLength(int64_t seq_id) const;  // without those that a window hides
  void CheckTrees(const std::vector<TokenTree>& trees) const;
  void SetMask(const std::vector<TokenTree>& trees, Step* step);
  void MaskedAttention(int64_t layer, TensorView q, TensorView k, TensorView v, double sm_scale, TensorView o);
  void SetPositions(const std::vector<TokenTree>& trees, Step* step) const;
  void SetCrossTurns(Step* step) const;
  void CheckParts(const char* operation, const char* name, int64_t layer) const;
  Tensor& Rotated(Tensor* tensor, int64_t heads) const;

  const Config config_;
  const Rope rope_;
  const InlineRope inline_rope_;
  const tvm::ffi::Any cache_;
  bool has_step_ = false;
  Step step_;
  SidePlans side_plans_;
  TokenTrees trees_;
  SequenceWindows windows_;
  Masks masks_;
  Tensor rotated_q_, rotated_k_;  // [max_tokens, heads, head_dim], where queries and keys are rotated; allocated at the first use
  Tensor positions_;              // int32 [max_tokens], allocated when first asked for
  bool has_positions_ = false;
};

}  // namespace tvm_infer::mlc
