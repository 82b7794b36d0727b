#include "tvm_infer/schedule/forest.h"

#include <algorithm>
#include <limits>

namespace tvm_infer {

bool Forest::Build(const PlanParams& p, const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests, const SharedRuns& shared) {
  has_end_ = p.band.has_end();
  MakeTiles(p, qo_indptr, kv_len, num_requests, shared);
  PlaceRuns(p, shared, num_requests);
  if (!ChooseRuns(p)) return false;
  CutTiles(p);
  if (int64_t{num_merge_tiles_} * p.num_kv_heads * (num_levels_ + 1) > std::numeric_limits<int32_t>::max()) return false;
  if (has_order_) {
    token_order_.Reserve(qo_indptr[num_requests]);
    int32_t slot = 0;
    for (int32_t i = 0; i < num_requests; ++i) {
      const int32_t r = shared.order[i];
      for (int32_t token = qo_indptr[r]; token < qo_indptr[r + 1]; ++token) token_order_[slot++] = token;
    }
  }
  return true;
}

// Row tiles of all requests as a plan without shared runs has them, but in the given order.
void Forest::MakeTiles(const PlanParams& p, const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests,
                       const SharedRuns& shared) {
  const int32_t group = p.num_qo_heads / p.num_kv_heads;
  tiles_.Reserve(MaxTiles(p, std::min(num_requests, qo_indptr[num_requests]), int64_t{qo_indptr[num_requests]} * group));
  first_tile_.Reserve(num_requests + 1);
  num_places_ = num_requests;
  num_tiles_ = 0;
  has_order_ = false;
  flat_cost_ = 0;
  int32_t row_begin = 0;
  for (int32_t i = 0; i < num_requests; ++i) {
    first_tile_[i] = num_tiles_;
    const int32_t r = shared.order[i];
    const int32_t qo_len = qo_indptr[r + 1] - qo_indptr[r];
    has_order_ |= qo_len > 0 && row_begin != qo_indptr[r] * group;
    const int32_t num_rows = qo_len * group, first_position = kv_len[r] - qo_len;
    const int32_t tile_class = ClassOf(p, num_rows);
    const TileClass& t = p.tile_classes[tile_class];
    for (int32_t row = 0; row < num_rows;) {
      const int32_t rows = std::min(t.rows, num_rows - row);
      const int32_t position = rows == num_rows ? first_position : first_position + row / group;
      tiles_[num_tiles_++] = {row_begin + row, rows, r, kv_len[r], position, tile_class, 0, -1};
      const int32_t last = rows == num_rows ? kv_len[r] - 1 : first_position + (row + rows - 1) / group;
      flat_cost_ += CostOf(t, t.fixed + t.row * rows, KeysSeen(p.band, position, last, kv_len[r]).end);
      row += rows;
    }
    row_begin += num_rows;
  }
  first_tile_[num_requests] = num_tiles_;
}

// The runs' tiles, parents, and what their requests allow; the innermost run of every place.
void Forest::PlaceRuns(const PlanParams& p, const SharedRuns& shared, int32_t num_requests) {
  num_runs_ = shared.num_runs;
  runs_.Reserve(num_runs_);
  open_.Reserve(num_runs_);
  run_of_.Reserve(num_requests);
  for (int32_t i = 0, next = 0, num_open = 0; i < num_requests; ++i) {
    while (num_open > 0 && shared.runs[open_[num_open - 1]].end <= i) --num_open;
    for (; next < num_runs_ && shared.runs[next].begin == i; ++next) {
      const SharedRun& run = shared.runs[next];
      runs_[next] = {.first_tile = first_tile_[run.begin],
                     .end_tile = first_tile_[run.end],
                     .parent = num_open > 0 ? open_[num_open - 1] : -1,
                     .kv_begin = 0,
                     .kv_end = run.kv_end,
                     .max_end = std::numeric_limits<int32_t>::max(),
                     .depth = 0,
                     .max_rows = 0,
                     .is_used = false,
                     .key_cost = 0};
      open_[num_open++] = next;
    }
    run_of_[i] = num_open > 0 ? open_[num_open - 1] : -1;
    if (num_open == 0) continue;
    Run& run = runs_[run_of_[i]];
    for (int32_t t = first_tile_[i]; t < first_tile_[i + 1]; ++t) {
      // What all rows see, and less than all keys: a request's tiles have one of their own at least.
      run.max_end = std::min(run.max_end, has_end_ ? tiles_[first_tile_[i]].first_position : tiles_[t].kv_len - 1);
      run.key_cost += p.tile_classes[tiles_[t].tile_class].kv;
    }
  }
  for (int32_t k = num_runs_ - 1; k >= 0; --k) {
    if (runs_[k].parent >= 0) runs_[runs_[k].parent].max_end = std::min(runs_[runs_[k].parent].max_end, runs_[k].max_end);
    runs_[k].kv_end = std::min(runs_[k].kv_end, runs_[k].max_end);
  }
}

// As many tiles from the first on as one tile of `max_rows` rows holds, and one at least.
Forest::Packed Forest::Pack(int32_t max_rows, int32_t first_tile, int32_t end_tile) const {
  Packed packed{first_tile + 1, tiles_[first_tile].num_rows};
  while (packed.end_tile < end_tile && packed.num_rows + tiles_[packed.end_tile].num_rows <= max_rows) {
    packed.num_rows += tiles_[packed.end_tile++].num_rows;
  }
  return packed;
}

// What a run's own keys cost in tiles of up to `max_rows` rows, one KV head.
int64_t Forest::SharedCost(const PlanParams& p, const Run& run, int32_t max_rows, int64_t num_keys, int64_t* key_cost) const {
  int64_t overhead = 0;
  *key_cost = 0;
  for (int32_t tile = run.first_tile; tile < run.end_tile;) {
    const Packed packed = Pack(max_rows, tile, run.end_tile);
    const TileClass& t = p.tile_classes[ClassOf(p, packed.num_rows)];
    *key_cost += t.kv;
    overhead += t.fixed + t.row * packed.num_rows;
    tile = packed.end_tile;
  }
  return *key_cost * num_keys + overhead;
}

// Uses a run if reading its keys once, in the cheapest tiles, costs less than all its tiles reading them, with the merges that this takes.
void Forest::ChooseRun(const PlanParams& p, Run* run) const {
  const int64_t num_keys = int64_t{run->kv_end} - (run->parent < 0 ? 0 : runs_[run->parent].kv_end);
  int64_t best = run->key_cost * num_keys, chosen_key_cost = run->key_cost;
  for (int32_t tile = run->first_tile; tile < run->end_tile; ++tile) {
    best -= MergePrice(p.tile_classes[tiles_[tile].tile_class], tiles_[tile].num_rows);
  }
  for (int32_t c = p.num_tile_classes - 1; c >= 0; --c) {
    int64_t key_cost;
    const int64_t cost = SharedCost(p, *run, p.tile_classes[c].rows, num_keys, &key_cost);
    if (cost >= best) continue;
    best = cost;
    chosen_key_cost = key_cost;
    run->is_used = true;
    run->max_rows = p.tile_classes[c].rows;
  }
  run->key_cost = chosen_key_cost;
}

// Innermost runs first: what an outer one saves depends on what reads its keys otherwise.
bool Forest::ChooseRuns(const PlanParams& p) {
  bool any = false;
  for (int32_t k = num_runs_ - 1; k >= 0; --k) {
    Run& run = runs_[k];
    ChooseRun(p, &run);
    if (run.parent >= 0) runs_[run.parent].key_cost += run.key_cost;
    any |= run.is_used;
  }
  if (!any) return false;
  num_levels_ = num_shared_items_ = 0;
  for (int32_t k = 0; k < num_runs_; ++k) {
    Run& run = runs_[k];
    if (run.parent >= 0) {
      const Run& parent = runs_[run.parent];
      run.kv_begin = parent.is_used ? parent.kv_end : parent.kv_begin;
      run.depth = parent.depth;
    }
    if (!run.is_used) continue;
    num_levels_ = std::max(num_levels_, ++run.depth);
    for (int32_t tile = run.first_tile; tile < run.end_tile; ++num_shared_items_) tile = Pack(run.max_rows, tile, run.end_tile).end_tile;
  }
  merge_price_ = 0;
  for (int32_t i = 0; i < num_places_; ++i) {
    if (run_of_[i] < 0 || runs_[run_of_[i]].depth == 0) continue;
    for (int32_t t = first_tile_[i]; t < first_tile_[i + 1]; ++t) {
      merge_price_ += p.shared_merge->each + MergePrice(p.tile_classes[tiles_[t].tile_class], tiles_[t].num_rows);
    }
  }
  return true;
}

// Where each tile's own keys begin, and which tiles merge.
void Forest::CutTiles(const PlanParams& p) {
  num_merge_tiles_ = 0;
  merge_tiles_.Reserve(num_tiles_);
  int64_t reread = 0;
  for (int32_t k = 0; k < num_runs_; ++k) {
    const Run& run = runs_[k];
    if (run.is_used && tiles_[run.first_tile].tile_class == 0) reread -= run.kv_end - run.kv_begin;
  }
  for (int32_t i = 0; i < num_places_; ++i) {
    if (run_of_[i] < 0) continue;
    const Run& run = runs_[run_of_[i]];
    if (run.depth == 0) continue;
    for (int32_t t = first_tile_[i]; t < first_tile_[i + 1]; ++t) {
      tiles_[t].kv_begin = run.is_used ? run.kv_end : run.kv_begin;
      tiles_[t].merge = num_merge_tiles_;
      if (tiles_[t].tile_class == 0) reread += tiles_[t].kv_begin;
      merge_tiles_[num_merge_tiles_++] = {tiles_[t].row_begin, tiles_[t].num_rows};
    }
  }
  reread_cost_ = std::max<int64_t>(0, reread) * p.tile_classes[0].kv;
}

void Forest::MakeItems(const PlanParams& p, Items* items) const {
  items->Start(p, int64_t{num_shared_items_} + num_tiles_);
  items->num_tree_merges = num_merge_tiles_ * p.num_kv_heads;
  const int32_t group = p.num_qo_heads / p.num_kv_heads;
  Work work{};
  work.num_kv_heads = p.num_kv_heads;
  work.out = kFinalRows;
  for (int32_t k = 0; k < num_runs_; ++k) {
    const Run& run = runs_[k];
    for (int32_t tile = run.first_tile; run.is_used && tile < run.end_tile;) {
      const Packed packed = Pack(run.max_rows, tile, run.end_tile);
      work.row_begin = tiles_[tile].row_begin;
      work.num_rows = packed.num_rows;
      work.kv_list = tiles_[tile].request;
      work.kv_begin = run.kv_begin;
      work.kv_end = work.qo_pos_base = run.kv_end;
      work.tile_class = ClassOf(p, packed.num_rows);
      work.merge = tiles_[tile].merge;
      work.merge_tiles = packed.end_tile - tile;
      items->AddShared(p, work);
      tile = packed.end_tile;
    }
  }
  for (int32_t t = 0; t < num_tiles_; ++t) {
    const Tile& tile = tiles_[t];
    const int64_t last = tile.first_position + (tile.num_rows + tile.row_begin % group - 1) / group;
    work.row_begin = tile.row_begin;
    work.num_rows = tile.num_rows;
    work.kv_list = tile.request;
    work.kv_begin = tile.kv_begin;
    work.kv_end = KeysSeen(p.band, tile.first_position, last, tile.kv_len).end;
    work.qo_pos_base = tile.first_position;
    work.tile_class = tile.tile_class;
    work.merge = tile.merge;  // kNoMerge where there is none
    work.merge_tiles = tile.merge < 0 ? 0 : 1;
    items->AddShared(p, work);
  }
}

namespace {

// Calls f(first partial row, KV head) for every piece of an item's keys and each of its heads, keys of a head ascending.
template <typename F>
void ForEachPiece(const Items& items, const Layout& layout, int32_t item, F&& f) {
  const int32_t num_rows = items.work[item].num_rows;
  const Layout::Range range = layout.of_item[item];
  for (int32_t i = range.begin; i < range.end; ++i) {
    const Placement& placement = layout.placements[i];
    const int32_t out = layout.partials[placement.partial].out;
    for (int32_t h = 0; h < placement.num_kv_heads; ++h) f(out + h * num_rows, placement.kv_head_begin + h);
  }
}

}  // namespace

// Leaves the number of each merge's slots in cursor_.
int64_t Forest::CountSlots(const Items& items, const Layout& layout, int32_t num_kv_heads) {
  cursor_.Reserve(items.num_tree_merges);
  of_head_.Reserve(num_kv_heads);
  std::fill_n(cursor_.data(), items.num_tree_merges, 0);
  int64_t num_slots = 0;
  max_pieces_ = 0;
  for (int32_t item = 0; item < items.count; ++item) {
    const Work& work = items.work[item];
    if (work.merge_tiles == 0) continue;
    int32_t* of_tile = cursor_.data() + int64_t{work.merge} * num_kv_heads;
    int32_t num_pieces = 0;
    if (work.merge_tiles == 1) {
      ForEachPiece(items, layout, item, [&](int32_t, int32_t head) { ++of_tile[head], ++num_pieces; });
      num_slots += num_pieces;
      continue;
    }
    std::fill_n(of_head_.data(), num_kv_heads, 0);
    ForEachPiece(items, layout, item, [&](int32_t, int32_t head) { ++of_head_[head], ++num_pieces; });
    for (int32_t j = 0; j < work.merge_tiles; ++j, of_tile += num_kv_heads) {
      for (int32_t h = 0; h < num_kv_heads; ++h) of_tile[h] += of_head_[h];
    }
    num_slots += int64_t{num_pieces} * work.merge_tiles;
    max_pieces_ = std::max(max_pieces_, num_pieces);
  }
  return num_slots;
}

void Forest::WriteMerges(const Items& items, const Layout& layout, int32_t num_kv_heads, Merge* merges, int32_t* merge_indptr,
                         int32_t* merge_slots) {
  int32_t sum = 0;
  for (int32_t m = 0; m < items.num_tree_merges; ++m) {
    const int32_t count = cursor_[m];
    merge_indptr[m] = cursor_[m] = sum;
    sum += count;
  }
  merge_indptr[items.num_tree_merges] = sum;
  for (int32_t t = 0; t < num_merge_tiles_; ++t) {
    for (int32_t h = 0; h < num_kv_heads; ++h) *merges++ = {merge_tiles_[t].row_begin, merge_tiles_[t].num_rows, h, 1};
  }
  pieces_.Reserve(max_pieces_);
  // In the order of items: outer runs, inner ones, requests.
  for (int32_t item = 0; item < items.count; ++item) {
    const Work& work = items.work[item];
    if (work.merge_tiles == 0) continue;
    int32_t* cursor = cursor_.data() + int64_t{work.merge} * num_kv_heads;
    if (work.merge_tiles == 1) {
      ForEachPiece(items, layout, item, [&](int32_t out, int32_t head) { merge_slots[cursor[head]++] = out; });
      continue;
    }
    // Tile by tile: the merges of one stand side by side.
    int32_t num_pieces = 0;
    ForEachPiece(items, layout, item, [&](int32_t out, int32_t head) { pieces_[num_pieces++] = {out, head}; });
    for (int32_t j = 0; j < work.merge_tiles; ++j, cursor += num_kv_heads) {
      const int32_t row = merge_tiles_[work.merge + j].row_begin - work.row_begin;
      for (int32_t i = 0; i < num_pieces; ++i) merge_slots[cursor[pieces_[i].head]++] = pieces_[i].out + row;
    }
  }
}

}  // namespace tvm_infer
