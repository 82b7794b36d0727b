// Which requests of a batch begin with the same keys: a forest, whose nodes are runs of requests in an order that has those of a subtree
// side by side (depth first). Plain structs: levels.h makes them from lists by hand, kv/shared_pages.h from page tables.
#pragma once

#include <cstdint>

namespace tvm_infer {

// Keys [0, kv_end) are the same in the lists of requests order[begin], …, order[end - 1].
struct SharedRun {
  int32_t begin;
  int32_t end;
  int32_t kv_end;
};

// Runs are nested or apart, and stand by ascending begin, then descending end: each before those within it, whose kv_end is larger.
struct SharedRuns {
  const int32_t* order;  // [num_requests]: a permutation of the requests
  const SharedRun* runs;
  int32_t num_runs = 0;
};

}  // namespace tvm_infer
