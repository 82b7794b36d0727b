#include "tvm_infer/schedule/items.h"

#include <algorithm>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>

#include "tvm_infer/error.h"

namespace tvm_infer {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
// Sums of a few costs stay within int64. 2^60 ps are 13 days.
constexpr double kMaxTotalCost = 1152921504606846976.0;

// "kv_len[3]", or of a batch with a list for each KV head "kv_len[3, 1]".
std::string NameOf(const Batch& batch, int32_t request, int32_t list) {
  const std::string of_head = batch.lists_per_request > 1 ? ", " + std::to_string(list % batch.lists_per_request) : std::string();
  return "kv_len[" + std::to_string(request) + of_head + "]";
}

[[noreturn]] void ThrowBadRequest(const Batch& batch, int32_t r) {
  const int32_t* qo_indptr = batch.qo_indptr;
  const int32_t qo_len = qo_indptr[r + 1] - qo_indptr[r];
  if (qo_indptr[r + 1] < qo_indptr[r]) {
    TVM_INFER_THROW(ArgumentError) << "qo_indptr[" << r + 1 << "] is " << qo_indptr[r + 1] << ", less than qo_indptr[" << r
                                   << "] = " << qo_indptr[r] << "; qo_indptr must not decrease: it is the running sum of query lengths";
  }
  int32_t list = r * batch.lists_per_request;
  while (batch.kv_len[list] >= 0 && list + 1 < (r + 1) * batch.lists_per_request && batch.kv_len[list] >= qo_len) ++list;
  const std::string name = NameOf(batch, r, list);
  if (batch.kv_len[list] < 0) TVM_INFER_THROW(ArgumentError) << name << " is " << batch.kv_len[list] << "; lengths must be at least 0";
  TVM_INFER_THROW(ArgumentError) << name << " is " << batch.kv_len[list] << ", less than the request's " << qo_len
                                 << " query tokens; a band with an end on the right (causal, a right window, chunks) "
                                 << "needs kv_len >= qo_len: kv_len counts the new tokens too";
}

// f(lists_per_request), as a constant where it is 1: a loop over lists costs a batch without them a tenth of planning.
template <typename F>
void WithLists(const Batch& batch, const F& f) {
  if (batch.lists_per_request == 1) {
    f(std::integral_constant<int32_t, 1>());
  } else {
    f(batch.lists_per_request);
  }
}

// Checks all lengths and returns the largest kv_len.
int32_t CheckLengths(const PlanParams& p, const Batch& batch) {
  const int32_t *qo_indptr = batch.qo_indptr, *kv_len = batch.kv_len;
  if (qo_indptr[0] != 0) {
    TVM_INFER_THROW(ArgumentError) << "qo_indptr[0] is " << qo_indptr[0] << "; it must be 0: requests are packed from the first token on";
  }
  const bool needs_keys = p.band.has_end();
  const auto is_bad = [=](int32_t r, auto lists, int32_t* longest) {  // without a branch
    const int64_t qo_len = int64_t{qo_indptr[r + 1]} - qo_indptr[r];
    bool bad = qo_len < 0;
    for (int32_t l = r * lists; l < (r + 1) * lists; ++l) {
      bad |= (kv_len[l] < 0) | (needs_keys & (kv_len[l] < qo_len));
      *longest = std::max(*longest, kv_len[l]);
    }
    return bad;
  };
  bool bad = false;  // one branch for all requests
  int32_t max_kv_len = 0;
  WithLists(batch, [&](auto lists) {
    bool some = false;
    int32_t longest = 0;
    for (int32_t r = 0; r < batch.num_requests; ++r) some |= is_bad(r, lists, &longest);
    bad = some, max_kv_len = longest;
  });
  if (p.band.right > 0 && max_kv_len > kMaxInt32 - p.band.right - 1) {  // executors add positions and the width in 32 bits
    TVM_INFER_THROW(ArgumentError) << "window_right is " << p.band.right << " with a request of " << max_kv_len
                                   << " keys; the two must stay below 2^31 together: -1 is a window of all keys";
  }
  for (int32_t r = 0; bad && r < batch.num_requests; ++r) {
    if (is_bad(r, batch.lists_per_request, &max_kv_len)) ThrowBadRequest(batch, r);
  }
  return max_kv_len;
}

// Items of the batch, at most. Throws if plans, costs or loads could leave their types.
int64_t BoundItems(const PlanParams& p, const Batch& batch, int64_t max_kv_len) {
  const int64_t group = p.num_qo_heads / p.num_kv_heads, lists = batch.lists_per_request;
  const int32_t* qo_indptr = batch.qo_indptr;
  const int64_t rows = batch.num_tokens() * group;
  const int64_t sinks = p.band.num_sink > 0 ? 1 : 0;  // a piece more for each tile, or a work
  int64_t bound = lists * MaxTiles(p, std::min(batch.num_requests, batch.num_tokens()), rows);
  if (p.fixed_split_size > 0) {  // far below tiles * pieces of the longest, where one long request stands among many short ones
    bound = 0;
    for (int32_t r = 0; r < batch.num_requests; ++r) {
      const int64_t qo_len = qo_indptr[r + 1] - qo_indptr[r], tiles = qo_len > 0 ? MaxTiles(p, 1, qo_len * group) : 0;
      for (int64_t l = r * lists; l < (r + 1) * lists; ++l) {
        bound += tiles * (std::max<int64_t>(1, CeilDiv(batch.kv_len[l], p.fixed_split_size)) + sinks);
      }
    }
  }
  double max_cost = 1;
  for (int32_t c = 0; c < p.num_tile_classes; ++c) {
    const TileClass& t = p.tile_classes[c];
    max_cost = std::max(max_cost, static_cast<double>(t.fixed) + static_cast<double>(t.row) * t.rows +
                                      static_cast<double>(t.kv) * static_cast<double>(ChargedKeys(t, max_kv_len)));
  }
  const int64_t max_bound = kMaxInt32 / p.num_kv_heads >> sinks;
  const double max_total = max_cost * static_cast<double>((bound + 1) << sinks) * p.num_kv_heads;
  if (rows > kMaxInt32 || bound > max_bound || max_total > kMaxTotalCost) {
    TVM_INFER_THROW(ArgumentError) << "qo_indptr and kv_len make a batch too large for one plan: " << rows << " packed rows (limit "
                                   << kMaxInt32 << "), up to " << bound << " tiles (limit " << max_bound << "), cost up to " << max_total
                                   << " ps (limit " << kMaxTotalCost
                                   << "); plan fewer requests or tokens at once, or use a larger fixed_split_size";
  }
  return bound;
}

}  // namespace

