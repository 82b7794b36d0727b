// Which keys the queries of a sequence may see, as far as pages depend on it: everything about windows that the bookkeeping asks.
#pragma once

#include <algorithm>
#include <cstdint>

namespace tvm_infer::kv {

// A query at position p sees keys from FirstSeen(p) on, and the first num_sink keys besides. FirstSeen never falls as p grows: what is
// hidden from one query is hidden from all later ones.
struct KeyWindow {
  int32_t left = -1;     // keys before a query's own that it sees; -1: all of them
  int32_t num_sink = 0;  // keys from position 0 on that every query sees

  bool is_bounded() const { return left >= 0; }
  int64_t FirstSeen(int64_t position) const { return is_bounded() ? std::max<int64_t>(0, position - left) : 0; }
  friend bool operator==(const KeyWindow&, const KeyWindow&) = default;
};

// What the queries of two layers see between them.
inline KeyWindow Union(const KeyWindow& a, const KeyWindow& b) {
  const int32_t left = a.is_bounded() && b.is_bounded() ? std::max(a.left, b.left) : -1;
  return {left, std::max(a.num_sink, b.num_sink)};
}

}  // namespace tvm_infer::kv
