// Windows: pages that no token can see any more go back to the pool.
#include <algorithm>
#include <string>

#include "tvm_infer/error.h"
#include "tvm_infer/kv/cache_manager.h"

namespace tvm_infer::kv {

// One run of entries for each sequence: behind it pages are needed, before it are the sinks' pages. (Sinks that a later window no longer
// has keep theirs.)
CacheManager::Entries CacheManager::Leaving(const Sequence& sequence) const {
  const bool has_gone = sequence.gone_end > sequence.gone_begin;
  const int32_t begin = has_gone ? sequence.gone_end : NumPages(window_.num_sink);
  const auto end = static_cast<int32_t>(window_.FirstSeen(sequence.length) / limits_.page_size);
  return {begin, std::max(begin, end)};
}

void CacheManager::MeasureLeavers(Growth* growth) const {
  if (!window_.is_bounded()) return;
  Scratch& s = scratch_;
  size_t num_leaving = 0;
  for (int32_t slot : s.slots) num_leaving += Leaving(sequences_[slot]).size();
  if (num_leaving > s.left.capacity()) s.left.reserve(std::max(num_leaving, 2 * s.left.capacity()));
  for (int32_t slot : s.slots) {
    const Sequence& sequence = sequences_[slot];
    const Entries leaving = Leaving(sequence);
    for (int32_t i = leaving.begin; i < leaving.end; ++i) {
      const int32_t page = sequence.pages[i];
      if (s.leavers[page]++ == 0) s.left.push_back(page);
      if (s.leavers[page] == pool_.ref_count(page)) ++growth->freed;
    }
  }
}

void CacheManager::GiveBack() noexcept {
  if (!window_.is_bounded()) return;
  for (int32_t slot : scratch_.slots) {
    Sequence& sequence = sequences_[slot];
    const Entries leaving = Leaving(sequence);
    if (leaving.size() == 0) continue;
    for (int32_t i = leaving.begin; i < leaving.end; ++i) {
      pool_.Release(sequence.pages[i]);
      sequence.pages[i] = kNoPage;
    }
    if (sequence.gone_end == sequence.gone_begin) sequence.gone_begin = leaving.begin;
    sequence.gone_end = leaving.end;
  }
}

void CacheManager::SetWindow(const KeyWindow& window) {
  CheckIdle("set_window");
  CheckWindow(window);
  window_ = window;
}

void CacheManager::CheckWindow(const KeyWindow& window) const {
  for (const Sequence& sequence : sequences_) {
    if (!sequence.is_live || sequence.gone_end == sequence.gone_begin) continue;
    const int64_t gone_begin = int64_t{sequence.gone_begin} * limits_.page_size, gone_end = int64_t{sequence.gone_end} * limits_.page_size;
    const char* const remedy = " Remove the sequence and prefill it again, or set windows before its first step";
    if (window.num_sink > gone_begin) {
      TVM_INFER_THROW(ArgumentError) << "argument `num_sink` is " << window.num_sink << ", but sequence " << sequence.id
                                     << " gave back positions " << gone_begin << " to " << gone_end - 1
                                     << ", which its window hid; it must be at most " << gone_begin << '.' << remedy;
    }
    if (window.FirstSeen(sequence.length) < gone_end) {
      const std::string limit = window.chunk > 0 ? "" : "; it must be from 0 to " + std::to_string(sequence.length - gone_end);
      TVM_INFER_THROW(ArgumentError) << "argument `" << (window.chunk > 0 ? "chunk` is " : "window_left` is ")
                                     << (window.chunk > 0 ? window.chunk : window.left) << ", with which the next token of sequence "
                                     << sequence.id << " sees positions from " << window.FirstSeen(sequence.length) << " on, but "
                                     << gone_begin << " to " << gone_end - 1 << " left the window that it had and were given back" << limit
                                     << '.' << remedy;
    }
  }
}

// A sequence of new_length tokens goes on: does it find the keys that its next token sees?
void CacheManager::CheckReach(const Sequence& sequence, int64_t new_length, const char* argument, int64_t value) const {
  const int64_t gone_begin = int64_t{sequence.gone_begin} * limits_.page_size, gone_end = int64_t{sequence.gone_end} * limits_.page_size;
  if (gone_begin == gone_end || new_length <= gone_begin || window_.FirstSeen(new_length) >= gone_end) return;
  int64_t least = gone_end;  // that would do
  for (int64_t high = sequence.length; least < high;) {
    const int64_t middle = least + (high - least) / 2;
    if (window_.FirstSeen(middle) >= gone_end) {
      high = middle;
    } else {
      least = middle + 1;
    }
  }
  TVM_INFER_THROW(ArgumentError) << "argument `" << argument << "` is " << value << ", which leaves " << new_length
                                 << " tokens of sequence " << sequence.id << ": the next one sees positions from "
                                 << window_.FirstSeen(new_length) << " on, but " << gone_begin << " to " << gone_end - 1
                                 << " left the window and were given back; at least " << least << " of its " << sequence.length
                                 << " tokens must stay, or at most " << gone_begin;
}

int64_t CacheManager::PeakPages(int64_t length, int64_t max_append) const {
  const int64_t page = limits_.page_size, all = (length + page - 1) / page;
  if (!window_.is_bounded() || length == 0) return all;
  const int64_t tokens = window_.max_left() + std::max<int64_t>(1, std::min(max_append, length));  // that a step reads or writes
  return std::min(all, NumPages(window_.num_sink) + (tokens + page - 2) / page + 1);
}

}  // namespace tvm_infer::kv
