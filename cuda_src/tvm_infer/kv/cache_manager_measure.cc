// What a step would take from the pool and give back, before anything changes.
#include <limits>

#include "tvm_infer/error.h"
#include "tvm_infer/kv/cache_manager.h"

namespace tvm_infer::kv {
namespace {

constexpr int64_t kMaxLength = std::numeric_limits<int32_t>::max();

}  // namespace

// What a step would take, and (in scratch_) which slots it meets and who keeps a page that several sequences write into.
//
// A shared, partly filled last page is copied by each sequence that appends to it. If all its owners append in this step, one of them
// may keep it; it must be the longest, so that it writes beyond what the others hold: then the page still has everybody's tokens if the
// step is cancelled.
CacheManager::Growth CacheManager::Measure(const int64_t* ids, const int64_t* append_lengths, int64_t num_requests) const {
  Scratch& s = scratch_;
  MeasureRequests(ids, append_lengths, num_requests);
  Growth growth;
  MeasureLeavers(&growth);
  for (int64_t i = 0; i < num_requests; ++i) {
    if (append_lengths[i] == 0) continue;
    const Sequence& sequence = sequences_[s.slots[i]];
    growth.new_pages += NumPages(sequence.length + append_lengths[i]) - static_cast<int32_t>(sequence.pages.size());
    if (sequence.length % limits_.page_size == 0) continue;
    const int32_t last = sequence.pages.back();
    if (pool_.ref_count(last) - s.leavers[last] == 1) continue;
    if (s.writers[last]++ == 0) {
      s.contested.push_back(last);
      s.keeper[last] = s.slots[i];
    } else if (sequence.length > sequences_[s.keeper[last]].length) {
      s.keeper[last] = s.slots[i];
    }
  }
  for (int32_t page : s.contested) {
    const bool all_owners_write = s.writers[page] == pool_.ref_count(page) - s.leavers[page];
    growth.copies += s.writers[page] - (all_owners_write ? 1 : 0);
    if (!all_owners_write) s.keeper[page] = -1;
    s.writers[page] = 0;
  }
  s.contested.clear();
  for (int32_t page : s.left) s.leavers[page] = 0;
  s.left.clear();
  return growth;
}

// Checks the requests and finds their slots.
void CacheManager::MeasureRequests(const int64_t* ids, const int64_t* append_lengths, int64_t num_requests) const {
  Scratch& s = scratch_;
  s.slots.resize(num_requests);
  s.contested.reserve(num_requests);
  ++s.measurement;
  for (int64_t i = 0; i < num_requests; ++i) {
    const int32_t slot = s.slots[i] = Find(ids[i]);
    if (s.seen[slot] == s.measurement) {
      TVM_INFER_THROW(ArgumentError) << "argument `ids` names sequence " << ids[i]
                                     << " twice; a step appends to a sequence once: join its tokens, or take two steps";
    }
    s.seen[slot] = s.measurement;
    if (sequences_[slot].is_away) CheckHere(ids[i], "a step");
    if (append_lengths[i] < 0) {
      TVM_INFER_THROW(ArgumentError) << "argument `append_lengths` is " << append_lengths[i] << " for sequence " << ids[i]
                                     << "; it must be at least 0 (pop() takes tokens away)";
    }
    if (append_lengths[i] > kMaxLength - sequences_[slot].length) {
      TVM_INFER_THROW(ArgumentError) << "argument `append_lengths` is " << append_lengths[i] << " for sequence " << ids[i] << ", which has "
                                     << sequences_[slot].length << " tokens; a sequence holds at most " << kMaxLength;
    }
  }
}

int64_t CacheManager::PagesAfter(const int64_t* ids, const int64_t* append_lengths, int64_t num_requests) const {
  const Growth growth = Measure(ids, append_lengths, num_requests);
  return pool_.num_used() + growth.new_pages + growth.copies - growth.freed;
}

}  // namespace tvm_infer::kv
