// Which keys the queries of a sequence may see, as far as pages depend on it: everything about windows that the bookkeeping asks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace tvm_infer::kv {

// A query at position p sees keys from FirstSeen(p) on, and the first num_sink keys besides. FirstSeen never falls as p grows: what is
// hidden from one query is hidden from all later ones.
struct KeyWindow {
  int32_t left = -1;     // keys before a query's own that it sees; -1: all of them
  int32_t num_sink = 0;  // keys from position 0 on that every query sees
  int32_t chunk = 0;     // of positions: a query sees no key of a chunk before its own; 0: there are none

  bool is_bounded() const { return left >= 0 || chunk > 0; }
  int64_t FirstSeen(int64_t position) const {
    const int64_t of_window = left >= 0 ? std::max<int64_t>(0, position - left) : 0;
    return chunk > 0 ? std::max(of_window, position / chunk * chunk) : of_window;
  }
  // Keys before its own that a query sees at most.
  int32_t max_left() const {
    const int32_t of_window = left >= 0 ? left : std::numeric_limits<int32_t>::max();
    return chunk > 0 ? std::min(of_window, chunk - 1) : of_window;
  }
  friend bool operator==(const KeyWindow&, const KeyWindow&) = default;
};

// A window in which the queries of two layers see what they see, as narrow as one can say it.
inline KeyWindow Union(const KeyWindow& a, const KeyWindow& b) {
  const int32_t num_sink = std::max(a.num_sink, b.num_sink);
  if (a.chunk == b.chunk) return {a.left < 0 || b.left < 0 ? -1 : std::max(a.left, b.left), num_sink, a.chunk};
  if (!a.is_bounded() || !b.is_bounded()) return {-1, num_sink, 0};
  return {std::max(a.max_left(), b.max_left()), num_sink, 0};
}

}  // namespace tvm_infer::kv
