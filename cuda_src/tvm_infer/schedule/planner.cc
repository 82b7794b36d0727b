// How a plan is made. Lengths become items (a row tile and the keys it sees; all its KV heads cost the same), the items are sorted,
// longest first, and laid onto CTAs in runs of heads; then works and merges are written, those of one CTA together.
//
// Every head of an item costs the same, so an item is placed in O(CTAs it touches), not O(heads). Costs are int64 picoseconds.
#include "tvm_infer/schedule/planner.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "tvm_infer/error.h"
#include "tvm_infer/schedule/load_tree.h"
#include "tvm_infer/schedule/scratch_array.h"

namespace tvm_infer {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxTotalCost = int64_t{1} << 60;  // 13 days; sums of a few such numbers still fit
// A run of heads may end on a CTA because the CTA is full (not because the heads are all placed) only while the CTA has more than
// target / 2^kRunCutsPerCta left. Such a run takes more than half of what is left, so a CTA ends at most this many runs.
constexpr int kRunCutsPerCta = 8;
// A split tile's run of heads under a fixed split size costs at most 1 / kRunsPerTarget of the mean load, if a single head does.
constexpr int64_t kRunsPerTarget = 4;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t Align16(int64_t bytes) { return (bytes + 15) & ~int64_t{15}; }

// One work to be: heads of an item on a CTA.
struct Placement {
  int32_t item;
  int32_t cta;
  int32_t kv_head_begin;
  int32_t num_kv_heads;
  int32_t kv_begin;
  int32_t kv_end;
  int32_t out;
  int32_t merge;
};

// A tile that fixed_split_size cuts: its items, and where their partials lie. All pieces share the same runs of heads, because a
// merge needs partials of equal rows and heads.
struct CutTile {
  int32_t first_item;
  int32_t num_pieces;
  int32_t run;  // KV heads of one work
  int64_t piece_cost;
};

// What one way of laying items onto CTAs gave.
struct Layout {
  ScratchArray<Placement> placements;
  ScratchArray<int32_t> item_begin;  // placements of item i: [item_begin[i], item_end[i])
  ScratchArray<int32_t> item_end;
  ScratchArray<int64_t> load;  // of each CTA
  ScratchArray<Merge> merges;
  ScratchArray<int32_t> merge_indptr;
  ScratchArray<int32_t> merge_slots;
  int32_t num_placements, num_merges, num_merge_slots;
  int64_t num_partial_rows;
  int64_t makespan, total_cost;

