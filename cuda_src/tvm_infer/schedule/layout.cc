// Algorithm 1 of arXiv 2501.01005 lays works of one head, longest first, onto the least loaded CTA. Here an item's heads, which all
// cost the same, go there as a run as long as the CTA has room under a target, so that placing costs by CTAs touched, not by heads.
#include "tvm_infer/schedule/layout.h"

#include <algorithm>
#include <limits>

#include "tvm_infer/error.h"

namespace tvm_infer {

// placements, whole items: the last work of every item; runs that end at a full CTA; and for each CTA one overflow (Lay: it leaves the
//   CTA at or above the target, and while items are left some CTA is below). Never more than one for each head.
// cuts (CutHead): each CTA takes at most one piece that is not its head's last (it is closed then, and takes no overflow), so at most
//   num_ctas of these, of at most num_ctas heads, whose last pieces come on top. One CTA has room for everything: no cut.
// sinks: a run of heads is two placements then, both partial, and a merge; a cut head has one placement more.
// cut items: with c the largest piece of a tile, runs have R heads, R = 1 or R >= T / (2 * kRunsPerTarget * c), T the target. Items
//   with R < num_kv_heads have num_kv_heads * c > T / kRunsPerTarget, and then ceil(num_kv_heads / R) - 1 is at most
//   2 * kRunsPerTarget * num_kv_heads * c / T. Of a tile's pieces only the last can be short (with a window the first, too, and with sinks
//   their last), so its pieces times c are at most 2 (3, 4) times their cost, and all cost together is at most num_ctas * T.
LayoutBounds BoundLayout(const PlanParams& p, int64_t whole_items, int64_t cut_items) {
  const int64_t ctas = p.num_ctas, heads = p.num_kv_heads;
  const bool has_sink = p.band.num_sink > 0;
  LayoutBounds b{};
  const int64_t overflow_or_cut = ctas;
  const int64_t runs = std::min(whole_items * heads, whole_items + ctas * kRunCutsPerCta + overflow_or_cut);
  b.placements = runs;
  if (p.fixed_split_size == kSplitAuto && ctas > 1) {
    b.merges = std::min(whole_items * heads, ctas);
    b.cut_partials = ctas;
    b.partials = ctas + b.merges;
    b.placements = std::min(whole_items * heads + ctas, whole_items + ctas * kRunCutsPerCta + overflow_or_cut + b.merges);
  }
  if (has_sink && p.fixed_split_size <= 0) {  // a cut head is a run less
    b.merges = std::min(whole_items * heads, runs + b.merges);
    b.placements += b.merges;
    b.partials = b.cut_partials + 2 * b.merges;
  }
  if (cut_items > 0) {
    const int64_t short_pieces = has_sink ? 4 : p.band.has_begin() ? 3 : 2;
    const int64_t cut_works = std::min(cut_items * heads, cut_items + short_pieces * 2 * kRunsPerTarget * ctas);
    b.placements += cut_works;
    b.partials += cut_works;
    b.merges += cut_works / 2;
  }
  return b;
}

void Layout::Start(const PlanParams& p, const Items& items, int64_t target, const Layout* whole) {
  const LayoutBounds bounds = BoundLayout(p, items.count - items.num_cut_items, items.num_cut_items);
  placements.Reserve(bounds.placements);
  partials.Reserve(items.num_tree_merges > 0 ? bounds.placements : bounds.partials);
  merges.Reserve(bounds.merges);
  merge_indptr.Reserve(bounds.merges + 1);
  merge_slots.Reserve(bounds.partials);
  of_item.Reserve(items.count);
  load_.Reserve(p.num_ctas);
  filled_.Reserve(p.num_ctas);
  misfit_load_.Reserve(p.num_ctas);
  num_placements = num_partials = num_merges = num_slots = 0;
  num_partial_rows = 0;
  first_merge_ = items.num_tree_merges;
  merge_indptr[0] = 0;
  misfit_ = Misfit();
  if (whole == nullptr) {
    std::fill_n(load_.data(), p.num_ctas, int64_t{0});
  } else {
    const Misfit& from = whole->misfit_;
    num_placements = from.num_placements;
    num_partials = from.num_partials;
    num_merges = from.num_merges;
    num_slots = from.num_slots;
    num_partial_rows = from.num_partial_rows;
    std::copy_n(whole->placements.data(), num_placements, placements.data());
    std::copy_n(whole->of_item.data(), items.count, of_item.data());
    std::copy_n(whole->misfit_load_.data(), p.num_ctas, load_.data());
    std::copy_n(whole->partials.data(), num_partials, partials.data());
    std::copy_n(whole->merge_slots.data(), num_slots, merge_slots.data());
    std::copy_n(whole->merges.data(), num_merges, merges.data());
    std::copy_n(whole->merge_indptr.data(), num_merges + 1, merge_indptr.data());
  }
  std::copy_n(load_.data(), p.num_ctas, filled_.data());
  tree_.Reset(load_.data(), p.num_ctas, target + items.max_cost * p.num_kv_heads);
}

bool Layout::Lay(const PlanParams& p, const Items& items, int64_t target, bool may_cut, const Layout* whole) {
  if (whole != nullptr && whole->misfit_.order_index < 0) whole = nullptr;
  Start(p, items, target, whole);
  if (items.num_cut_tiles > 0) PlaceCutTiles(p, items, target);
  const int32_t heads = p.num_kv_heads;
  const int64_t min_room = target >> kRunCutsPerCta;
  int32_t head = whole != nullptr ? whole->misfit_.head : 0;
  int32_t first_of_item = whole != nullptr ? whole->misfit_.first_of_item : 0;
  for (int32_t k = whole != nullptr ? whole->misfit_.order_index : 0; k < items.count; ++k) {
    const int32_t item = items.order[k];
    const int64_t cost = items.cost[item];
    if (items.num_cut_tiles > 0 && items.work[item].merge != kNoMerge) {
      PlacePiece(p, items, item);
      head = heads;
    }
    while (head < heads) {
      const int32_t cta = tree_.Min();
      const int64_t room = target - filled_[cta];
      int32_t n = heads - head;
      if (n * cost > room) {
        const bool fits = cost <= room;
        if (!fits && may_cut) {
          if (!CutHead(p, items, target, item, head++)) return false;
          continue;
        }
        if (!fits && misfit_.order_index < 0) {
          misfit_ = {k, head, num_placements, first_of_item, num_partials, num_merges, num_slots, num_partial_rows};
          std::copy_n(load_.data(), p.num_ctas, misfit_load_.data());
        }
        // Heads that fit, and one on top where none does or where hardly any room is left: a CTA exceeds the target at most once.
        n = fits ? static_cast<int32_t>(room / cost) + (room <= min_room) : 1;
      }
      PlaceRun(items, item, cta, head, n);
      load_[cta] += n * cost;
      filled_[cta] += n * cost;
      tree_.Set(cta, filled_[cta]);
      head += n;
    }
    of_item[item] = {first_of_item, num_placements};
    first_of_item = num_placements;
    head = 0;
  }
  makespan = total_cost = 0;
  for (int32_t c = 0; c < p.num_ctas; ++c) {
    makespan = std::max(makespan, load_[c]);
    total_cost += load_[c];
  }
  return true;
}

// Heads whose keys are computed whole: one work, final if no other works have keys of these rows, or two partial ones where sinks lie
// apart. Both on one CTA, whose cache still holds the first's results when it merges them with the second's.
void Layout::PlaceRun(const Items& items, int32_t item, int32_t cta, int32_t head, int32_t num_heads) {
  // NOTE: an item's 48 bytes of Work are not looked at where they decide nothing.
  const bool is_whole = items.num_tree_merges == 0 || items.work[item].merge_tiles == 0;
  if (items.sink[item] == 0 && is_whole) {
    placements[num_placements++] = {cta, head, num_heads, -1};
    return;
  }
  const Work& work = items.work[item];
  if (items.sink[item] == 0) return AddPartial(work, cta, head, num_heads, work.kv_begin, work.kv_end);
  AddPartial(work, cta, head, num_heads, 0, items.sink[item]);
  AddPartial(work, cta, head, num_heads, work.kv_begin, work.kv_end);
  EndMerge(work, head, num_heads);
}

// A partial of the merge that EndMerge will end; they come in ascending order of keys. Or of the merges of tiles that share keys.
void Layout::AddPartial(const Work& work, int32_t cta, int32_t head, int32_t num_heads, int64_t kv_begin, int64_t kv_end) {
  const auto slot = static_cast<int32_t>(num_partial_rows);
  placements[num_placements++] = {cta, head, num_heads, num_partials};
  Partial& partial = partials[num_partials++] = {static_cast<int32_t>(kv_begin), static_cast<int32_t>(kv_end), slot, 0};
  if (work.merge_tiles > 0) {
    partial.merge = work.merge * work.num_kv_heads + head;
  } else {
    partial.merge = first_merge_ + num_merges;
    merge_slots[num_slots++] = slot;
  }
  num_partial_rows += int64_t{num_heads} * work.num_rows;
  if (num_partial_rows > std::numeric_limits<int32_t>::max()) {
    TVM_INFER_THROW(ArgumentError) << "qo_indptr makes a batch of more than " << std::numeric_limits<int32_t>::max()
                                   << " partial rows, two for each query head of a token that sees sinks; plan fewer tokens at once";
  }
}

void Layout::EndMerge(const Work& work, int32_t head, int32_t num_heads) {
  if (work.merge_tiles > 0) return;
  merges[num_merges++] = {work.row_begin, work.num_rows, work.kv_head_begin + head, num_heads};
  merge_indptr[num_merges] = num_slots;
}

// Spreads one head's keys over the least loaded CTAs. A CTA that takes a piece other than the last is filled by it, up to a granule. Sinks
// go with the first piece.
bool Layout::CutHead(const PlanParams& p, const Items& items, int64_t target, int32_t item, int32_t head) {
  const Work& work = items.work[item];
  const TileClass& t = p.tile_classes[work.tile_class];
  const int64_t overhead = t.fixed + t.row * work.num_rows;
  const int64_t granule = t.kv_granule;
  const int32_t sink = items.sink[item];
  int64_t sink_cost = SinkCost(t, work.num_rows, sink);
  int64_t begin = work.kv_begin;
  for (bool is_last = false; !is_last; sink_cost = 0) {
    const int32_t cta = tree_.Min();
    const int64_t room = target - filled_[cta] - sink_cost;
    int64_t end = work.kv_end;
    is_last = CostOf(t, overhead, end - begin) <= room;
    if (!is_last) {
      // As many granules as fit, leaving at least one for the next piece.
      const int64_t fit = room < overhead ? 0 : (room - overhead) / (t.kv * granule) * granule;
      end = std::min(begin + fit, end - granule) / granule * granule;
      if (end < begin + granule) return false;
    }
    if (sink_cost > 0) AddPartial(work, cta, head, 1, 0, sink);
    AddPartial(work, cta, head, 1, begin, end);
    const int64_t cost = CostOf(t, overhead, end - begin) + sink_cost;
    load_[cta] += cost;
    filled_[cta] = is_last ? filled_[cta] + cost : target;
    tree_.Set(cta, filled_[cta]);
    begin = end;
  }
  EndMerge(work, head, 1);
  return true;
}

// Merges and partial rows of the tiles that a fixed split size cuts are known before their pieces are laid.
void Layout::PlaceCutTiles(const PlanParams& p, const Items& items, int64_t target) {
  const int32_t heads = p.num_kv_heads;
  cut_runs_.Reserve(items.num_cut_tiles);
  for (int32_t t = 0; t < items.num_cut_tiles; ++t) {
    const CutTile& tile = items.cut_tiles[t];
    const Work& work = items.work[tile.first_item];
    const auto run = static_cast<int32_t>(std::clamp<int64_t>(target / (kRunsPerTarget * tile.max_cost), 1, heads));
    cut_runs_[t] = {run, num_merges, num_partial_rows};
    const int64_t rows_of_piece = int64_t{heads} * work.num_rows;
    for (int32_t head = 0; head < heads; head += run) {
      merges[num_merges++] = {work.row_begin, work.num_rows, work.kv_head_begin + head, std::min(run, heads - head)};
      for (int32_t i = 0; i < tile.num_pieces; ++i) {
        merge_slots[num_slots++] = static_cast<int32_t>(num_partial_rows + i * rows_of_piece + int64_t{head} * work.num_rows);
      }
      merge_indptr[num_merges] = num_slots;
    }
    num_partial_rows += tile.num_pieces * rows_of_piece;
    if (num_partial_rows > std::numeric_limits<int32_t>::max()) {
      TVM_INFER_THROW(ArgumentError) << "fixed_split_size is " << p.fixed_split_size << "; this batch would have more than "
                                     << std::numeric_limits<int32_t>::max() << " partial rows: use a larger one";
    }
  }
}

void Layout::PlacePiece(const PlanParams& p, const Items& items, int32_t item) {
  const Work& work = items.work[item];
  const CutTileRuns& runs = cut_runs_[work.merge];
  const int64_t piece = item - items.cut_tiles[work.merge].first_item;
  for (int32_t head = 0; head < p.num_kv_heads; head += runs.run) {
    const int32_t cta = tree_.Min();
    const int32_t n = std::min(runs.run, p.num_kv_heads - head);
    const auto out = static_cast<int32_t>(runs.first_row + (piece * p.num_kv_heads + head) * work.num_rows);
    placements[num_placements++] = {cta, head, n, num_partials};
    partials[num_partials++] = {work.kv_begin, work.kv_end, out, runs.first_merge + head / runs.run};
    load_[cta] += n * items.cost[item];
    filled_[cta] = load_[cta];
    tree_.Set(cta, load_[cta]);
  }
}

}  // namespace tvm_infer
