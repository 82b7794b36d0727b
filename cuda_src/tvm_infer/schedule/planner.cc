// How a plan is made: lengths become items (items.h), items are laid onto CTAs whole and, if that leaves CTAs idle, with KV cut
// (layout.h); the better layout is written out, works of one CTA together. All costs are int64 picoseconds.
#include "tvm_infer/schedule/planner.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "tvm_infer/error.h"
#include "tvm_infer/schedule/items.h"
#include "tvm_infer/schedule/layout.h"

namespace tvm_infer {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
// Cutting KV must shorten the plan by what a merge costs (what its pieces cost is in their load) and by this fraction of
// the mean load, below which a prediction says nothing.
constexpr int64_t kMinGainFraction = 128;
// The target without cuts exceeds the mean load by no more than this fraction.
constexpr int64_t kMaxSlackFraction = 64;

int64_t Align16(int64_t bytes) { return (bytes + 15) & ~int64_t{15}; }

void CheckParams(const PlanParams& p) {
  if (p.num_ctas < 1) TVM_INFER_THROW(ArgumentError) << "num_ctas is " << p.num_ctas << "; a plan needs at least 1 CTA";
  if (p.num_kv_heads < 1) TVM_INFER_THROW(ArgumentError) << "num_kv_heads is " << p.num_kv_heads << "; it must be at least 1";
  if (p.num_qo_heads < 1 || p.num_qo_heads % p.num_kv_heads != 0) {
    TVM_INFER_THROW(ArgumentError) << "num_qo_heads is " << p.num_qo_heads
                                   << "; it must be a positive multiple of num_kv_heads = " << p.num_kv_heads
                                   << ": every KV head serves a group of query heads";
  }
  if (p.fixed_split_size < kSplitNever) {
    TVM_INFER_THROW(ArgumentError) << "fixed_split_size is " << p.fixed_split_size
                                   << "; it must be positive (keys), 0 (split where it shortens the plan) or -1 (never split)";
  }
  if (p.band.left < kUnbounded || p.band.right < kUnbounded) {
    TVM_INFER_THROW(ArgumentError) << "band is (" << p.band.left << ", " << p.band.right
                                   << "); each side must be a number of keys, at least 0, or -1 for all";
  }
  if (p.band.num_sink < 0) {
    TVM_INFER_THROW(ArgumentError) << "num_sink is " << p.band.num_sink << "; it must be a number of keys, at least 0";
  }
  if (p.band.chunk < 0) {
    TVM_INFER_THROW(ArgumentError) << "chunk is " << p.band.chunk << "; it must be a number of positions, or 0 for no chunks";
  }
  if (p.band.num_sink > 0 && !p.band.has_begin()) {
    TVM_INFER_THROW(ArgumentError) << "num_sink is " << p.band.num_sink
                                   << " with window_left -1 and no chunk; sinks are seen beside a window or a chunk: give one of them, "
                                      "or num_sink 0, where all keys are seen";
  }
  if (p.num_tile_classes < 1) {
    TVM_INFER_THROW(ArgumentError) << "tile_classes is empty; a plan needs at least one tile class of its executor";
  }
  for (int32_t c = 0; c < p.num_tile_classes; ++c) {
    const TileClass& t = p.tile_classes[c];
    constexpr int64_t kMaxCost = int64_t{1} << 40;
    if (t.rows < 1 || t.kv_granule < 1 || std::min({t.fixed, t.row, t.kv - 1}) < 0 || std::max({t.fixed, t.row, t.kv}) > kMaxCost) {
      TVM_INFER_THROW(ArgumentError) << "tile_classes[" << c << "] is (rows " << t.rows << ", kv_granule " << t.kv_granule << ", fixed "
                                     << t.fixed << ", row " << t.row << ", kv " << t.kv
                                     << "); rows, kv_granule and kv must be at least 1, fixed and row at least 0, costs at most 2^40 ps";
    }
    if (c > 0 && t.rows <= p.tile_classes[c - 1].rows) {
      TVM_INFER_THROW(ArgumentError) << "tile_classes[" << c << "].rows is " << t.rows << " after " << p.tile_classes[c - 1].rows
                                     << "; classes must be ascending in rows";
    }
  }
}

int64_t PlanBytes(const PlanParams& p, const LayoutBounds& sizes, int64_t num_requests) {
  return Align16(sizeof(PlanHeader)) + (p.num_ctas + sizes.placements) * int64_t{sizeof(Work)} + Align16((int64_t{p.num_ctas} + 1) * 4) +
         sizes.merges * int64_t{sizeof(Merge)} + Align16((sizes.merges + 1) * 4) + Align16(sizes.partials * 4) +
         Align16((num_requests + 1) * 4) + Align16(num_requests * 4) + p.num_tile_classes * int64_t{sizeof(TileClass)} +
         Align16((kNumTickets + sizes.merges) * 4);
}

uint64_t Mix(uint64_t state, uint64_t value) {  // the finaliser of splitmix64 over a running state
  uint64_t z = state + 0x9e3779b97f4a7c15u + value;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// The lowest target at which cutting every head alike, one piece a CTA, needs no more pieces than CTAs; `limit` if none is below.
// Such a cut is the best there is for a few long requests (8 heads of 8192 keys on 132 CTAs: 16 pieces of 512 keys each). Targets are
// tried in steps of the longest item's granule, between the mean load and the limit.
int64_t RegularTarget(const PlanParams& p, const Items& items, int64_t mean, int64_t limit) {
  const auto pieces_at = [&](int64_t target) {
    int64_t pieces = 0;
    for (int32_t i = 0; i < items.count; ++i) {
      const Work& work = items.work[i];
      const TileClass& t = p.tile_classes[work.tile_class];
      if (items.cost[i] <= target) {
        ++pieces;
        continue;
      }
      const int64_t room = target - t.fixed - t.row * work.num_rows, granule_cost = t.kv * t.kv_granule;
      const int64_t fit = room / granule_cost * t.kv_granule;
      // The first piece, beside the sinks.
      const int64_t first_fit = (room - SinkCost(t, work.num_rows, items.sink[i])) / granule_cost * t.kv_granule;
      if (first_fit < 1) return kMaxInt32;
      pieces += 1 + CeilDiv(work.kv_end - work.kv_begin - first_fit, fit);
    }
    return pieces * p.num_kv_heads;
  };
  const Work& longest = items.work[items.order[0]];
  const TileClass& t = p.tile_classes[longest.tile_class];
  const int64_t overhead = t.fixed + t.row * longest.num_rows + SinkCost(t, longest.num_rows, items.sink[items.order[0]]);
  const int64_t step = t.kv * t.kv_granule;
  int64_t low = std::max<int64_t>(1, CeilDiv(mean - overhead, step)), high = (limit - overhead) / step + 1;  // in granules
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (pieces_at(overhead + middle * step) <= p.num_ctas) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return std::min(limit, overhead + low * step);
}

// CTAs with works, if all are of the smallest of several classes; else 0 (PlanHeader::paced_ctas).
int32_t PacedCtas(const PlanParams& p, const Work* works, const int32_t* work_indptr) {
  if (p.num_tile_classes == 1) return 0;
  if (std::any_of(works, works + work_indptr[p.num_ctas], [](const Work& work) { return work.tile_class != 0; })) return 0;
  int32_t ctas = 0;
  for (int32_t c = 0; c < p.num_ctas; ++c) ctas += work_indptr[c] < work_indptr[c + 1];
  return ctas;
}

// Hands out the arrays of a plan in turn and zeroes the padding after each, so that equal input gives equal bytes.
class PlanWriter {
 public:
  explicit PlanWriter(void* out) : base_(static_cast<char*>(out)), offset_(Align16(sizeof(PlanHeader))) {}
  template <typename T>
  T* Array(int64_t count, int32_t* offset) {
    char* array = base_ + offset_;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    *offset = count == 0 ? 0 : static_cast<int32_t>(offset_);
    std::memset(array + bytes, 0, Align16(bytes) - bytes);
    offset_ += Align16(bytes);
    return reinterpret_cast<T*>(array);
  }
  template <typename T>
  void Copy(const T* from, int64_t count, int32_t* offset) {
    T* array = Array<T>(count, offset);
    if (count > 0) std::memcpy(array, from, count * sizeof(T));
  }

 private:
  char* base_;
  int64_t offset_;
};

}  // namespace

struct Planner::Scratch {
  Items items;
  Layout whole, cut;
  ScratchArray<int32_t> cursor;  // next free work of each CTA