  void Reset(int64_t num_items, int64_t max_placements, int64_t max_merges, int64_t max_slots, int32_t num_ctas) {
    placements.Reserve(max_placements);
    item_begin.Reserve(num_items);
    item_end.Reserve(num_items);
    load.Reserve(num_ctas);
    merges.Reserve(max_merges);
    merge_indptr.Reserve(max_merges + 1);
    merge_slots.Reserve(max_slots);
    std::fill_n(load.data(), num_ctas, int64_t{0});
    num_placements = num_merges = num_merge_slots = 0;
    num_partial_rows = makespan = total_cost = 0;
    merge_indptr[0] = 0;
  }
  void Place(int32_t item, int32_t cta, int32_t head, int32_t heads, int32_t kv_begin, int32_t kv_end, int32_t out, int32_t merge) {
    placements[num_placements++] = {item, cta, head, heads, kv_begin, kv_end, out, merge};
  }
  void AddLoad(int32_t cta, int64_t cost) {
    load[cta] += cost;
    total_cost += cost;
    makespan = std::max(makespan, load[cta]);
  }
};

void CheckParams(const PlanParams& p) {
  if (p.num_ctas < 1) TVM_INFER_THROW(ArgumentError) << "num_ctas is " << p.num_ctas << "; a plan needs at least 1 CTA";
  if (p.num_kv_heads < 1) TVM_INFER_THROW(ArgumentError) << "num_kv_heads is " << p.num_kv_heads << "; it must be at least 1";
  if (p.num_qo_heads < 1 || p.num_qo_heads % p.num_kv_heads != 0) {
    TVM_INFER_THROW(ArgumentError) << "num_qo_heads is " << p.num_qo_heads
                                   << "; it must be a positive multiple of num_kv_heads = " << p.num_kv_heads
                                   << " (each KV head serves one group of query heads)";
  }
  if (p.fixed_split_size < kSplitNever) {
    TVM_INFER_THROW(ArgumentError) << "fixed_split_size is " << p.fixed_split_size
                                   << "; it must be positive (keys), 0 (split where it shortens the plan) or -1 (never split)";
  }
  if (p.band.left < kUnbounded || p.band.right < kUnbounded) {
    TVM_INFER_THROW(ArgumentError) << "band is (" << p.band.left << ", " << p.band.right
                                   << "); each side must be a number of keys >= 0, or -1 for all";
  }
  if (p.num_tile_classes < 1 || p.tile_classes == nullptr) {
    TVM_INFER_THROW(ArgumentError) << "tile_classes is empty; a plan needs at least one tile class of its executor";
  }
  for (int32_t c = 0; c < p.num_tile_classes; ++c) {
    const TileClass& t = p.tile_classes[c];
    const int64_t limit = int64_t{1} << 40;  // a second
    if (t.rows < 1 || t.kv_granule < 1 || t.fixed < 0 || t.row < 0 || t.kv < 1 || t.fixed > limit || t.row > limit || t.kv > limit) {
      TVM_INFER_THROW(ArgumentError) << "tile_classes[" << c << "] is (rows " << t.rows << ", kv_granule " << t.kv_granule << ", fixed "
                                     << t.fixed << ", row " << t.row << ", kv " << t.kv
                                     << "); rows, kv_granule and kv must be >= 1, fixed and row >= 0, costs <= 2^40 ps";
    }
    if (c > 0 && t.rows <= p.tile_classes[c - 1].rows) {
      TVM_INFER_THROW(ArgumentError) << "tile_classes[" << c << "].rows is " << t.rows << ", but tile_classes[" << c - 1 << "].rows is "
                                     << p.tile_classes[c - 1].rows << "; classes must be ascending in rows";
    }
  }
}

void CheckRequest(const PlanParams& p, const int32_t* qo_indptr, const int32_t* kv_len, int32_t r) {
  if (qo_indptr[r + 1] < qo_indptr[r]) {
    TVM_INFER_THROW(ArgumentError) << "qo_indptr[" << r + 1 << "] is " << qo_indptr[r + 1] << ", less than qo_indptr[" << r
                                   << "] = " << qo_indptr[r] << "; qo_indptr must not decrease (it is the running sum of query lengths)";
  }
  if (kv_len[r] < 0) {
    TVM_INFER_THROW(ArgumentError) << "kv_len[" << r << "] is " << kv_len[r] << "; lengths must be >= 0";
  }
  const int32_t qo_len = qo_indptr[r + 1] - qo_indptr[r];
  if (p.band.right != kUnbounded && kv_len[r] < qo_len) {
    TVM_INFER_THROW(ArgumentError) << "kv_len[" << r << "] is " << kv_len[r] << ", less than the request's " << qo_len
                                   << " query tokens; with a causal band kv_len counts the new tokens too (kv_len >= qo_len)";
  }
}

// At most this many tiles for `num_requests` requests with `num_rows` packed rows together: a request of p rows has ceil(p / rows)
// tiles of the last class (one tile of a smaller class, if that holds it), and ceil(p / rows) <= 1 + (p - 1) / rows.
int64_t MaxTiles(int64_t num_requests, int64_t num_rows, int64_t rows) { return num_requests + (num_rows - num_requests) / rows; }

// Bounds on one layout of num_items items, cut_items of them pieces of tiles that fixed_split_size cuts.
//   Whole runs: the last work of every item, plus kRunCutsPerCta runs for each CTA that fills up, plus one overflow for each CTA.
//   Auto split: each CTA takes at most one piece that is not its head's last, so num_ctas of these, and no more heads cut than that;
//   their last pieces come on top. A CTA that took one takes no overflow.
//   Cut items: never more than one work for each head. With c the cost of a tile's largest piece, runs have R = T / (4 c) heads
//   (at least 1, at most H): an item has at most 1 + 8 H c / T of them, and sum(H c) <= 3 sum(cost) <= 3 num_ctas T, since of a
//   tile's pieces only the first and the last are short.
struct Bounds {
  int64_t placements, merges, merge_slots;
};
Bounds LayoutBounds(const PlanParams& p, int64_t num_items, int64_t cut_items) {
  const int64_t ctas = p.num_ctas, heads = p.num_kv_heads;
  const int64_t whole_items = num_items - cut_items;
  Bounds b;
  b.placements = std::min(whole_items * heads, whole_items + ctas * (kRunCutsPerCta + 1));
  b.merges = b.merge_slots = 0;
  if (p.fixed_split_size == kSplitAuto && ctas > 1) {
    b.merges = std::min(whole_items * heads, ctas);
    b.merge_slots = ctas + b.merges;
    b.placements = std::min(whole_items * heads + ctas, whole_items + ctas * (kRunCutsPerCta + 1) + b.merges);
  } else if (cut_items > 0) {
    const int64_t cut_works = std::min(cut_items * heads, cut_items + 3 * 2 * kRunsPerTarget * ctas);
    b.placements += cut_works;
    b.merges = cut_works / 2;
    b.merge_slots = cut_works;
  }
  return b;
}

int64_t PlanBytes(int64_t works, int64_t ctas, int64_t merges, int64_t slots, int64_t requests, int64_t tile_classes) {
  return Align16(sizeof(PlanHeader)) + works * int64_t{sizeof(Work)} + Align16((ctas + 1) * 4) + merges * int64_t{sizeof(Merge)} +
         Align16((merges + 1) * 4) + Align16(slots * 4) + Align16((requests + 1) * 4) + Align16(requests * 4) +
         tile_classes * int64_t{sizeof(TileClass)};
}

uint64_t Mix(uint64_t state, uint64_t value) {  // splitmix64's finaliser over a running state
  uint64_t z = state + 0x9e3779b97f4a7c15u + value;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

}  // namespace

uint64_t CaptureKey(const PlanParams& p) {
  uint64_t key = Mix(0, static_cast<uint64_t>(kPlanVersion));
  const int64_t scalars[] = {p.num_ctas, p.num_qo_heads, p.num_kv_heads, p.band.left, p.band.right, p.fixed_split_size, p.num_tile_classes};
  for (int64_t value : scalars) key = Mix(key, static_cast<uint64_t>(value));
  for (int32_t c = 0; c < p.num_tile_classes; ++c) {
    const TileClass& t = p.tile_classes[c];
    const int64_t fields[] = {t.rows, t.kv_granule, t.fixed, t.row, t.kv};
    for (int64_t value : fields) key = Mix(key, static_cast<uint64_t>(value));
  }
  return key;
}

struct Planner::Scratch {
  // Items, in the order of requests, row tiles, pieces.
  ScratchArray<Work> item_work;  // everything but heads, out and merge; `merge` is the cut tile, or kNoMerge
  ScratchArray<int64_t> item_cost;
  ScratchArray<int32_t> order, order_tmp;  // items, longest first
  ScratchArray<uint16_t> sort_key;
  ScratchArray<CutTile> cut_tiles;
  int32_t num_items, num_cut_tiles, num_cut_items;
  int64_t total_cost, max_item_cost;
  int64_t max_overhead, max_granule_cost, max_fixed;  // of one piece of any item

