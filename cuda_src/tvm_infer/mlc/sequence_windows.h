// Windows that single sequences have, as TVM's cache slides them: at the end of a step a sequence keeps its first keys (sinks) and its last
// ones, `size` together. The next step's tokens see those, and each other causally. Whoever asks is told of a sequence of `size` tokens.
//
// The cache below drops whole pages only. A sequence of `length` tokens there has its sinks at positions 0 … sink - 1, what is left of
// pages that leave from there to `first` (hidden, by a mask), and its window from `first` on.
#pragma once

#include <cstdint>
#include <unordered_map>

namespace tvm_infer::mlc {

struct SequenceWindow {
  int64_t size, sink;
  int64_t first;  // sink as long as nothing is hidden
  bool has_slid;  // keys behind the sinks have left, hidden or dropped with their pages

  int64_t num_hidden() const { return first - sink; }
};

// Of one sequence after a step.
struct Slide {
  int64_t first_page = 0, num_pages = 0;  // to be dropped
};

class SequenceWindows {
 public:
  // Throws ArgumentError for numbers that make no window, CacheStateError where the sequence has one.
  void Enable(int64_t seq_id, int64_t size, int64_t sink);
  const SequenceWindow* Find(int64_t seq_id) const;
  int64_t num_hidden(int64_t seq_id) const;
  // Slides to the end of a sequence of `length` tokens in the cache; the caller drops the pages.
  Slide SlideTo(int64_t seq_id, int64_t length, int64_t page_size);
  // Throws ArgumentError: tokens popped must be of the window; a fork ends within the sinks, as in TVM.
  void CheckPop(int64_t seq_id, int64_t length, int64_t n) const;
  void CheckFork(int64_t seq_id, int64_t length, int64_t position) const;
  void Forget(int64_t seq_id) { windows_.erase(seq_id); }
  void Clear() { windows_.clear(); }

 private:
  std::unordered_map<int64_t, SequenceWindow> windows_;
};

}  // namespace tvm_infer::mlc
