// Which of the keys that requests share are read once for all, and the items that come of it.
//
// A shared run (shared_runs.h) is used where the cost model says that it pays. Its rows, those of all its requests, are tiles of their own,
// each made of whole row tiles of requests, so that these still merge one by one: a row's partials are those of the used runs around it,
// outermost first, then its request's own keys.
#pragma once

#include <cstdint>

#include "tvm_infer/schedule/items.h"
#include "tvm_infer/schedule/layout.h"
#include "tvm_infer/schedule/scratch_array.h"
#include "tvm_infer/schedule/shared_runs.h"

namespace tvm_infer {

class Forest {
 public:
  // Decides which runs are used; false: none is. The batch was checked (Items::Check).
  bool Build(const PlanParams& p, const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests, const SharedRuns& shared);
  // Items of the batch: shared ones first, then those of requests. Not sorted.
  void MakeItems(const PlanParams& p, Items* items) const;

  // Row tiles that merge what shared works computed for them. Their merges are of one KV head each: tile t, head h is number
  // t * num_kv_heads + h, before all other merges of the plan.
  int32_t num_merge_tiles() const { return num_merge_tiles_; }
  int32_t num_levels() const { return num_levels_; }
  int32_t num_shared_items() const { return num_shared_items_; }
  // int32[num_tokens], or nullptr: slots of the row index are tokens.
  const int32_t* token_order() const { return has_order_ ? token_order_.data() : nullptr; }
  int64_t flat_cost() const { return flat_cost_; }      // of all requests' tiles with all their keys, one KV head
  int64_t merge_price() const { return merge_price_; }  // of merging each tile once, one KV head
  // Of the shared keys that a flat plan's works of the narrowest class would read after another has, one KV head.
  int64_t reread_cost() const { return reread_cost_; }

  int64_t CountSlots(const Items& items, const Layout& layout, int32_t num_kv_heads);
  // Merges of the tiles, int32[num_merge_tiles * num_kv_heads + 1] ends of their slots, and the slots. After CountSlots of the same.
  void WriteMerges(const Items& items, const Layout& layout, int32_t num_kv_heads, Merge* merges, int32_t* merge_indptr,
                   int32_t* merge_slots);

 private:
  // A row tile of a request, rows as in the plan's row index.
  struct Tile {
    int32_t row_begin, num_rows;
    int32_t request, kv_len;
    int32_t first_position;
    int32_t tile_class;
    int32_t kv_begin;  // of its own keys: behind the innermost used run
    int32_t merge;     // its number among those that merge, or -1
  };
  struct Run {
    int32_t first_tile, end_tile;
    int32_t parent;    // or -1
    int32_t kv_begin;  // behind the innermost used run around it
    int32_t kv_end;
    int32_t max_end;   // keys that each of its requests has beside one of its own
    int32_t depth;     // used runs around it, itself included
    int32_t max_rows;  // of its tiles, if it is used
    bool is_used;
    int64_t key_cost;  // of a key that is read by the tiles within, or by used runs within
  };
  struct Packed {
    int32_t end_tile, num_rows;
  };
  struct MergeTile {
    int32_t row_begin, num_rows;
  };
  struct Piece {
    int32_t out, head;
  };

  void MakeTiles(const PlanParams& p, const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests, const SharedRuns& shared);
  void PlaceRuns(const PlanParams& p, const SharedRuns& shared, int32_t num_requests);
  Packed Pack(int32_t max_rows, int32_t first_tile, int32_t end_tile) const;
  int64_t SharedCost(const PlanParams& p, const Run& run, int32_t max_rows, int64_t num_keys, int64_t* key_cost) const;
  void ChooseRun(const PlanParams& p, Run* run) const;
  bool ChooseRuns(const PlanParams& p);
  void CutTiles(const PlanParams& p);

  ScratchArray<Tile> tiles_;
  ScratchArray<int32_t> first_tile_;  // [num_requests + 1], by place in the order
  ScratchArray<int32_t> run_of_;      // [num_requests]: the innermost run, or -1
  ScratchArray<Run> runs_;
  ScratchArray<int32_t> open_;
  ScratchArray<int32_t> token_order_;
  ScratchArray<MergeTile> merge_tiles_;  // by number
  ScratchArray<Piece> pieces_;           // of an item
  ScratchArray<int32_t> of_head_;        // pieces of each head of an item
  ScratchArray<int32_t> cursor_;         // of each merge
  int32_t num_tiles_ = 0, num_places_ = 0, num_runs_ = 0, num_merge_tiles_ = 0, num_levels_ = 0, num_shared_items_ = 0;
  int32_t max_pieces_ = 0;  // of an item of several tiles, all heads
  bool has_order_ = false, has_end_ = false;
  int64_t flat_cost_ = 0, merge_price_ = 0, reread_cost_ = 0;
};

}  // namespace tvm_infer