  LoadTree tree;
  Layout whole, split;
  ScratchArray<int32_t> cursor;  // next free work of each CTA

  void BuildItems(const PlanParams& p, const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests);
  void AddTile(const PlanParams& p, const Work& tile, const TileClass& t);
  void SortItems();
  void LayWhole(const PlanParams& p, int64_t target);
  bool LaySplit(const PlanParams& p, int64_t target);
  bool CutHead(const PlanParams& p, int64_t target, int32_t item, int32_t head);
  const Layout& Choose(const PlanParams& p);
};

namespace {

// Items of a request: its tiles, or their pieces.
int64_t CountItems(const PlanParams& p, const TileClass& t, int64_t num_rows, int64_t kv_len) {
  const int64_t tiles = CeilDiv(num_rows, t.rows);
  return p.fixed_split_size > 0 ? tiles * std::max<int64_t>(1, CeilDiv(kv_len, p.fixed_split_size)) : tiles;
}

const TileClass& ClassOf(const PlanParams& p, int64_t num_rows) {
  const TileClass* t = p.tile_classes;
  const TileClass* last = t + p.num_tile_classes - 1;
  while (t != last && t->rows < num_rows) ++t;
  return *t;
}

}  // namespace

void Planner::Scratch::BuildItems(const PlanParams& p, const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests) {
  if (qo_indptr[0] != 0) {
    TVM_INFER_THROW(ArgumentError) << "qo_indptr[0] is " << qo_indptr[0] << "; it must be 0 (requests are packed from the first token)";
  }
  const int64_t group = p.num_qo_heads / p.num_kv_heads;
  int64_t max_items = 0;
  double max_cost = 0;
  for (int32_t r = 0; r < num_requests; ++r) {
    CheckRequest(p, qo_indptr, kv_len, r);
    const int64_t num_rows = (qo_indptr[r + 1] - qo_indptr[r]) * group;
    const TileClass& t = ClassOf(p, num_rows);
    const int64_t count = CountItems(p, t, num_rows, kv_len[r]);
    max_items += count;
    max_cost += static_cast<double>(count) *
                (static_cast<double>(t.fixed) + static_cast<double>(t.row) * t.rows + static_cast<double>(t.kv) * kv_len[r] + 1);
  }
  const int64_t rows = qo_indptr[num_requests] * group;
  if (rows > kMaxInt32 || max_items > kMaxInt32 / p.num_kv_heads || max_cost * p.num_kv_heads > static_cast<double>(kMaxTotalCost)) {
    TVM_INFER_THROW(ArgumentError) << "the batch is too large to plan at once: " << rows << " packed rows (limit " << kMaxInt32
                                   << "), up to " << max_items << " tiles (limit " << kMaxInt32 / p.num_kv_heads
                                   << "), predicted cost up to " << max_cost << " ps for each KV head (limit "
                                   << kMaxTotalCost / p.num_kv_heads << "); plan it in several steps";
  }
  item_work.Reserve(max_items);
  item_cost.Reserve(max_items);
  cut_tiles.Reserve(p.fixed_split_size > 0 ? max_items / 2 : 0);
  num_items = num_cut_tiles = num_cut_items = 0;
  total_cost = max_item_cost = max_overhead = max_granule_cost = max_fixed = 0;

  for (int32_t r = 0; r < num_requests; ++r) {
    const int64_t qo_len = qo_indptr[r + 1] - qo_indptr[r];
    const int64_t num_rows = qo_len * group;
    if (num_rows == 0) continue;
    const TileClass& t = ClassOf(p, num_rows);
    max_granule_cost = std::max(max_granule_cost, t.kv * t.kv_granule);
    max_fixed = std::max(max_fixed, t.fixed);
    Work tile{};
    tile.num_kv_heads = p.num_kv_heads;
    tile.kv_list = r;
    tile.tile_class = static_cast<int32_t>(&t - p.tile_classes);
    tile.out = kFinalRows;
    tile.merge = kNoMerge;
    const int64_t pos0 = int64_t{kv_len[r]} - qo_len;  // of the request's first query token
    for (int64_t row = 0; row < num_rows; row += t.rows) {
      tile.row_begin = static_cast<int32_t>(qo_indptr[r] * group + row);
      tile.num_rows = static_cast<int32_t>(std::min<int64_t>(t.rows, num_rows - row));
      const int64_t first = pos0 + row / group, last = pos0 + (row + tile.num_rows - 1) / group;
      int64_t begin = p.band.left == kUnbounded ? 0 : std::max<int64_t>(0, first - p.band.left);
      int64_t end = p.band.right == kUnbounded ? kv_len[r] : std::min<int64_t>(kv_len[r], last + p.band.right + 1);
      if (begin >= end) begin = end = 0;  // sees nothing
      tile.qo_pos_base = static_cast<int32_t>(first);
      tile.kv_begin = static_cast<int32_t>(begin);
      tile.kv_end = static_cast<int32_t>(end);
      AddTile(p, tile, t);
    }
  }
}

void Planner::Scratch::AddTile(const PlanParams& p, const Work& tile, const TileClass& t) {
  const int64_t overhead = t.fixed + t.row * tile.num_rows;
  max_overhead = std::max(max_overhead, overhead);
  const int32_t first_item = num_items;
  int64_t max_piece = 0;
  int32_t begin = tile.kv_begin;
  do {
    int64_t end = tile.kv_end;
    if (p.fixed_split_size > 0) end = std::min<int64_t>(end, (int64_t{begin} / p.fixed_split_size + 1) * p.fixed_split_size);
    const int64_t cost = std::max<int64_t>(1, overhead + t.kv * (end - begin));
    Work& work = item_work[num_items];
    work = tile;
    work.kv_begin = begin;
    work.kv_end = static_cast<int32_t>(end);
    item_cost[num_items++] = cost;
    total_cost += cost;
    max_piece = std::max(max_piece, cost);
    begin = work.kv_end;
  } while (begin < tile.kv_end);
  max_item_cost = std::max(max_item_cost, max_piece);
  const int32_t pieces = num_items - first_item;
  if (pieces == 1) return;
  for (int32_t i = first_item; i < num_items; ++i) item_work[i].merge = num_cut_tiles;
  cut_tiles[num_cut_tiles++] = {first_item, pieces, 0, max_piece};
  num_cut_items += pieces;
}

// Longest first, ties by item. The key is the top 16 bits of the cost, in units of max_item_cost / 2^16: finer differences do not
// move the makespan. Two counting passes.
void Planner::Scratch::SortItems() {
  sort_key.Reserve(num_items);
  order.Reserve(num_items);
  order_tmp.Reserve(num_items);
  int shift = 0;
  while ((max_item_cost >> shift) > 0xffff) ++shift;
  int32_t low[256] = {}, high[256] = {};
  for (int32_t i = 0; i < num_items; ++i) {
    const auto key = static_cast<uint16_t>(0xffff - (item_cost[i] >> shift));
    sort_key[i] = key;
    ++low[key & 0xff];
    ++high[key >> 8];
  }
  int32_t low_sum = 0, high_sum = 0;
  for (int b = 0; b < 256; ++b) {
    low_sum += std::exchange(low[b], low_sum);
    high_sum += std::exchange(high[b], high_sum);
  }
  for (int32_t i = 0; i < num_items; ++i) order_tmp[low[sort_key[i] & 0xff]++] = i;
  for (int32_t i = 0; i < num_items; ++i) {
    const int32_t item = order_tmp[i];
    order[high[sort_key[item] >> 8]++] = item;
  }
}

// Whole heads only. Runs of heads fill the least loaded CTA up to `target` >= the mean load; where no head fits, one goes on top
// (so a CTA exceeds the target at most once, by less than one head: makespan < target + the first item that did not fit).
void Planner::Scratch::LayWhole(const PlanParams& p, int64_t target) {
  Layout& out = whole;
  const Bounds bounds = LayoutBounds(p, num_items, num_cut_items);
  out.Reset(num_items, bounds.placements, bounds.merges, bounds.merge_slots, p.num_ctas);
  const int32_t heads = p.num_kv_heads;
  for (int32_t t = 0; t < num_cut_tiles; ++t) {
    CutTile& tile = cut_tiles[t];
    const int32_t rows = item_work[tile.first_item].num_rows;
    tile.run = static_cast<int32_t>(std::clamp<int64_t>(target / (kRunsPerTarget * tile.piece_cost), 1, heads));
    for (int32_t i = 0; i < tile.num_pieces; ++i)
      item_work[tile.first_item + i].out = static_cast<int32_t>(out.num_partial_rows + int64_t{i} * heads * rows);
    for (int32_t i = 0; i < tile.num_pieces; ++i) item_work[tile.first_item + i].merge = out.num_merges;
    for (int32_t head = 0; head < heads; head += tile.run) {
      out.merges[out.num_merges++] = {item_work[tile.first_item].row_begin, rows, head, std::min(tile.run, heads - head)};
      for (int32_t i = 0; i < tile.num_pieces; ++i) {
        out.merge_slots[out.num_merge_slots++] = static_cast<int32_t>(out.num_partial_rows + (int64_t{i} * heads + head) * rows);
      }
      out.merge_indptr[out.num_merges] = out.num_merge_slots;
    }
    out.num_partial_rows += int64_t{tile.num_pieces} * heads * rows;
    if (out.num_partial_rows > kMaxInt32) {
      TVM_INFER_THROW(ArgumentError) << "fixed_split_size " << p.fixed_split_size << " makes more than " << kMaxInt32
                                     << " partial rows for this batch; choose a larger one";
    }
    for (int32_t i = 0; i < tile.num_pieces; ++i) item_work[tile.first_item + i].num_kv_heads = tile.run;
  }

  tree.Reset(p.num_ctas);
  const int64_t min_cut_room = target >> kRunCutsPerCta;
  for (int32_t k = 0; k < num_items; ++k) {
    const int32_t item = order[k];
    const Work& work = item_work[item];
    const int64_t cost = item_cost[item];
    out.item_begin[item] = out.num_placements;
    for (int32_t head = 0; head < heads;) {
      const int32_t cta = tree.Min();
      const int64_t room = target - tree.Load(cta);
      int32_t n = heads - head;
      if (work.merge != kNoMerge) {
        n = std::min(n, work.num_kv_heads);
        out.Place(item, cta, head, n, work.kv_begin, work.kv_end, work.out + head * work.num_rows, work.merge + head / work.num_kv_heads);
      } else {
        if (n * cost > room) n = std::min<int64_t>(n, room / cost + (room <= min_cut_room || room < cost));
        out.Place(item, cta, head, n, work.kv_begin, work.kv_end, kFinalRows, kNoMerge);
      }
      out.AddLoad(cta, n * cost);
      tree.Set(cta, out.load[cta]);
      head += n;
    }
    out.item_end[item] = out.num_placements;
  }
}

// As LayWhole, but where no head fits under `target`, one head's keys are cut at what the CTA still holds. False if some piece of
// one granule fits nowhere: the target is too low.
bool Planner::Scratch::LaySplit(const PlanParams& p, int64_t target) {
  Layout& out = split;
  const Bounds bounds = LayoutBounds(p, num_items, 0);
  out.Reset(num_items, bounds.placements, bounds.merges, bounds.merge_slots, p.num_ctas);
  const int32_t heads = p.num_kv_heads;
  tree.Reset(p.num_ctas);
  const int64_t min_cut_room = target >> kRunCutsPerCta;
  for (int32_t k = 0; k < num_items; ++k) {
    const int32_t item = order[k];
    const Work& work = item_work[item];
    const int64_t cost = item_cost[item];
    out.item_begin[item] = out.num_placements;
    for (int32_t head = 0; head < heads;) {
      const int32_t cta = tree.Min();
      const int64_t room = target - tree.Load(cta);
      if (room <= 0) return false;
      int32_t n = heads - head;
      if (n * cost > room) {
        if (room < cost) {
          if (!CutHead(p, target, item, head)) return false;
          ++head;
          continue;
        }
        n = std::min<int64_t>(n, room / cost + (room <= min_cut_room));
      }
      out.Place(item, cta, head, n, work.kv_begin, work.kv_end, kFinalRows, kNoMerge);
      out.AddLoad(cta, n * cost);
      tree.Set(cta, tree.Load(cta) + n * cost);
      head += n;
    }
    out.item_end[item] = out.num_placements;
  }
  return true;
}

// Cuts one head's keys over the least loaded CTAs. A CTA that takes a piece other than the head's last is full from then on.
bool Planner::Scratch::CutHead(const PlanParams& p, int64_t target, int32_t item, int32_t head) {
  Layout& out = split;
  const Work& work = item_work[item];
  const TileClass& t = p.tile_classes[work.tile_class];
  const int64_t overhead = t.fixed + t.row * work.num_rows;
  const int64_t granule = t.kv_granule;
  int64_t begin = work.kv_begin;
  while (true) {
    const int32_t cta = tree.Min();
    const int64_t room = target - tree.Load(cta);
    int64_t end = work.kv_end;
    const bool is_last = overhead + t.kv * (end - begin) <= room;
    if (!is_last) {
      // As many granules as fit, and at least one for each of this piece and the next.
      const int64_t fit = room < overhead ? 0 : (room - overhead) / t.kv;
      end = std::min(begin + fit, end - granule) / granule * granule;
      if (end < begin + granule) return false;
    }
    const int64_t cost = overhead + t.kv * (end - begin);
    const auto slot = static_cast<int32_t>(out.num_partial_rows);
    out.Place(item, cta, head, 1, static_cast<int32_t>(begin), static_cast<int32_t>(end), slot, out.num_merges);
    out.merge_slots[out.num_merge_slots++] = slot;
    out.num_partial_rows += work.num_rows;
    out.AddLoad(cta, cost);
    tree.Set(cta, is_last ? tree.Load(cta) + cost : target);
    begin = end;
    if (is_last) break;
  }
  out.merges[out.num_merges++] = {work.row_begin, work.num_rows, head, 1};
  out.merge_indptr[out.num_merges] = out.num_merge_slots;
  return true;
}

const Layout& Planner::Scratch::Choose(const PlanParams& p) {
  const int64_t mean = CeilDiv(total_cost * p.num_kv_heads, p.num_ctas);
  LayWhole(p, mean);
  if (p.fixed_split_size != kSplitAuto || whole.makespan <= mean + max_fixed || p.num_ctas == 1) return whole;
  const bool feasible = LaySplit(p, mean + max_overhead + 2 * max_granule_cost);
  TVM_INFER_ICHECK(feasible);
  return split.makespan + max_fixed < whole.makespan ? split : whole;
}

Planner::Planner() : scratch_(std::make_unique<Scratch>()) {}
Planner::~Planner() = default;

namespace {

// Hands out sub-arrays of the plan in turn, and zeroes the padding after each, so that equal input gives equal bytes.
class PlanWriter {
 public:
  explicit PlanWriter(void* out) : base_(static_cast<char*>(out)), offset_(Align16(sizeof(PlanHeader))) {}
  template <typename T>
  T* Array(int64_t count, int32_t* offset) {
    *offset = count == 0 ? 0 : static_cast<int32_t>(offset_);
    T* array = reinterpret_cast<T*>(base_ + offset_);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    std::memset(base_ + offset_ + bytes, 0, Align16(bytes) - bytes);
    offset_ += Align16(bytes);
    return array;
  }
  template <typename T>
  void Copy(const T* from, int64_t count, int32_t* offset) {
    T* array = Array<T>(count, offset);
    if (count > 0) std::memcpy(array, from, count * sizeof(T));
  }
  int64_t offset() const { return offset_; }

