// Items: the units that a plan lays onto CTAs. An item is a row tile of one request with the keys it sees, or one piece of these keys
// where a fixed split size cuts them; or (forest.h) a tile of rows of several requests with keys that they share. All KV heads of an item
// cost the same, so it stands for num_kv_heads equal works, or it is of one head where each has a list of its own. Sinks that lie apart
// from the other keys are a second work of each head, and a piece of their own under a fixed split size.
#pragma once

#include <algorithm>
#include <cstdint>

#include "tvm_infer/schedule/planner.h"
#include "tvm_infer/schedule/scratch_array.h"

namespace tvm_infer {

// Lengths, as of Planner::Plan or, where every KV head of a request has keys of its own, as of Planner::PlanHeadLists.
struct Batch {
  const int32_t* qo_indptr;  // [num_requests + 1]
  const int32_t* kv_len;     // [num_requests * lists_per_request]
  int32_t num_requests;
  int32_t lists_per_request = 1;  // or num_kv_heads

  int32_t num_tokens() const { return qo_indptr[num_requests]; }
  int32_t num_lists() const { return num_requests * lists_per_request; }
};

// What the items of a batch with a list for each KV head are made and laid with: every item is of one head.
inline PlanParams OfOneHead(PlanParams p) {
  p.num_qo_heads /= p.num_kv_heads;
  p.num_kv_heads = 1;
  return p;
}

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Keys that a work is charged for: its last tile is computed whole. Without a division where a tile has a power of two of them, as those of
// executors have; else in 32 bits, where both fit: a division of 64 takes three times as long.
inline int64_t ChargedKeys(const TileClass& t, int64_t num_keys) {
  const auto granule = static_cast<uint32_t>(t.kv_granule);
  const uint32_t up = static_cast<uint32_t>(num_keys) + granule - 1;
  return (granule & (granule - 1)) == 0 ? up & ~(granule - 1) : int64_t{up / granule} * granule;
}
// Of one work and KV head. At least 1 ps, so that a CTA with work is never the least loaded for free.
inline int64_t CostOf(const TileClass& t, int64_t overhead, int64_t num_keys) {
  return std::max<int64_t>(1, overhead + t.kv * ChargedKeys(t, num_keys));
}

// What merging the pieces of a work costs whoever arrives last: half a work's fixed cost, and 60 ns for each row beyond 16.
// (Batches of few works, where cutting tiles of 128 rows promised 5 of 13 us, took 28 us when the rows were merged for free.)
inline int64_t MergePrice(const TileClass& t, int32_t num_rows) {
  constexpr int64_t kRow = 60'000, kFreeRows = 16;
  return t.fixed / 2 + kRow * std::max<int64_t>(0, num_rows - kFreeRows);
}

// A tile that fixed_split_size cuts: its pieces are the items [first_item, first_item + num_pieces).
struct CutTile {
  int32_t first_item;
  int32_t num_pieces;
  int64_t max_cost;  // of a piece, one KV head
};

// The first class that holds `num_rows` rows, else the last.
inline int32_t ClassOf(const PlanParams& p, int64_t num_rows) {
  int32_t c = 0;
  while (c + 1 < p.num_tile_classes && p.tile_classes[c].rows < num_rows) ++c;
  return c;
}

// Keys that some row of a tile sees: [begin, end), and sinks [0, sink) that do not touch these. All 0 for rows that see nothing.
struct SeenKeys {
  int32_t sink;
  int32_t begin;
  int32_t end;
};
// Rows at positions first … last, of a request of `kv` keys. With each position the band moves on or stays, so that what one of the rows
// sees besides the sinks is one range: from where the first begins to where the last ends.
inline SeenKeys KeysSeen(const MaskBand& band, int64_t first, int64_t last, int64_t kv) {
  int64_t begin = band.left == kUnbounded ? 0 : std::max<int64_t>(0, first - band.left);
  int64_t end = band.right == kUnbounded ? kv : std::min<int64_t>(kv, last + band.right + 1);
  const int64_t sink = std::min<int64_t>(band.num_sink, end);
  if (band.chunk > 0) {
    begin = std::max(begin, first / band.chunk * band.chunk);
    end = std::min(end, (last / band.chunk + 1) * band.chunk);
  }
  if (begin >= end) return {0, 0, 0};
  if (sink < begin) return {static_cast<int32_t>(sink), static_cast<int32_t>(begin), static_cast<int32_t>(end)};
  return {0, 0, static_cast<int32_t>(std::max(sink, end))};
}

struct Items {
  // Everything but how many heads, from kv_head_begin on; `merge` is the index of the item's cut tile, with merge_tiles > 0 its first tile
  // that merges, or kNoMerge.
  ScratchArray<Work> work;
  ScratchArray<int64_t> cost;   // of one KV head, >= 1; its sinks included
  ScratchArray<int32_t> sink;   // keys [0, sink) are the item's too, in a work apart; 0: none
  ScratchArray<int32_t> order;  // longest first
  ScratchArray<CutTile> cut_tiles;
  int32_t count, num_cut_tiles, num_cut_items;
  int32_t num_tree_merges;  // of tiles that share keys (forest.h): the first merges of the plan, known before any is laid
  int64_t total_cost;       // one KV head of every item
  int64_t max_cost;
  // Over the tile classes in use: what a piece costs before its first key (sinks are such a cost of an item's first), what a granule of
  // keys costs, what a merge costs.
  int64_t max_overhead, max_granule_cost, max_merge;

