// Sequences whose contents somebody copies: out to other memory, back from it, or in from another cache.
#include <algorithm>
#include <limits>

#include "tvm_infer/error.h"
#include "tvm_infer/kv/cache_manager.h"
#include "tvm_infer/kv/reserve.h"

namespace tvm_infer::kv {

std::vector<int32_t> CacheManager::HeldPages(int64_t id) const {
  std::vector<int32_t> held;
  const std::vector<int32_t>& pages = Pages(id);
  std::copy_if(pages.begin(), pages.end(), std::back_inserter(held), [](int32_t page) { return page != kNoPage; });
  return held;
}

CacheManager::Gone CacheManager::GoneOf(int64_t id) const {
  const Sequence& sequence = sequences_[Find(id)];
  if (sequence.gone_begin == sequence.gone_end) return {};
  return {int64_t{sequence.gone_begin} * limits_.page_size, int64_t{sequence.gone_end} * limits_.page_size};
}

void CacheManager::CheckHere(int64_t id, const char* operation) const {
  const Sequence& sequence = sequences_[Find(id)];
  if (sequence.is_away) {
    TVM_INFER_THROW(CacheStateError) << operation << " of sequence " << id << ", which was swapped out with its " << sequence.length
                                     << " tokens; swap_in() it first, or remove it";
  }
}

void CacheManager::SendAway(int64_t id) {
  CheckIdle("swap_out");
  CheckHere(id, "swap_out");
  Sequence& sequence = sequences_[Find(id)];
  for (size_t i = sequence.pages.size(); i-- > 0;) {  // backwards: later pages are given up first
    if (sequence.pages[i] == kNoPage) continue;
    pool_.Release(sequence.pages[i]);
    sequence.pages[i] = kNoPage;
  }
  sequence.is_away = true;
}

void CacheManager::FetchBack(int64_t id) {
  CheckIdle("swap_in");
  Sequence& sequence = sequences_[Find(id)];
  if (!sequence.is_away) {
    TVM_INFER_THROW(CacheStateError) << "swap_in of sequence " << id << ", which was not swapped out: it is in the cache";
  }
  const auto num_pages = static_cast<int32_t>(sequence.pages.size());
  const int64_t needed = num_pages - (sequence.gone_end - sequence.gone_begin);
  if (needed > pool_.num_free()) ThrowNoRoom("swap_in", id, needed);
  for (int32_t i = 0; i < num_pages; ++i) {
    if (i < sequence.gone_begin || i >= sequence.gone_end) sequence.pages[i] = TakePage();
  }
  sequence.is_away = false;
}

void CacheManager::AddFilled(int64_t id, int64_t length, const Gone& gone, const int64_t* tokens, int64_t num_tokens, int64_t space) {
  CheckIdle("import_sequence");
  CheckNew(id, "id");
  const int32_t page_size = limits_.page_size;
  if (length < 0 || length > std::numeric_limits<int32_t>::max() || num_tokens > length) {
    TVM_INFER_THROW(ArgumentError) << "argument `length` of import_sequence is " << length << ", with " << num_tokens
                                   << " known tokens; it must be at least as many, and at most 2^31 - 1";
  }
  const bool has_gone = gone.end > gone.begin;
  if (has_gone && (gone.begin < 0 || gone.end > length || gone.begin % page_size != 0 || gone.end % page_size != 0)) {
    TVM_INFER_THROW(ArgumentError) << "argument `state` of import_sequence lacks positions " << gone.begin << " to " << gone.end - 1
                                   << " of " << length << ", which are no whole pages of this cache's " << page_size
                                   << " tokens; import it into a cache whose page_size divides both ends";
  }
  if (has_gone && (window_.FirstSeen(length) < gone.end || window_.num_sink > gone.begin)) {
    TVM_INFER_THROW(ArgumentError) << "argument `state` of import_sequence lacks positions " << gone.begin << " to " << gone.end - 1
                                   << ", which left the windows where it was exported; the next token here sees the first "
                                   << window_.num_sink << " and all from " << window_.FirstSeen(length)
                                   << " on. Import it into a cache of the same variants";
  }
  const auto begin = static_cast<int32_t>(gone.begin / page_size), end = has_gone ? static_cast<int32_t>(gone.end / page_size) : begin;
  const int32_t num_pages = NumPages(length);
  if (num_pages - (end - begin) > pool_.num_free()) ThrowNoRoom("import_sequence", id, num_pages - (end - begin));
  const int32_t slot = NewSlot();
  Sequence& sequence = sequences_[slot];
  Reserve2x(&sequence.pages, num_pages);
  if (prefixes_ != nullptr) Reserve2x(&sequence.tokens, num_tokens);
  slot_of_.emplace(id, slot);

  free_slots_.pop_back();
  sequence.id = id;
  sequence.length = static_cast<int32_t>(length);
  sequence.is_live = true;
  sequence.space = space;
  if (prefixes_ != nullptr) sequence.tokens.assign(tokens, tokens + num_tokens);
  for (int32_t i = 0; i < num_pages; ++i) sequence.pages.push_back(i >= begin && i < end ? kNoPage : TakePage());
  sequence.gone_begin = has_gone ? begin : 0;
  sequence.gone_end = has_gone ? end : 0;
}

void CacheManager::NoteFilled(int64_t id) {
  if (prefixes_ != nullptr) Index(&sequences_[Find(id)]);
}

void CacheManager::ThrowNoRoom(const char* operation, int64_t id, int64_t needed) const {
  TVM_INFER_THROW(OutOfPagesError) << operation << " of sequence " << id << " needs " << needed << " page" << (needed == 1 ? "" : "s")
                                   << " but " << pool_.num_free() << " of " << limits_.num_pages << " are free, " << limits_.page_size
                                   << " tokens a page: remove other sequences or swap them out first, or create the cache with more pages";
}

}  // namespace tvm_infer::kv