int64_t Items::Check(const PlanParams& p, const Batch& batch) { return BoundItems(p, batch, CheckLengths(p, batch)); }

void Items::Start(const PlanParams& p, int64_t max_items) {
  work.Reserve(max_items);
  cost.Reserve(max_items);
  sink.Reserve(max_items);
  cut_tiles.Reserve(p.fixed_split_size > 0 ? max_items / 2 : 0);
  count = num_cut_tiles = num_cut_items = num_tree_merges = 0;
  total_cost = max_cost = max_overhead = max_granule_cost = max_merge = 0;
}

// Row tiles of a request against one of its `lists`: the only one, or that of KV head `list`.
inline void Items::AddTilesOf(const PlanParams& p, const Batch& batch, int32_t group, int32_t r, int32_t lists, int32_t list) {
  const int32_t kv_list = r * lists + list;
  const int32_t qo_len = batch.qo_indptr[r + 1] - batch.qo_indptr[r];
  const int32_t num_rows = qo_len * group, row0 = batch.qo_indptr[r] * group, kv = batch.kv_len[kv_list];
  const int64_t pos0 = int64_t{kv} - qo_len;  // of the request's first query token
  const int32_t tile_class = ClassOf(p, num_rows);
  const TileClass& t = p.tile_classes[tile_class];
  max_granule_cost = std::max(max_granule_cost, t.kv * t.kv_granule);
  max_merge = std::max(max_merge, MergePrice(t, std::min(t.rows, num_rows)));
  for (int32_t row = 0; row < num_rows;) {
    const int32_t rows = std::min(t.rows, num_rows - row);
    // Positions of the tile's first and last token. Divisions only where a request has several tiles.
    const bool is_whole = rows == num_rows;
    const int64_t first = is_whole ? pos0 : pos0 + row / group;
    const int64_t last = is_whole ? kv - 1 : pos0 + (row + rows - 1) / group;
    const SeenKeys keys = KeysSeen(p.band, first, last, kv);
    const Work tile{.row_begin = row0 + row,
                    .num_rows = rows,
                    .kv_head_begin = list,
                    .num_kv_heads = p.num_kv_heads,
                    .kv_list = kv_list,
                    .kv_begin = keys.begin,
                    .kv_end = keys.end,
                    .merge_tiles = 0,
                    .qo_pos_base = static_cast<int32_t>(first),
                    .tile_class = tile_class,
                    .out = kFinalRows,
                    .merge = kNoMerge};
    if (p.fixed_split_size > 0) {
      AddPieces(p, tile, keys.sink);
    } else {
      AddTile(p, tile, keys.sink);
    }
    row += rows;
  }
}

