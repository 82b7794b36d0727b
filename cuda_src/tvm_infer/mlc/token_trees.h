// Token trees of speculative decoding: which node is whose child, from the step that appends nodes until the accepted ones are committed.
//
// A tree's nodes are a sequence's last tokens, in order; the parent of a node is a node before it, or -1 for the text before the tree.
// Steps that follow one another may grow one tree.
#pragma once

#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/optional.h>

#include <cstdint>
#include <unordered_map>
#include <vector>

namespace tvm_infer::mlc {

struct TokenTree {
  std::vector<int32_t> parents, depths;  // [nodes]; a root has parent -1 and depth 0
  bool is_chain = true;                  // every node is the child of the one before it: attention is causal

  int64_t size() const { return static_cast<int64_t>(parents.size()); }
  void Add(int64_t parent);
  void Shrink(int64_t new_size);
  std::vector<int64_t> PathTo(int64_t node) const;  // its ancestors, from a root on, and itself; none for -1
};

class TokenTrees {
 public:
  // The trees of a step's sequences after it: `parents` of all new nodes one after the other; none where the step has no trees. Throws
  // ArgumentError for what is no tree, CacheStateError where there are no parents and a sequence has a tree that waits for its commit.
  std::vector<TokenTree> Grown(const tvm::ffi::Shape& seq_ids, const tvm::ffi::Shape& append_lengths,
                               const tvm::ffi::Optional<tvm::ffi::Shape>& parents) const;
  void Set(int64_t seq_id, TokenTree tree) { trees_[seq_id] = std::move(tree); }
  const TokenTree* Find(int64_t seq_id) const;
  // Throws CacheStateError where the sequence has a tree that waits for its commit.
  void CheckCommitted(int64_t seq_id, const char* operation) const;
  // The sequence's last n tokens are gone.
  void Pop(int64_t seq_id, int64_t n);
  void Forget(int64_t seq_id) { trees_.erase(seq_id); }
  void Clear() { trees_.clear(); }

 private:
  std::unordered_map<int64_t, TokenTree> trees_;
};

}  // namespace tvm_infer::mlc
