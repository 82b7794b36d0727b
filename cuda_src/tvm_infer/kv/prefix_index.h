// Which full pages hold which tokens, so that a sequence that begins with the tokens of another, or of one that is gone, shares its pages.
//
// A tree: a node is a page, and stands for its tokens and all those before it (its parent's, and so on up to a root, one for each
// namespace), since keys and values depend on them all. Nodes are found by a hash of parent and tokens, and tokens are then compared: equal
// hashes of unlike tokens cost a comparison and nothing else. A page is one node at most. Two sequences that filled pages with the same
// tokens at the same time have both; the first is in the tree, and the second's later pages hang below it.
//
// A page that is in the tree is wanted (page_pool.h): without owners it is kept until the pool needs it. Whoever would write into its
// slots calls Remove() first. All room is made by the constructor; nothing else allocates or throws.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "tvm_infer/kv/page_pool.h"

namespace tvm_infer::kv {

// What became of lookups (CacheManager::AddWithPrefix) since the index was made.
struct PrefixStats {
  int64_t lookups = 0, hits = 0;  // hits: lookups that found one page at least
  int64_t tokens_asked = 0, tokens_reused = 0;
  int64_t evictions = 0;  // pages given up because the pool needed them
};

class PrefixIndex {
 public:
  PrefixIndex(PagePool* pool, int32_t page_size);
  PrefixIndex(const PrefixIndex&) = delete;
  PrefixIndex& operator=(const PrefixIndex&) = delete;

  // A node that may have left the tree since: its page may be another node by now. page -1: the root of a namespace.
  struct Ref {
    int32_t page = -1;
    uint32_t birth = 0;
  };
  Ref RefTo(int32_t page) const { return {page, births_[page]}; }
  bool IsThere(const Ref& ref) const { return ref.page < 0 || (pool_->IsWanted(ref.page) && births_[ref.page] == ref.birth); }
  bool Has(int32_t page) const { return pool_->IsWanted(page); }
  int32_t parent(int32_t page) const { return nodes_[page].parent; }  // -1: a root

  // The page whose tokens are block[0 … page_size), below `parent` (-1: the root of `space`); -1: none.
  int32_t Find(int64_t space, int32_t parent, const int64_t* block) const noexcept;
  // Makes `page`, which has an owner and is in no tree, the node that Find() does not find.
  void Insert(int64_t space, int32_t parent, const int64_t* block, int32_t page) noexcept;
  // Takes a page out, with all below it, which can no longer be found. Those without owners become free.
  void Remove(int32_t page) noexcept;
  void Clear() noexcept;
  // Makes one page free at least: the one that had no owner for longest, or one below it: pages that others stand on go last. There must be
  // a kept page.
  void Evict() noexcept;

  int32_t num_nodes() const { return num_nodes_; }
  PrefixStats& stats() { return stats_; }
  const PrefixStats& stats() const { return stats_; }
  const int64_t* tokens(int32_t page) const { return &tokens_[static_cast<size_t>(page) * page_size_]; }
  int64_t space(int32_t page) const { return nodes_[page].space; }

 private:
  struct Node {
    int64_t space = 0;
    int32_t parent = -1, first_child = -1, next_sibling = -1, previous_sibling = -1;
    int32_t next_in_bucket = -1;
    uint32_t bucket = 0;
  };
  uint32_t BucketOf(int64_t space, int32_t parent, const int64_t* block) const noexcept;
  void RemoveLeaf(int32_t page) noexcept;

  PagePool* pool_;
  int32_t page_size_, num_nodes_ = 0;
  std::vector<Node> nodes_;       // [num_pages]
  std::vector<uint32_t> births_;  // [num_pages]: how often the page left the tree
  std::vector<int64_t> tokens_;   // [num_pages, page_size]
  std::vector<int32_t> buckets_;  // first page of each, a power of two
  PrefixStats stats_;
};

}  // namespace tvm_infer::kv