void Items::Build(const PlanParams& p, const Batch& batch, int64_t max_items) {
  Start(p, max_items);
  const int32_t group = p.num_qo_heads / p.num_kv_heads;
  WithLists(batch, [&](auto lists) {
    for (int32_t r = 0; r < batch.num_requests; ++r) {
      if (batch.qo_indptr[r + 1] == batch.qo_indptr[r]) continue;
      for (int32_t list = 0; list < lists; ++list) AddTilesOf(p, batch, group, r, lists, list);
    }
  });
  Sort();
}

// The tile's keys, cut at multiples of the fixed split size counted from key 0: cuts depend on nothing else.
void Items::AddPieces(const PlanParams& p, const Work& tile, int32_t tile_sink) {
  const TileClass& t = p.tile_classes[tile.tile_class];
  max_overhead = std::max(max_overhead, t.fixed + t.row * tile.num_rows);
  const int32_t first_item = count;
  const int64_t max_sink_piece = tile_sink == 0 ? 0 : AddPiecesOf(p, tile, 0, tile_sink);
  const int64_t max_piece = std::max(max_sink_piece, AddPiecesOf(p, tile, tile.kv_begin, tile.kv_end));
  const int32_t pieces = count - first_item;
  if (pieces == 1) return;
  for (int32_t i = first_item; i < count; ++i) work[i].merge = num_cut_tiles;
  cut_tiles[num_cut_tiles++] = {first_item, pieces, max_piece};
  num_cut_items += pieces;
}

// Returns what the dearest of them costs. At least one, also of no keys.
int64_t Items::AddPiecesOf(const PlanParams& p, const Work& tile, int32_t begin, int32_t end) {
  const TileClass& t = p.tile_classes[tile.tile_class];
  int64_t max_piece = 0;
  do {
    const int64_t next_cut = (int64_t{begin} / p.fixed_split_size + 1) * p.fixed_split_size;
    const auto piece_end = static_cast<int32_t>(std::min<int64_t>(end, next_cut));
    const int64_t c = CostOf(t, t.fixed + t.row * tile.num_rows, piece_end - begin);
    work[count] = tile;
    work[count].kv_begin = begin;
    work[count].kv_end = piece_end;
    sink[count] = 0;
    cost[count++] = c;
    total_cost += c;
    max_piece = std::max(max_piece, c);
    begin = piece_end;
  } while (begin < end);
  max_cost = std::max(max_cost, max_piece);
  return max_piece;
}

// Longest first, ties by index. Costs are compared in units of 2^shift, at most max_cost / 2^15: two counting passes instead of a
// comparison sort, and no finer difference moves the makespan.
void Items::Sort() {
  sort_key_.Reserve(count);
  order.Reserve(count);
  order_tmp_.Reserve(count);
  int shift = 0;
  while ((max_cost >> shift) > 0xffff) ++shift;
  int32_t low[256] = {}, high[256] = {};
  for (int32_t i = 0; i < count; ++i) {
    const auto key = static_cast<uint16_t>(0xffff - (cost[i] >> shift));
    sort_key_[i] = key;
    ++low[key & 0xff];
    ++high[key >> 8];
  }
  int32_t low_sum = 0, high_sum = 0;
  for (int b = 0; b < 256; ++b) {
    low_sum += std::exchange(low[b], low_sum);
    high_sum += std::exchange(high[b], high_sum);
  }
  for (int32_t i = 0; i < count; ++i) order_tmp_[low[sort_key_[i] & 0xff]++] = i;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t item = order_tmp_[i];
    order[high[sort_key_[item] >> 8]++] = item;
  }
}

}  // namespace tvm_infer