  const Layout& Choose(const PlanParams& p);
  void WriteWorks(const PlanParams& p, const Layout& layout, Work* works, int32_t* work_indptr);
};

// The layout without cuts, unless one with cuts is shorter by more than a merge costs.
//
// Targets of layouts with cuts, lowest first; with o the overhead of a piece and g the cost of a granule:
//   mean + o + 2 g      is always enough: a CTA where nothing more fits has less than o + 2 g left, or it took a piece that is not its
//                       head's last, which costs o more than without the cut, with less than 2 g left. 3 g, where a window begins
//                       between granules.
//   mean + o + g        mostly is.
//   mean + o + g / 2    may be, and is worth trying where a CTA has a head or two: some end with a whole head, and half a granule is lost
//   at
//                       the others.
const Layout& Planner::Scratch::Choose(const PlanParams& p) {
  const int64_t mean = std::max<int64_t>(1, CeilDiv(items.total_cost * p.num_kv_heads, p.num_ctas));
  const int64_t slack = items.max_overhead + items.max_granule_cost;
  // Little above the mean, for balance where works are few; the first target with cuts where they are many, to share its beginning.
  const int64_t whole_target = mean + std::min(slack, mean / kMaxSlackFraction);
  whole.Lay(p, items, whole_target, false);
  const int64_t min_gain = items.max_merge + mean / kMinGainFraction;
  if (p.fixed_split_size != kSplitAuto || p.num_ctas == 1 || whole.makespan <= mean + min_gain) return whole;

  const int64_t enough = mean + items.max_overhead + (p.band.has_begin() ? 3 : 2) * items.max_granule_cost;
  const int64_t num_heads = int64_t{items.count} * p.num_kv_heads;
  int64_t targets[4] = {mean + slack, enough};
  int num_targets = 2;
  if (num_heads <= 2 * p.num_ctas) targets[num_targets++] = mean + items.max_overhead + items.max_granule_cost / 2;
  if (num_heads <= p.num_ctas) targets[num_targets++] = RegularTarget(p, items, mean, enough);
  std::sort(targets, targets + num_targets);
  if (whole.makespan <= targets[0] + min_gain) return whole;
  for (int i = 0; i < num_targets; ++i) {
    const int64_t target = targets[i];
    if (cut.Lay(p, items, target, true, target == whole_target ? &whole : nullptr))
      return cut.makespan + min_gain < whole.makespan ? cut : whole;
  }
  TVM_INFER_ICHECK(false) << "; no layout with cuts at target " << enough;
  return whole;
}

// Works of a CTA in the order of items: CTAs walk the requests in the same order and meet in the same keys.
void Planner::Scratch::WriteWorks(const PlanParams& p, const Layout& layout, Work* works, int32_t* work_indptr) {
  cursor.Reserve(p.num_ctas);
  std::fill_n(cursor.data(), p.num_ctas, 0);
  for (int32_t i = 0; i < layout.num_placements; ++i) ++cursor[layout.placements[i].cta];
  int32_t sum = 0;
  for (int32_t c = 0; c < p.num_ctas; ++c) {
    work_indptr[c] = sum;
    sum += cursor[c];
    cursor[c] = work_indptr[c];
  }
  work_indptr[p.num_ctas] = sum;
  for (int32_t item = 0; item < items.count; ++item) {
    for (int32_t i = layout.of_item[item].begin; i < layout.of_item[item].end; ++i) {
      const Placement& placement = layout.placements[i];
      Work& work = works[cursor[placement.cta]++];
      work = items.work[item];
      work.kv_head_begin = placement.kv_head_begin;
      work.num_kv_heads = placement.num_kv_heads;
      if (placement.partial < 0) continue;
      const Partial& partial = layout.partials[placement.partial];
      work.kv_begin = partial.kv_begin;
      work.kv_end = partial.kv_end;
      work.out = partial.out;
      work.merge = partial.merge;
    }
  }
}

Planner::Planner() : scratch_(std::make_unique<Scratch>()) {}
Planner::~Planner() = default;

int64_t Planner::Plan(const PlanParams& params, const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests, void* out,
                      int64_t out_bytes, int64_t max_partial_rows) {
  CheckParams(params);
  if (num_requests < 0) TVM_INFER_THROW(ArgumentError) << "num_requests is " << num_requests << "; it must be at least 0";
  scratch_->items.Build(params, qo_indptr, kv_len, num_requests);
  const Layout& layout = scratch_->Choose(params);
  const int64_t bytes = PlanBytes(params, {layout.num_placements, layout.num_merges, layout.num_partials, 0}, num_requests);
  if (bytes > out_bytes || bytes > kMaxInt32) {
    TVM_INFER_THROW(WorkspaceError)
        << "the plan buffer holds " << std::min(out_bytes, kMaxInt32) << " bytes, but the plan of this batch takes " << bytes
        << "; size the buffer for the largest batch by tvm_infer.workspace_size (packed function plan_capacity)";
  }
  if (layout.num_partial_rows > max_partial_rows) {
    TVM_INFER_THROW(WorkspaceError)
        << "max_partial_rows is " << max_partial_rows << ", but the plan of this batch has " << layout.num_partial_rows
        << " partial rows; size the workspace for the largest batch by tvm_infer.workspace_size (packed function plan_capacity)";
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
  header.num_merge_slots = layout.num_partials;
  header.num_partial_rows = static_cast<int32_t>(layout.num_partial_rows);
  header.band = params.band.Tested();
  header.window_left = params.band.left;
  header.num_sink = params.band.num_sink;
  header.chunk = params.band.chunk;
  header.num_tile_classes = params.num_tile_classes;
  header.makespan = layout.makespan;
  header.total_cost = layout.total_cost;

  PlanWriter writer(out);
  int32_t first_works_offset;
  Work* first_works = writer.Array<Work>(params.num_ctas, &first_works_offset);
  Work* works = writer.Array<Work>(header.num_works, &header.works_offset);
  int32_t* work_indptr = writer.Array<int32_t>(params.num_ctas + 1, &header.work_indptr_offset);
  scratch_->WriteWorks(params, layout, works, work_indptr);
  for (int32_t c = 0; c < params.num_ctas; ++c) first_works[c] = work_indptr[c] < work_indptr[c + 1] ? works[work_indptr[c]] : Work{};
  writer.Copy(layout.merges.data(), header.num_merges, &header.merges_offset);
  writer.Copy(layout.merge_indptr.data(), header.num_merges + 1, &header.merge_indptr_offset);
  writer.Copy(layout.merge_slots.data(), header.num_merge_slots, &header.merge_slots_offset);
  writer.Copy(qo_indptr, num_requests + 1, &header.qo_indptr_offset);
  writer.Copy(kv_len, num_requests, &header.kv_len_offset);
  writer.Copy(params.tile_classes, params.num_tile_classes, &header.tile_classes_offset);
  int32_t* tickets = writer.Array<int32_t>(kNumTickets + header.num_merges, &header.tickets_offset);
  std::memset(tickets, 0, (kNumTickets + header.num_merges) * sizeof(int32_t));
  header.paced_ctas = PacedCtas(params, works, work_indptr);
  std::memcpy(out, &header, sizeof(header));
  return bytes;
}

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
PlanCapacity ComputeCapacity(const PlanParams& params, const PlanLimits& limits) {
  CheckParams(params);
  if (limits.max_requests < 0 || limits.max_tokens < 0 || limits.max_kv_tokens < 0) {
    TVM_INFER_THROW(ArgumentError) << "limits are max_requests " << limits.max_requests << ", max_tokens " << limits.max_tokens
                                   << ", max_kv_tokens " << limits.max_kv_tokens << "; each must be at least 0";
  }
  const int64_t rows = int64_t{limits.max_tokens} * (params.num_qo_heads / params.num_kv_heads);
  const int64_t active = std::min(limits.max_requests, limits.max_tokens);  // requests with a query token
  if (active == 0) return {PlanBytes(params, {}, limits.max_requests), 0};
  const bool has_sink = params.band.num_sink > 0;
  const int64_t tiles = MaxTiles(params, active, rows);
  LayoutBounds bounds = BoundLayout(params, tiles, 0);
  const int64_t tile_rows = std::min<int64_t>(rows, params.tile_classes[params.num_tile_classes - 1].rows);
  int64_t partial_rows = has_sink ? 2 * rows * params.num_kv_heads + bounds.cut_partials * tile_rows : bounds.partials * tile_rows;
  if (params.fixed_split_size <= 0) return {PlanBytes(params, bounds, limits.max_requests), partial_rows};

  const int64_t more_pieces = limits.max_kv_tokens / params.fixed_split_size, sink_pieces = has_sink ? 1 : 0;
  if (more_pieces + sink_pieces > 0) {
    // Any of the items may be cut: one work an item and the slack of each kind, but never more than one work a head.
    const int64_t items = tiles * (1 + sink_pieces) + more_pieces * MaxTiles(params, 1, rows);
    const LayoutBounds cut = BoundLayout(params, 0, items);
    const int64_t whole_slack = bounds.placements - tiles;
    bounds = {std::min(items * params.num_kv_heads, cut.placements + whole_slack), cut.merges, cut.partials, 0};
    partial_rows = rows * (1 + sink_pieces + more_pieces) * params.num_kv_heads;
  }
  return {PlanBytes(params, bounds, limits.max_requests), partial_rows};
}

}  // namespace tvm_infer
