#include "tvm_infer/mlc/sequence_windows.h"

#include <tvm/ffi/error.h>

#include <algorithm>

namespace tvm_infer::mlc {

void SequenceWindows::Enable(int64_t seq_id, int64_t size, int64_t sink) {
  if (size < 1) {
    TVM_FFI_THROW(ArgumentError) << "argument `sliding_window_size` is " << size << " for sequence " << seq_id << "; it must be at least 1";
  }
  if (sink < 0 || sink >= size) {
    TVM_FFI_THROW(ArgumentError) << "argument `attn_sink_size` is " << sink << " for sequence " << seq_id << "; it must be from 0 to "
                                 << size - 1 << ", less than sliding_window_size = " << size << ", which counts it";
  }
  if (Find(seq_id) != nullptr) {
    TVM_FFI_THROW(CacheStateError) << "operation enable_sliding_window_for_seq on sequence " << seq_id << ", which has a window of "
                                   << Find(seq_id)->size << " tokens already; a sequence gets one once";
  }
  windows_[seq_id] = {size, sink, sink, false};
}

const SequenceWindow* SequenceWindows::Find(int64_t seq_id) const {
  const auto found = windows_.find(seq_id);
  return found == windows_.end() ? nullptr : &found->second;
}

int64_t SequenceWindows::num_hidden(int64_t seq_id) const {
  const SequenceWindow* window = Find(seq_id);
  return window == nullptr ? 0 : window->num_hidden();
}

Slide SequenceWindows::SlideTo(int64_t seq_id, int64_t length, int64_t page_size) {
  const auto found = windows_.find(seq_id);
  if (found == windows_.end()) return {};
  SequenceWindow& window = found->second;
  const int64_t leaving = std::max<int64_t>(0, length - window.num_hidden() - window.size);
  window.first += leaving;
  window.has_slid |= leaving > 0;
  Slide slide{(window.sink + page_size - 1) / page_size, 0};
  slide.num_pages = std::max<int64_t>(0, window.first / page_size - slide.first_page);
  window.first -= slide.num_pages * page_size;
  return slide;
}

void SequenceWindows::CheckPop(int64_t seq_id, int64_t length, int64_t n) const {
  const SequenceWindow* window = Find(seq_id);
  if (window == nullptr || !window->has_slid || n <= length - window->first) return;
  TVM_FFI_THROW(ArgumentError) << "argument `n` of popn is " << n << " but sequence " << seq_id << " has " << length - window->first
                               << " tokens behind its " << window->sink << " sinks, and those between have left its window of "
                               << window->size << "; it must be from 0 to " << length - window->first;
}

void SequenceWindows::CheckFork(int64_t seq_id, int64_t length, int64_t position) const {
  const SequenceWindow* window = Find(seq_id);
  if (window == nullptr || (position >= 0 && position <= window->sink)) return;
  TVM_FFI_THROW(ArgumentError) << "argument `fork_pos` is " << position << " but sequence " << seq_id << " of "
                               << length - window->num_hidden() << " tokens has a window of " << window->size
                               << ", and can be forked within its sinks only; it must be from 0 to " << window->sink;
}

}  // namespace tvm_infer::mlc
