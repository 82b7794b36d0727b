#include "tvm_infer/schedule/attempt.h"

#include <algorithm>
#include <limits>

#include "tvm_infer/error.h"

namespace tvm_infer {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
// Cutting KV must shorten the plan by what a merge costs (what its pieces cost is in their load) and by this fraction of
// the mean load, below which a prediction says nothing.
constexpr int64_t kMinGainFraction = 128;
// The target without cuts exceeds the mean load by no more than this fraction.
constexpr int64_t kMaxSlackFraction = 64;

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

}  // namespace

// The layout without cuts, unless one with cuts is shorter by more than a merge costs.
//
// Targets of layouts with cuts, lowest first; with o the overhead of a piece and g the cost of a granule:
//   mean + o + 2 g      is always enough: a CTA where nothing more fits has less than o + 2 g left, or it took a piece that is not its
//                       head's last, which costs o more than without the cut, with less than 2 g left. 3 g, where keys begin
//                       between granules: behind a window's or shared ones.
//   mean + o + g        mostly is.
//   mean + o + g / 2    may be, and is worth trying where a CTA has a head or two: some end with a whole head, and half a granule is lost
//   at
//                       the others.
const Layout& Attempt::Choose(const PlanParams& p) {
  const int64_t mean = std::max<int64_t>(1, CeilDiv(items.total_cost * p.num_kv_heads, p.num_ctas));
  const int64_t slack = items.max_overhead + items.max_granule_cost;
  // Little above the mean, for balance where works are few; the first target with cuts where they are many, to share its beginning.
  const int64_t whole_target = mean + std::min(slack, mean / kMaxSlackFraction);
  whole_.Lay(p, items, whole_target, false);
  const int64_t min_gain = items.max_merge + mean / kMinGainFraction;
  if (p.fixed_split_size != kSplitAuto || p.num_ctas == 1 || whole_.makespan <= mean + min_gain) return whole_;

  const int64_t enough = mean + items.max_overhead + (p.band.has_begin() || items.num_tree_merges > 0 ? 3 : 2) * items.max_granule_cost;
  const int64_t num_heads = int64_t{items.count} * p.num_kv_heads;
  int64_t targets[4] = {mean + slack, enough};
  int num_targets = 2;
  if (num_heads <= 2 * p.num_ctas) targets[num_targets++] = mean + items.max_overhead + items.max_granule_cost / 2;
  if (num_heads <= p.num_ctas) targets[num_targets++] = RegularTarget(p, items, mean, enough);
  std::sort(targets, targets + num_targets);
  if (whole_.makespan <= targets[0] + min_gain) return whole_;
  for (int i = 0; i < num_targets; ++i) {
    const int64_t target = targets[i];
    if (cut_.Lay(p, items, target, true, target == whole_target ? &whole_ : nullptr))
      return cut_.makespan + min_gain < whole_.makespan ? cut_ : whole_;
  }
  TVM_INFER_ICHECK(false) << "; no layout with cuts at target " << enough;
  return whole_;
}

}  // namespace tvm_infer
