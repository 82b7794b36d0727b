// What a plan's settings say before there is a batch: their digest, and what every batch within limits fits in.
#include <algorithm>

#include "tvm_infer/error.h"
#include "tvm_infer/schedule/items.h"
#include "tvm_infer/schedule/plan_writer.h"
#include "tvm_infer/schedule/planner.h"

namespace tvm_infer {
namespace {

uint64_t Mix(uint64_t state, uint64_t value) {  // the finaliser of splitmix64 over a running state
  uint64_t z = state + 0x9e3779b97f4a7c15u + value;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

int64_t BytesOf(const PlanParams& p, const PlanSizes& sizes, const PlanLimits& limits, int64_t lists_per_request = 1) {
  return PlanBytes(p, sizes, limits.max_requests, limits.max_requests * lists_per_request);
}

PlanSizes SizesOf(const LayoutBounds& bounds) { return {bounds.placements, bounds.merges, bounds.partials}; }

// Room for shared works, beside what `flat` holds. With levels, of the tiles of requests within runs:
//   items       a level has as many shared tiles at most
//   merges      each tile and head; its partials are one for each level and one of its own keys, and a piece more where a shared work of it
//               is cut. Cut pieces are as many as in a flat plan, each of as many tiles at most as a shared tile holds
//   partials    rows and heads, as often
PlanCapacity AddShared(const PlanParams& p, const PlanLimits& limits, int64_t tiles, const LayoutBounds& flat, int64_t flat_rows) {
  const int64_t rows = int64_t{limits.max_shared_tokens} * (p.num_qo_heads / p.num_kv_heads), levels = limits.max_levels;
  const int64_t shared_tiles = MaxTiles(p, std::min(limits.max_requests, limits.max_shared_tokens), rows), heads = p.num_kv_heads;
  const LayoutBounds bounds = BoundLayout(p, tiles + levels * shared_tiles, 0);
  const int64_t tiles_of_one = std::min<int64_t>(shared_tiles, p.tile_classes[p.num_tile_classes - 1].rows);
  PlanSizes sizes{bounds.placements, bounds.merges + shared_tiles * heads};
  sizes.merge_slots = bounds.partials + shared_tiles * heads * (levels + 1) + bounds.cut_partials * tiles_of_one;
  sizes.ordered_tokens = limits.max_tokens;
  return {std::max(BytesOf(p, sizes, limits), BytesOf(p, SizesOf(flat), limits)), flat_rows + rows * heads * (levels + 1)};
}

}  // namespace

uint64_t CaptureKey(const PlanParams& p) {
  uint64_t key = Mix(0, static_cast<uint64_t>(kPlanVersion));
  for (const int32_t value : {p.num_ctas, p.num_qo_heads, p.num_kv_heads, p.band.left, p.band.right, p.band.num_sink, p.band.chunk,
                              p.fixed_split_size, p.num_tile_classes}) {
    key = Mix(key, static_cast<uint64_t>(value));
  }
  for (int32_t c = 0; c < p.num_tile_classes; ++c) {
    const TileClass& t = p.tile_classes[c];
    for (const int64_t value : {int64_t{t.rows}, int64_t{t.kv_granule}, t.fixed, t.row, t.kv}) key = Mix(key, static_cast<uint64_t>(value));
  }
  return key;
}

// MaxTiles grows with requests and rows, BoundLayout with items, so the largest batch bounds all. Partial rows without a fixed size:
// partials times the rows of a tile; with sinks every row of a head has two, and the pieces of cut heads come on top. With a fixed size
// S: a tile of request r has at most ceil(kv_len[r] / S) <= 1 + kv_len[r] / S pieces, with sinks one more. Let request r have 1 + a tiles
// and 1 + b pieces for each: sum(a) <= tiles - requests and sum(b) <= B = max_kv_tokens / S, so items, sum((1 + a) * (1 + b)), are at most
// tiles + B + B * sum(a), most where all rows are one request's. Of its rows likewise: sum(rows * (1 + b)) <= rows * (1 + B).
// With a list for each KV head, a batch is as one of num_kv_heads times the requests and rows, of one head.
PlanCapacity ComputeCapacity(const PlanParams& all_heads, const PlanLimits& limits) {
  CheckParams(all_heads);
  const PlanParams params = limits.has_head_lists ? OfOneHead(all_heads) : all_heads;
  const int64_t lists = limits.has_head_lists ? all_heads.num_kv_heads : 1;
  if (limits.max_requests < 0 || limits.max_tokens < 0 || limits.max_kv_tokens < 0 || limits.max_levels < 0 ||
      limits.max_shared_tokens < 0) {
    TVM_INFER_THROW(ArgumentError) << "limits are max_requests " << limits.max_requests << ", max_tokens " << limits.max_tokens
                                   << ", max_kv_tokens " << limits.max_kv_tokens << ", max_levels " << limits.max_levels
                                   << ", max_shared_tokens " << limits.max_shared_tokens << "; each must be at least 0";
  }
  const int64_t rows_of_list = int64_t{limits.max_tokens} * (params.num_qo_heads / params.num_kv_heads), rows = rows_of_list * lists;
  const int64_t active = lists * std::min(limits.max_requests, limits.max_tokens);  // lists of requests with a query token
  if (active == 0) return {BytesOf(params, {}, limits, lists), 0};
  const bool has_sink = params.band.num_sink > 0;
  const int64_t tiles = MaxTiles(params, active, rows);
  LayoutBounds bounds = BoundLayout(params, tiles, 0);
  const int64_t tile_rows = std::min<int64_t>(rows_of_list, params.tile_classes[params.num_tile_classes - 1].rows);
  int64_t partial_rows = has_sink ? 2 * rows * params.num_kv_heads + bounds.cut_partials * tile_rows : bounds.partials * tile_rows;
  if (limits.max_levels > 0 && limits.max_shared_tokens > 0 && !limits.has_head_lists && params.band.IsSharable() &&
      params.fixed_split_size == kSplitAuto) {
    return AddShared(params, limits, tiles, bounds, partial_rows);
  }
  if (params.fixed_split_size <= 0) return {BytesOf(params, SizesOf(bounds), limits, lists), partial_rows};

  const int64_t more_pieces = limits.max_kv_tokens / params.fixed_split_size, sink_pieces = has_sink ? 1 : 0;
  if (more_pieces + sink_pieces > 0) {
    // Any of the items may be cut: one work an item and the slack of each kind, but never more than one work a head.
    const int64_t items = tiles * (1 + sink_pieces) + more_pieces * MaxTiles(params, 1, rows_of_list);
    const LayoutBounds cut = BoundLayout(params, 0, items);
    const int64_t whole_slack = bounds.placements - tiles;
    bounds = {std::min(items * params.num_kv_heads, cut.placements + whole_slack), cut.merges, cut.partials, 0};
    partial_rows = (rows * (1 + sink_pieces) + rows_of_list * more_pieces) * params.num_kv_heads;
  }
  return {BytesOf(params, SizesOf(bounds), limits, lists), partial_rows};
}

}  // namespace tvm_infer
