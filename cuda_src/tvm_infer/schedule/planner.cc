// How a plan is made: lengths become items (items.h), items are laid onto CTAs whole and, if that leaves CTAs idle, with KV cut
// (layout.h); the better layout is written out, works of one CTA together. Where requests share keys, the same is tried with shared works
// (forest.h), and taken where it is shorter. All costs are int64 picoseconds.
#include "tvm_infer/schedule/planner.h"

#include <algorithm>
#include <limits>

#include "tvm_infer/error.h"
#include "tvm_infer/schedule/attempt.h"
#include "tvm_infer/schedule/forest.h"
#include "tvm_infer/schedule/plan_writer.h"

namespace tvm_infer {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
// Shared works must shorten the plan by what their merges cost and by this fraction: costs are measured in plans of one kind of work.
constexpr int64_t kMinSharedGainFraction = 16;

}  // namespace

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
  constexpr int64_t kMaxCost = int64_t{1} << 40;
  if (p.shared_merge.has_value()) {
    const auto [each, once, again] = *p.shared_merge;
    if (std::min(each, once) < 0 || std::max(each, once) > kMaxCost) {
      TVM_INFER_THROW(ArgumentError) << "shared_merge is (each " << each << ", once " << once << "); costs must be from 0 to 2^40 ps";
    }
    if (again < 0 || again > 1000) {
      TVM_INFER_THROW(ArgumentError) << "shared_merge has again " << again << "; it must be from 0 to 1000 thousandths of a key's cost";
    }
  }
  for (int32_t c = 0; c < p.num_tile_classes; ++c) {
    const TileClass& t = p.tile_classes[c];
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

struct Planner::Scratch {
  Attempt flat, shared;
  Forest forest;
  ScratchArray<int32_t> cursor;  // next free work of each CTA

  void LayFlat(const PlanParams& p, const Batch& batch, int64_t max_items);
  int64_t SharedLimit(const PlanParams& p, int64_t flat_makespan) const;
  bool TryShared(const PlanParams& p, const Batch& batch, const SharedRuns& runs, int64_t max_items);
};

void Planner::Scratch::LayFlat(const PlanParams& p, const Batch& batch, int64_t max_items) {
  flat.items.Build(p, batch, max_items);
  flat.Lay(p);
}

// What a plan with shared works must be shorter than, beside a flat one of this makespan, which takes less where requests read the same
// keys. It never falls as the makespan grows: a bound of that gives a bound of it.
int64_t Planner::Scratch::SharedLimit(const PlanParams& p, int64_t flat_makespan) const {
  const int64_t merges = CeilDiv(forest.merge_price() * p.num_kv_heads, p.num_ctas) + p.shared_merge->once;
  const int64_t saved = CeilDiv(forest.reread_cost() / 1000 * (1000 - p.shared_merge->again) * p.num_kv_heads, p.num_ctas);
  const int64_t flat = flat_makespan - saved;
  return flat - flat / kMinSharedGainFraction - merges;
}

namespace {

// False: no layout of the items is shorter than `limit`. All CTAs together have to do the items' work; of a head that takes longer the
// pieces take less each, and have an overhead each.
bool MayBeShorter(const PlanParams& p, const Items& items, int64_t limit) {
  double load = static_cast<double>(items.total_cost);
  for (int32_t i = 0; items.max_cost >= limit && i < items.count; ++i) {
    if (items.cost[i] < limit) continue;
    const TileClass& t = p.tile_classes[items.work[i].tile_class];
    const int64_t overhead = t.fixed + t.row * items.work[i].num_rows;
    if (overhead >= limit) return false;
    const int64_t pieces = CeilDiv(items.cost[i] - overhead, limit - overhead);
    load += static_cast<double>(pieces - 1) * static_cast<double>(overhead);
  }
  constexpr double kRounding = 1.0 + 1e-9;
  return load * p.num_kv_heads < static_cast<double>(limit) * p.num_ctas * kRounding;
}

}  // namespace

// True: `shared` is laid, and better. Otherwise `flat` may be laid, or not yet. One layout decides where bounds do: they rule the other
// out, or need none beside it.
bool Planner::Scratch::TryShared(const PlanParams& p, const Batch& batch, const SharedRuns& runs, int64_t max_items) {
  flat.layout = nullptr;
  if (runs.num_runs == 0) return false;
  TVM_INFER_ICHECK(p.band.IsSharable() && p.fixed_split_size == kSplitAuto && p.shared_merge.has_value())
      << "; keys of a window, or cut at a fixed size, or without costs of their merges, are not shared";
  if (!forest.Build(p, batch.qo_indptr, batch.kv_len, batch.num_requests, runs)) return false;
  forest.MakeItems(p, &shared.items);
  int64_t limit = SharedLimit(p, CeilDiv(forest.flat_cost() * p.num_kv_heads, p.num_ctas));  // by the least that a flat plan takes
  if (!MayBeShorter(p, shared.items, limit)) {
    LayFlat(p, batch, max_items);
    limit = SharedLimit(p, flat.layout->makespan);
    if (!MayBeShorter(p, shared.items, limit)) return false;
  }
  shared.items.Sort();
  shared.Lay(p);
  if (shared.layout->makespan < limit) return true;
  if (flat.layout != nullptr) return false;
  LayFlat(p, batch, max_items);
  return shared.layout->makespan < SharedLimit(p, flat.layout->makespan);
}

Planner::Planner() : scratch_(std::make_unique<Scratch>()) {}
Planner::~Planner() = default;

namespace {

void CheckNumRequests(int32_t num_requests) {
  if (num_requests < 0) TVM_INFER_THROW(ArgumentError) << "num_requests is " << num_requests << "; it must be at least 0";
}

void CheckHeadLists(const PlanParams& p, int32_t num_requests) {
  if (p.band.has_begin() || p.band.num_sink > 0 || p.band.right > 0) {
    TVM_INFER_THROW(ArgumentError) << "band is (" << p.band.left << ", " << p.band.right << "), num_sink " << p.band.num_sink << ", chunk "
                                   << p.band.chunk
                                   << " with a list of keys for each KV head; such a plan is causal or sees all keys of a list: leave out "
                                      "of the lists what a window hides";
  }
  if (int64_t{num_requests} * p.num_kv_heads > kMaxInt32) {
    TVM_INFER_THROW(ArgumentError) << "num_requests is " << num_requests << " with " << p.num_kv_heads
                                   << " KV heads, each with a list of keys; there may be at most " << kMaxInt32 << " lists";
  }
}

}  // namespace

int64_t Planner::Plan(const PlanParams& params, const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests, void* out,
                      int64_t out_bytes, int64_t max_partial_rows, const SharedRuns& shared) {
  CheckParams(params);
  CheckNumRequests(num_requests);
  const Batch batch{qo_indptr, kv_len, num_requests};
  const int64_t max_items = Items::Check(params, batch);
  Scratch& s = *scratch_;
  s.cursor.Reserve(params.num_ctas);
  if (s.TryShared(params, batch, shared, max_items)) {
    const Layout& layout = *s.shared.layout;
    const int64_t slots = s.forest.CountSlots(s.shared.items, layout, params.num_kv_heads) + layout.num_slots;
    const PlanSizes sizes{layout.num_placements, s.shared.items.num_tree_merges + layout.num_merges, slots,
                          s.forest.token_order() == nullptr ? 0 : batch.num_tokens()};
    const int64_t bytes = PlanBytes(params, sizes, num_requests, num_requests);
    if (bytes <= std::min(out_bytes, kMaxInt32) && layout.num_partial_rows <= max_partial_rows) {
      WritePlan(params, batch, s.shared, &s.forest, sizes, bytes, s.cursor.data(), out);
      return bytes;
    }
  }
  if (s.flat.layout == nullptr) s.LayFlat(params, batch, max_items);
  return WriteFlat(params, batch, out, out_bytes, max_partial_rows);
}

int64_t Planner::PlanHeadLists(const PlanParams& params, const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests, void* out,
                               int64_t out_bytes, int64_t max_partial_rows) {
  CheckParams(params);
  CheckNumRequests(num_requests);
  CheckHeadLists(params, num_requests);
  const Batch batch{qo_indptr, kv_len, num_requests, params.num_kv_heads};
  const PlanParams of_head = OfOneHead(params);
  const int64_t max_items = Items::Check(of_head, batch);
  Scratch& s = *scratch_;
  s.cursor.Reserve(params.num_ctas);
  s.flat.items.Build(of_head, batch, max_items);
  s.flat.Lay(of_head);
  return WriteFlat(params, batch, out, out_bytes, max_partial_rows);
}

// Writes s.flat, which is laid.
int64_t Planner::WriteFlat(const PlanParams& params, const Batch& batch, void* out, int64_t out_bytes, int64_t max_partial_rows) {
  Scratch& s = *scratch_;
  const Layout& layout = *s.flat.layout;
  const PlanSizes sizes{layout.num_placements, layout.num_merges, layout.num_slots};
  const int64_t bytes = PlanBytes(params, sizes, batch.num_requests, batch.num_lists());
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
  WritePlan(params, batch, s.flat, nullptr, sizes, bytes, s.cursor.data(), out);
  return bytes;
}

}  // namespace tvm_infer
