// What an executor's works and merges cost: what plans for it are made with.
#pragma once

#include <cstdint>

#include "tvm_infer/schedule/plan.h"

namespace tvm_infer {

// What reading shared keys once costs beside its works and what merges of any kind cost (MergePrice in items.h), picoseconds, and what
// reading them again and again does. Measured.
struct SharedMergeCost {
  int64_t each;  // per merge of a row tile and KV head; all CTAs have equal parts of them
  int64_t once;  // per plan that shares: from the end of a tile's parts, which end together, to that of its merges
  // What keys that are not shared cost instead: thousandths of what works of the narrowest class, which wait for memory, pay for keys that
  // others have read before them. They come from the L2.
  int64_t again = 1000;
};

// A static table, by data types and head_dim.
struct TileCosts {
  const TileClass* classes;  // ascending in rows
  int32_t num_classes;
  SharedMergeCost shared_merge;
};

}  // namespace tvm_infer