 private:
  char* base_;
  int64_t offset_;
};

}  // namespace

int64_t Planner::Plan(const PlanParams& params, const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests, void* out,
                      int64_t out_bytes, int64_t max_partial_rows) {
  CheckParams(params);
  if (num_requests < 0) TVM_INFER_THROW(ArgumentError) << "num_requests is " << num_requests << "; it must be >= 0";
  Scratch& s = *scratch_;
  s.BuildItems(params, qo_indptr, kv_len, num_requests);
  s.SortItems();
  const Layout& layout = s.Choose(params);

  const int64_t bytes =
      PlanBytes(layout.num_placements, params.num_ctas, layout.num_merges, layout.num_merge_slots, num_requests, params.num_tile_classes);
  if (bytes > out_bytes || bytes > kMaxInt32) {
    TVM_INFER_THROW(WorkspaceError) << "the plan buffer holds " << std::min(out_bytes, kMaxInt32) << " bytes, but this batch's plan needs "
                                    << bytes << "; size it by plan_capacity for the largest batch";
  }
  if (layout.num_partial_rows > max_partial_rows) {
    TVM_INFER_THROW(WorkspaceError) << "the partial buffers hold " << max_partial_rows << " rows, but this batch's plan needs "
                                    << layout.num_partial_rows << "; size them by plan_capacity for the largest batch";
  }

  PlanHeader header{};
  header.magic = kPlanMagic;
  header.version = kPlanVersion;
  const uint64_t key = CaptureKey(params);
  header.capture_key[0] = static_cast<uint32_t>(key);
  header.capture_key[1] = static_cast<uint32_t>(key >> 32);
  header.bytes_used = static_cast<int32_t>(bytes);
  header.num_ctas = params.num_ctas;
  header.num_requests = header.num_kv_lists = num_requests;
  header.num_tokens = qo_indptr[num_requests];
  header.num_kv_heads = params.num_kv_heads;
  header.group_size = params.num_qo_heads / params.num_kv_heads;
  header.num_works = layout.num_placements;
  header.num_merges = layout.num_merges;
  header.num_merge_slots = layout.num_merge_slots;
  header.num_partial_rows = static_cast<int32_t>(layout.num_partial_rows);
  header.band = params.band;
  header.num_tile_classes = params.num_tile_classes;
  header.makespan = layout.makespan;
  header.total_cost = layout.total_cost;

  PlanWriter writer(out);
  Work* works = writer.Array<Work>(layout.num_placements, &header.works_offset);
  int32_t* work_indptr = writer.Array<int32_t>(params.num_ctas + 1, &header.work_indptr_offset);
  writer.Copy(layout.merges.data(), layout.num_merges, &header.merges_offset);
  writer.Copy(layout.merge_indptr.data(), layout.num_merges + 1, &header.merge_indptr_offset);
  writer.Copy(layout.merge_slots.data(), layout.num_merge_slots, &header.merge_slots_offset);
  writer.Copy(qo_indptr, num_requests + 1, &header.qo_indptr_offset);
  writer.Copy(kv_len, num_requests, &header.kv_len_offset);
  writer.Copy(params.tile_classes, params.num_tile_classes, &header.tile_classes_offset);
  TVM_INFER_ICHECK(writer.offset() == bytes);

  // Works of a CTA in the order of items: CTAs walk the requests in the same order and meet in the same keys.
  std::fill_n(work_indptr, params.num_ctas + 1, 0);
  for (int32_t i = 0; i < layout.num_placements; ++i) ++work_indptr[layout.placements[i].cta + 1];
  for (int32_t c = 0; c < params.num_ctas; ++c) work_indptr[c + 1] += work_indptr[c];
  s.cursor.Reserve(params.num_ctas);
  std::copy_n(work_indptr, params.num_ctas, s.cursor.data());
  for (int32_t item = 0; item < s.num_items; ++item) {
    for (int32_t i = layout.item_begin[item]; i < layout.item_end[item]; ++i) {
      const Placement& placement = layout.placements[i];
      Work& work = works[s.cursor[placement.cta]++];
      work = s.item_work[item];
      work.kv_head_begin = placement.kv_head_begin;
      work.num_kv_heads = placement.num_kv_heads;
      work.kv_begin = placement.kv_begin;
      work.kv_end = placement.kv_end;
      work.out = placement.out;
      work.merge = placement.merge;
    }
  }
  std::memcpy(out, &header, sizeof(header));
  return bytes;
}

// Every batch within the limits: MaxTiles grows with requests and tokens, LayoutBounds with items.
// Under a fixed split size S a tile of request r has at most ceil(kv_len[r] / S) <= 1 + (kv_len[r] - 1) / S pieces; with 1 + a tiles
// and 1 + b pieces for request r, sum(a) <= A and sum(b) <= B give sum((1 + a)(1 + b)) <= requests + A + B + A * B.
PlanCapacity ComputeCapacity(const PlanParams& params, const PlanLimits& limits) {
  CheckParams(params);
  if (limits.max_requests < 0 || limits.max_tokens < 0 || limits.max_kv_tokens < 0) {
    TVM_INFER_THROW(ArgumentError) << "limits are (max_requests " << limits.max_requests << ", max_tokens " << limits.max_tokens
                                   << ", max_kv_tokens " << limits.max_kv_tokens << "); they must be >= 0";
  }
  const int64_t group = params.num_qo_heads / params.num_kv_heads;
  const int64_t max_rows = limits.max_tokens * group;
  const int64_t rows_of_tile = params.tile_classes[params.num_tile_classes - 1].rows;
  const int64_t active = std::min(limits.max_requests, limits.max_tokens);  // requests with a query token
  const int64_t tiles = MaxTiles(active, max_rows, rows_of_tile);
  PlanCapacity capacity{};
  Bounds bounds = LayoutBounds(params, tiles, 0);
  if (params.fixed_split_size > 0 && active > 0) {
    const int64_t more_pieces = limits.max_kv_tokens / params.fixed_split_size;
    const int64_t items = tiles + more_pieces * (1 + tiles - active);
    bounds = LayoutBounds(params, items, items);
    bounds.placements = std::max(bounds.placements, LayoutBounds(params, items, 0).placements);
    if (more_pieces > 0) capacity.partial_rows = max_rows * (1 + more_pieces) * params.num_kv_heads;
  } else {
    capacity.partial_rows = active == 0 ? 0 : bounds.merge_slots * std::min(rows_of_tile, max_rows);
  }
  if (active == 0) bounds = {0, 0, 0};
  capacity.plan_bytes =
      PlanBytes(bounds.placements, params.num_ctas, bounds.merges, bounds.merge_slots, limits.max_requests, params.num_tile_classes);
  return capacity;
}

}  // namespace tvm_infer
