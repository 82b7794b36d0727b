#include "tvm_infer/kv/prefix_index.h"

#include <algorithm>
#include <bit>

namespace tvm_infer::kv {
namespace {

// The finaliser of SplitMix64: every bit of the input changes half of the output's.
uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

PrefixIndex::PrefixIndex(PagePool* pool, int32_t page_size)
    : pool_(pool),
      page_size_(page_size),
      nodes_(pool->num_pages()),
      births_(pool->num_pages(), 0),
      tokens_(static_cast<size_t>(pool->num_pages()) * page_size),
      buckets_(std::bit_ceil(static_cast<size_t>(pool->num_pages())), -1) {
  pool->WantPages();
}

uint32_t PrefixIndex::BucketOf(int64_t space, int32_t parent, const int64_t* block) const noexcept {
  uint64_t hash = Mix(static_cast<uint64_t>(space) + 0x9e3779b97f4a7c15u * (static_cast<uint64_t>(parent) + 2));
  for (int32_t i = 0; i < page_size_; ++i) hash = Mix(hash + 0x9e3779b97f4a7c15u + static_cast<uint64_t>(block[i]));
  return static_cast<uint32_t>(hash & (buckets_.size() - 1));
}

int32_t PrefixIndex::Find(int64_t space, int32_t parent, const int64_t* block) const noexcept {
  for (int32_t page = buckets_[BucketOf(space, parent, block)]; page >= 0; page = nodes_[page].next_in_bucket) {
    const Node& node = nodes_[page];
    if (node.parent == parent && node.space == space && std::equal(block, block + page_size_, tokens(page))) return page;
  }
  return -1;
}

void PrefixIndex::Insert(int64_t space, int32_t parent, const int64_t* block, int32_t page) noexcept {
  Node& node = nodes_[page];
  node = Node();
  node.space = space;
  node.parent = parent;
  node.bucket = BucketOf(space, parent, block);
  node.next_in_bucket = buckets_[node.bucket];
  buckets_[node.bucket] = page;
  if (parent >= 0) {
    node.next_sibling = nodes_[parent].first_child;
    if (node.next_sibling >= 0) nodes_[node.next_sibling].previous_sibling = page;
    nodes_[parent].first_child = page;
  }
  std::copy(block, block + page_size_, &tokens_[static_cast<size_t>(page) * page_size_]);
  pool_->Want(page);
  ++num_nodes_;
}

void PrefixIndex::RemoveLeaf(int32_t page) noexcept {
  const Node& node = nodes_[page];
  int32_t* link = &buckets_[node.bucket];
  while (*link != page) link = &nodes_[*link].next_in_bucket;
  *link = node.next_in_bucket;
  if (node.next_sibling >= 0) nodes_[node.next_sibling].previous_sibling = node.previous_sibling;
  if (node.previous_sibling >= 0) {
    nodes_[node.previous_sibling].next_sibling = node.next_sibling;
  } else if (node.parent >= 0) {
    nodes_[node.parent].first_child = node.next_sibling;
  }
  ++births_[page];
  --num_nodes_;
  pool_->Unwant(page);
}

// Leaf by leaf, without a stack.
void PrefixIndex::Remove(int32_t page) noexcept {
  for (int32_t at = page;;) {
    while (nodes_[at].first_child >= 0) at = nodes_[at].first_child;
    const int32_t parent = nodes_[at].parent;
    RemoveLeaf(at);
    if (at == page) return;
    at = parent;
  }
}

void PrefixIndex::Clear() noexcept {
  for (int32_t page = 0; page < pool_->num_pages(); ++page) {
    if (Has(page)) Remove(page);
  }
}

// Down from the oldest to one below which all have owners. (A page has none while its child has one where the parent's tokens were
// computed twice, or left a window.) Those below go out of the tree with it, and stay their owners'.
void PrefixIndex::Evict() noexcept {
  int32_t page = pool_->oldest_kept();
  for (int32_t child = nodes_[page].first_child; child >= 0;) {
    if (pool_->ref_count(child) > 0) {
      child = nodes_[child].next_sibling;
    } else {
      page = child;
      child = nodes_[page].first_child;
    }
  }
  const int32_t before = pool_->num_kept();
  Remove(page);
  stats_.evictions += before - pool_->num_kept();
}

}  // namespace tvm_infer::kv
