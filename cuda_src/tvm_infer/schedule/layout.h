// A layout: which CTA computes which heads of which items, and where KV is cut. See layout.cc for how it is found.
#pragma once

#include <cstdint>

#include "tvm_infer/schedule/items.h"
#include "tvm_infer/schedule/load_tree.h"
#include "tvm_infer/schedule/planner.h"
#include "tvm_infer/schedule/scratch_array.h"

namespace tvm_infer {

// A run of KV heads of an item on a CTA: one Work.
struct Placement {
  int32_t cta;
  int32_t kv_head_begin;  // counted from the item's
  int32_t num_kv_heads;
  int32_t partial;  // index of its Partial, or -1: it computes all keys of its item and writes final rows
};

struct Partial {
  int32_t kv_begin;
  int32_t kv_end;
  int32_t out;
  int32_t merge;
};

struct Layout {
  struct Range {
    int32_t begin, end;
  };
  ScratchArray<Placement> placements;
  ScratchArray<Range> of_item;  // placements of each item
  ScratchArray<Partial> partials;
  ScratchArray<Merge> merges;  // Partial::merge counts from Items::num_tree_merges on
  ScratchArray<int32_t> merge_indptr;
  ScratchArray<int32_t> merge_slots;
  int32_t num_placements, num_partials;
  int32_t num_merges, num_slots;  // beside those of tiles that share keys, which Forest writes
  int64_t num_partial_rows;
  int64_t makespan, total_cost;

  // Lays all items so that no CTA is loaded much above `target`, which is at least the mean load.
  //   may_cut  cut KV where a head fits nowhere. False is returned if a piece of one granule fits nowhere: the target is too low.
  //            Otherwise a head that fits nowhere goes on top of the least loaded CTA.
  //   whole    if given, a layout without cuts at the same target: up to the first head that fitted nowhere, this one is equal.
  bool Lay(const PlanParams& p, const Items& items, int64_t target, bool may_cut, const Layout* whole = nullptr);

 private:
  // Where laying stood when a head fitted nowhere for the first time: before this head of items.order[order_index].
  struct Misfit {
    int32_t order_index = -1, head = 0;
    int32_t num_placements = 0, first_of_item = 0;
    int32_t num_partials = 0, num_merges = 0, num_slots = 0;
    int64_t num_partial_rows = 0;
  };
  Misfit misfit_;
  ScratchArray<int64_t> misfit_load_;

  void Start(const PlanParams& p, const Items& items, int64_t target, const Layout* whole);
  void PlaceRun(const Items& items, int32_t item, int32_t cta, int32_t head, int32_t num_heads);
  void AddPartial(const Work& work, int32_t cta, int32_t head, int32_t num_heads, int64_t kv_begin, int64_t kv_end);
  void EndMerge(const Work& work, int32_t head, int32_t num_heads);
  bool CutHead(const PlanParams& p, const Items& items, int64_t target, int32_t item, int32_t head);
  void PlaceCutTiles(const PlanParams& p, const Items& items, int64_t target);
  void PlacePiece(const PlanParams& p, const Items& items, int32_t item);

  LoadTree tree_;
  ScratchArray<int64_t> load_;    // cost of the CTA's works so far
  ScratchArray<int64_t> filled_;  // the same, or the target where the CTA takes nothing more
  struct CutTileRuns {
    int32_t run;  // KV heads of one work; the same for all pieces, because a merge needs partials of equal rows and heads
    int32_t first_merge;
    int64_t first_row;  // partial row of piece 0, head 0; then pieces, heads, rows
  };
  ScratchArray<CutTileRuns> cut_runs_;
  int32_t first_merge_ = 0;  // number of merges[0]
};

// A run of heads may end because its CTA is full (not because all heads are placed) only while the CTA has more than
// target / 2^kRunCutsPerCta left; such a run takes more than half of what is left. So a CTA ends at most this many runs.
inline constexpr int kRunCutsPerCta = 8;
// Under a fixed split size a run of heads costs at most 1 / kRunsPerTarget of the target, unless a single head costs more.
inline constexpr int64_t kRunsPerTarget = 4;

// Upper bounds on any layout of `whole_items` items and `cut_items` more that are pieces of tiles cut at a fixed size.
struct LayoutBounds {
  int64_t placements, merges, partials;
  int64_t cut_partials;  // of the partials those of automatic cuts, but for each cut head's last one and its sinks
};
LayoutBounds BoundLayout(const PlanParams& p, int64_t whole_items, int64_t cut_items);

}  // namespace tvm_infer