  // Checks lengths (ArgumentError naming the index); returns how many items Build makes at most.
  static int64_t Check(const PlanParams& p, const Batch& batch);
  // Makes the items of a batch that was checked, in the order of requests, lists, tiles, keys, and sorts them.
  void Build(const PlanParams& p, const Batch& batch, int64_t max_items);

  // The same step by step: at most max_items, whole.
  void Start(const PlanParams& p, int64_t max_items);
  void AddShared(const PlanParams& p, const Work& tile);
  void Sort();

 private:
  [[gnu::always_inline]] void AddTilesOf(const PlanParams& p, const Batch& batch, int32_t group, int32_t request, int32_t lists,
                                         int32_t list);
  [[gnu::always_inline]] void AddTile(const PlanParams& p, const Work& tile, int32_t tile_sink);  // a quarter of planning otherwise
  void AddPieces(const PlanParams& p, const Work& tile, int32_t tile_sink);
  int64_t AddPiecesOf(const PlanParams& p, const Work& tile, int32_t begin, int32_t end);
  ScratchArray<int32_t> order_tmp_;
  ScratchArray<uint16_t> sort_key_;
};

// What an item's sinks cost, of one KV head: a work of their own, with its overhead.
inline int64_t SinkCost(const TileClass& t, int32_t num_rows, int32_t num_sink) {
  return num_sink == 0 ? 0 : CostOf(t, t.fixed + t.row * num_rows, num_sink);
}

inline void Items::AddTile(const PlanParams& p, const Work& tile, int32_t tile_sink) {
  const TileClass& t = p.tile_classes[tile.tile_class];
  const int64_t overhead = t.fixed + t.row * tile.num_rows;
  const int64_t sink_cost = SinkCost(t, tile.num_rows, tile_sink);
  max_overhead = std::max(max_overhead, overhead + sink_cost);
  const int64_t c = CostOf(t, overhead, tile.kv_end - tile.kv_begin) + sink_cost;
  work[count] = tile;
  sink[count] = tile_sink;
  cost[count++] = c;
  total_cost += c;
  max_cost = std::max(max_cost, c);
}

inline void Items::AddShared(const PlanParams& p, const Work& tile) {
  const TileClass& t = p.tile_classes[tile.tile_class];
  max_granule_cost = std::max(max_granule_cost, t.kv * t.kv_granule);
  // One that shares keys merges anyway: a piece more costs little.
  max_merge = std::max(max_merge, MergePrice(t, tile.merge_tiles > 0 ? 0 : tile.num_rows));
  AddTile(p, tile, 0);
}

// At most this many tiles for `num_requests` requests with `num_rows` packed rows together, none of them empty: a request of p rows
// has ceil(p / rows) <= 1 + (p - 1) / rows tiles of the last class, or one of a smaller class.
inline int64_t MaxTiles(const PlanParams& p, int64_t num_requests, int64_t num_rows) {
  return num_requests + (num_rows - num_requests) / p.tile_classes[p.num_tile_classes - 1].rows;
}

}  // namespace tvm_infer
