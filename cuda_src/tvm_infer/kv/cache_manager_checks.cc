// What can be wrong with a call, said in full; and the state as integers, for tests.
#include <algorithm>
#include <sstream>
#include <utility>

#include "tvm_infer/error.h"
#include "tvm_infer/kv/cache_manager.h"

namespace tvm_infer::kv {
namespace {

constexpr size_t kNamedIds = 8;          // known ids that an error lists
constexpr size_t kNamedSuggestions = 4;  // sequences whose removal an error suggests

}  // namespace

int32_t CacheManager::Find(int64_t id) const {
  const auto it = slot_of_.find(id);
  if (it == slot_of_.end()) ThrowUnknown(id);
  return it->second;
}

std::vector<int64_t> CacheManager::Ids() const {
  std::vector<int64_t> ids;
  ids.reserve(slot_of_.size());
  for (const auto& [id, slot] : slot_of_) ids.push_back(id);
  std::sort(ids.begin(), ids.end());
  return ids;
}

void CacheManager::ThrowUnknown(int64_t id) const {
  const std::vector<int64_t> ids = Ids();
  std::ostringstream known;
  for (size_t i = 0; i < std::min(ids.size(), kNamedIds); ++i) known << (i ? ", " : ": ") << ids[i];
  if (ids.size() > kNamedIds) known << ", …";
  TVM_INFER_THROW(UnknownSequenceError) << "sequence " << id << " is not in the cache, which holds " << ids.size() << " sequence"
                                        << (ids.size() == 1 ? "" : "s") << known.str() << ". Add it first";
}

void CacheManager::CheckNew(int64_t id, const char* argument) const {
  if (Has(id)) {
    TVM_INFER_THROW(UnknownSequenceError) << "argument `" << argument << "` is " << id << ", a sequence that the cache holds already ("
                                          << Length(id) << " tokens); remove it first or take another id";
  }
}

void CacheManager::CheckIdle(const char* operation) const {
  if (in_forward_) {
    TVM_INFER_THROW(CacheStateError) << operation << "() was called within a step of " << step_.num_requests() << " sequences and "
                                     << step_.num_tokens() << " tokens; call end_forward() (or cancel_forward()) first";
  }
}

void CacheManager::CheckStep(const int64_t* append_lengths, int64_t num_requests) const {
  if (num_requests > limits_.max_batch) {
    TVM_INFER_THROW(ArgumentError) << "argument `ids` names " << num_requests
                                   << " sequences; a step of this cache has at most max_batch = " << limits_.max_batch
                                   << ". Take several steps, or create the cache with a larger max_batch";
  }
  int64_t num_tokens = 0;
  for (int64_t i = 0; i < num_requests; ++i) {
    // Negative lengths get their own message; stopping at the limit keeps the sum from overflowing.
    if (append_lengths[i] > 0) num_tokens += std::min<int64_t>(append_lengths[i], int64_t{1} << 32);
  }
  if (num_tokens > limits_.max_tokens) {
    TVM_INFER_THROW(ArgumentError) << "argument `append_lengths` adds up to " << num_tokens
                                   << " tokens; a step of this cache has at most max_tokens = " << limits_.max_tokens
                                   << ". Prefill in chunks, or create the cache with a larger max_tokens";
  }
}

void CacheManager::ThrowOutOfPages(const Growth& growth) const {
  const int64_t needed = growth.new_pages + growth.copies;
  // Pages that only this sequence owns: what its removal gives back.
  std::vector<std::pair<int64_t, int64_t>> freed;  // (pages, id)
  for (const Sequence& sequence : sequences_) {
    if (!sequence.is_live) continue;
    const int64_t sole =
        std::count_if(sequence.pages.begin(), sequence.pages.end(), [&](int32_t p) { return p != kNoPage && pool_.ref_count(p) == 1; });
    if (sole > 0) freed.emplace_back(sole, sequence.id);
  }
  std::sort(freed.begin(), freed.end(),
            [](const auto& a, const auto& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; });

  std::ostringstream remedy;
  for (size_t i = 0; i < std::min(freed.size(), kNamedSuggestions); ++i) {
    remedy << (i ? ", of " : "remove() of ") << "sequence " << freed[i].second << " frees " << freed[i].first << " page"
           << (freed[i].first == 1 ? "" : "s");
  }
  if (freed.empty()) {
    remedy << (pool_.num_used() == 0 ? "append fewer tokens" : "all pages are shared: only removing every fork of a sequence frees some");
  } else {
    remedy << " (pop() and truncate() free them from the end)";
  }
  TVM_INFER_THROW(OutOfPagesError) << "begin_forward needs " << needed << " page" << (needed == 1 ? "" : "s") << " (" << growth.new_pages
                                   << " for new tokens, " << growth.copies << " to copy shared pages) but "
                                   << pool_.num_free() + growth.freed << " of " << limits_.num_pages << " are free"
                                   << (growth.freed > 0 ? ", those that leave windows in this step counted, " : ", ") << limits_.page_size
                                   << " tokens a page: " << remedy.str() << "; or create the cache with more pages";
}

std::vector<int64_t> CacheManager::DumpState() const {
  std::vector<int64_t> state = {limits_.page_size, limits_.num_pages, in_forward_, num_sequences(), pool_.num_free()};
  state.insert(state.end(), pool_.free_pages().begin(), pool_.free_pages().end());
  for (int32_t page = 0; page < limits_.num_pages; ++page) state.push_back(pool_.ref_count(page));
  for (int64_t id : Ids()) {
    const Sequence& sequence = sequences_[slot_of_.at(id)];
    state.insert(state.end(), {id, sequence.length, static_cast<int64_t>(sequence.pages.size())});
    state.insert(state.end(), sequence.pages.begin(), sequence.pages.end());
  }
  return state;
}

}  // namespace tvm_infer::kv
