#include "tvm_infer/mlc/token_trees.h"

#include <tvm/ffi/error.h>

#include <algorithm>
#include <numeric>

#include "tvm_infer/mlc/config.h"

namespace tvm_infer::mlc {

void TokenTree::Add(int64_t parent) {
  is_chain = is_chain && parent == size() - 1;
  depths.push_back(parent < 0 ? 0 : depths[parent] + 1);
  parents.push_back(static_cast<int32_t>(parent));
}

void TokenTree::Shrink(int64_t new_size) {
  parents.resize(new_size);
  depths.resize(new_size);
  is_chain = true;
  for (int64_t node = 0; node < new_size; ++node) is_chain = is_chain && parents[node] == node - 1;
}

std::vector<int64_t> TokenTree::PathTo(int64_t node) const {
  std::vector<int64_t> path;
  for (; node >= 0; node = parents[node]) path.push_back(node);
  std::reverse(path.begin(), path.end());
  return path;
}

std::vector<TokenTree> TokenTrees::Grown(const Shape& seq_ids, const Shape& append_lengths, const Optional<Shape>& parents) const {
  if (!parents.has_value()) {
    for (int64_t id : seq_ids) CheckCommitted(id, "begin_forward without token_tree_parent_ptr");
    return {};
  }
  const Shape& all = parents.value();
  const int64_t num_tokens = std::accumulate(append_lengths.begin(), append_lengths.end(), int64_t{0});
  if (append_lengths.size() != seq_ids.size() || static_cast<int64_t>(all.size()) != num_tokens) {
    TVM_FFI_THROW(ArgumentError) << "argument `token_tree_parent_ptr` has " << all.size() << " entries and `append_lengths`, "
                                 << ShapeText(append_lengths) << " for " << seq_ids.size() << " sequences, adds up to " << num_tokens
                                 << "; it must have one for each new token";
  }
  std::vector<TokenTree> trees;
  const int64_t* parent = all.data();
  for (size_t i = 0; i < seq_ids.size(); ++i) {
    const TokenTree* begun = Find(seq_ids[i]);
    trees.push_back(begun == nullptr ? TokenTree{} : *begun);
    TokenTree& tree = trees.back();
    for (int64_t t = 0; t < append_lengths[i]; ++t, ++parent) {
      if (*parent < -1 || *parent >= tree.size()) {
        TVM_FFI_THROW(ArgumentError) << "argument `token_tree_parent_ptr` has " << *parent << " at entry " << parent - all.data()
                                     << ", node " << tree.size() << " of the tree of sequence " << seq_ids[i]
                                     << "; it must be a node before it, or -1 for the text before the tree: from -1 to " << tree.size() - 1;
      }
      tree.Add(*parent);
    }
  }
  return trees;
}

const TokenTree* TokenTrees::Find(int64_t seq_id) const {
  const auto found = trees_.find(seq_id);
  return found == trees_.end() ? nullptr : &found->second;
}

void TokenTrees::CheckCommitted(int64_t seq_id, const char* operation) const {
  const TokenTree* tree = Find(seq_id);
  if (tree == nullptr) return;
  TVM_FFI_THROW(CacheStateError) << "operation " << operation << " on sequence " << seq_id << ", which has a token tree of " << tree->size()
                                 << " nodes; say first which of them are accepted, by commit_accepted_token_tree_nodes";
}

void TokenTrees::Pop(int64_t seq_id, int64_t n) {
  const auto found = trees_.find(seq_id);
  if (found == trees_.end() || n == 0) return;
  if (n >= found->second.size()) {
    trees_.erase(found);
  } else {
    found->second.Shrink(found->second.size() - n);
  }
}

}  // namespace tvm_infer::mlc
