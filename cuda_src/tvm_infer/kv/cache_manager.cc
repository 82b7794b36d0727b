#include "tvm_infer/kv/cache_manager.h"

#include <algorithm>
#include <limits>

#include "tvm_infer/error.h"
#include "tvm_infer/kv/reserve.h"

namespace tvm_infer::kv {
namespace {

constexpr size_t kMaxEntries = std::numeric_limits<int32_t>::max();

const CacheLimits& Checked(const CacheLimits& limits) {
  const struct {
    const char* name;
    int32_t value;
  } positive[] = {
      {"page_size", limits.page_size}, {"num_pages", limits.num_pages}, {"max_batch", limits.max_batch}, {"max_tokens", limits.max_tokens}};
  for (const auto& p : positive) {
    if (p.value <= 0) TVM_INFER_THROW(ArgumentError) << "argument `" << p.name << "` is " << p.value << "; it must be at least 1";
  }
  return limits;
}

}  // namespace

CacheManager::CacheManager(const CacheLimits& limits) : limits_(Checked(limits)), pool_(limits.num_pages) {
  step_.qo_indptr.assign(1, 0);
  step_.page_indptr.assign(1, 0);
  scratch_.writers.assign(limits.num_pages, 0);
  scratch_.keeper.assign(limits.num_pages, -1);
  scratch_.leavers.assign(limits.num_pages, 0);
}

// ---- Sequences ----

void CacheManager::Add(int64_t id) {
  CheckIdle("add");
  CheckNew(id, "id");
  slot_of_.emplace(id, NewSlot());
  Sequence& sequence = sequences_[free_slots_.back()];
  free_slots_.pop_back();
  sequence.id = id;
  sequence.length = 0;
  sequence.is_live = true;
  sequence.space = 0;
}

void CacheManager::Remove(int64_t id) {
  CheckIdle("remove");
  const int32_t slot = Find(id);
  ShrinkTo(&sequences_[slot], 0);
  sequences_[slot].is_live = sequences_[slot].is_away = false;
  slot_of_.erase(id);
  free_slots_.push_back(slot);  // has room: NewSlot() reserved it
}

void CacheManager::Fork(int64_t parent, int64_t child, int64_t position) {
  CheckIdle("fork");
  const int32_t parent_slot = Find(parent);
  CheckNew(child, "child");
  CheckHere(parent, "fork");
  const int32_t parent_length = sequences_[parent_slot].length;
  if (position < kWholeLength || position > parent_length) {
    TVM_INFER_THROW(ArgumentError) << "argument `position` is " << position << " but sequence " << parent << " has " << parent_length
                                   << " tokens; it must be from 0 to " << parent_length << ", or -1 for all of them";
  }
  const int32_t length = position == kWholeLength ? parent_length : static_cast<int32_t>(position);
  CheckReach(sequences_[parent_slot], length, "position", position);
  const int32_t slot = NewSlot();  // may move sequences_
  Reserve2x(&sequences_[slot].pages, NumPages(length));
  Reserve2x(&sequences_[slot].tokens, std::min<size_t>(sequences_[parent_slot].tokens.size(), length));
  slot_of_.emplace(child, slot);

  free_slots_.pop_back();
  const Sequence& shared = sequences_[parent_slot];
  Sequence& sequence = sequences_[slot];
  sequence.id = child;
  sequence.length = length;
  sequence.is_live = true;
  sequence.pages.assign(shared.pages.begin(), shared.pages.begin() + NumPages(length));
  sequence.gone_begin = std::min(shared.gone_begin, NumPages(length));
  sequence.gone_end = std::min(shared.gone_end, NumPages(length));
  for (int32_t page : sequence.pages) {
    if (page != kNoPage) pool_.Share(page);
  }
  sequence.space = shared.space;
  sequence.tokens.assign(shared.tokens.begin(), shared.tokens.begin() + std::min<ptrdiff_t>(shared.tokens.size(), length));
  sequence.is_plain = shared.is_plain;
  sequence.num_indexed = shared.num_indexed;
  sequence.indexed = shared.indexed;
  CutTokens(&sequence, length);
}

void CacheManager::Pop(int64_t id, int64_t num_tokens) {
  CheckIdle("pop");
  CheckHere(id, "pop");
  Sequence& sequence = sequences_[Find(id)];
  if (num_tokens < 0 || num_tokens > sequence.length) {
    TVM_INFER_THROW(ArgumentError) << "argument `n` of pop is " << num_tokens << " but sequence " << id << " has " << sequence.length
                                   << " tokens; it must be from 0 to " << sequence.length;
  }
  CheckReach(sequence, sequence.length - num_tokens, "n", num_tokens);
  ShrinkTo(&sequence, sequence.length - static_cast<int32_t>(num_tokens));
}

void CacheManager::Truncate(int64_t id, int64_t new_length) {
  CheckIdle("truncate");
  CheckHere(id, "truncate");
  Sequence& sequence = sequences_[Find(id)];
  if (new_length < 0 || new_length > sequence.length) {
    TVM_INFER_THROW(ArgumentError) << "argument `length` of truncate is " << new_length << " but sequence " << id << " has "
                                   << sequence.length << " tokens; it must be from 0 to " << sequence.length;
  }
  CheckReach(sequence, new_length, "length", new_length);
  ShrinkTo(&sequence, static_cast<int32_t>(new_length));
}

void CacheManager::Clear() {
  CheckIdle("clear");
  for (size_t slot = 0; slot < sequences_.size(); ++slot) {
    if (!sequences_[slot].is_live) continue;
    ShrinkTo(&sequences_[slot], 0);
    sequences_[slot].is_live = sequences_[slot].is_away = false;
    free_slots_.push_back(static_cast<int32_t>(slot));
  }
  slot_of_.clear();
}

// The slot that is taken next, the last of free_slots_. It stays free until the caller, past all that can throw, pops it.
int32_t CacheManager::NewSlot() {
  if (free_slots_.empty()) {
    free_slots_.reserve(2 * sequences_.size() + 1);
    scratch_.seen.resize(sequences_.size() + 1, 0);
    sequences_.emplace_back();
    free_slots_.push_back(static_cast<int32_t>(sequences_.size()) - 1);
  }
  return free_slots_.back();
}

void CacheManager::ShrinkTo(Sequence* sequence, int32_t new_length) noexcept {
  const int32_t keep = NumPages(new_length);
  while (static_cast<int32_t>(sequence->pages.size()) > keep) {
    if (sequence->pages.back() != kNoPage) pool_.Release(sequence->pages.back());
    sequence->pages.pop_back();
  }
  sequence->gone_begin = std::min(sequence->gone_begin, keep);
  sequence->gone_end = std::min(sequence->gone_end, keep);
  sequence->length = new_length;
  CutTokens(sequence, new_length);
}

// ---- Steps ----

const Step& CacheManager::BeginForward(const int64_t* ids, const int64_t* append_lengths, int64_t num_requests) {
  CheckIdle("begin_forward");
  CheckStep(append_lengths, num_requests);
  const Growth growth = Measure(ids, append_lengths, num_requests);
  if (growth.new_pages + growth.copies > pool_.num_free() + growth.freed) ThrowOutOfPages(growth);
  Reserve(append_lengths, num_requests);
  GiveBack();
  Grow(append_lengths, num_requests);
  FillStep(append_lengths, num_requests);
  step_tokens_.clear();
  in_forward_ = true;
  return step_;
}

void CacheManager::EndForward() {
  step();
  in_forward_ = false;
  if (!step_tokens_.empty()) KeepTokens();
}

void CacheManager::CancelForward() {
  step();
  // Backwards, so that the pool's order of free pages comes back too.
  for (size_t i = undo_.size(); i-- > 0;) {
    const Undo& undo = undo_[i];
    Sequence& sequence = sequences_[undo.slot];
    while (static_cast<int32_t>(sequence.pages.size()) > undo.num_pages) {
      pool_.Release(sequence.pages.back());
      sequence.pages.pop_back();
    }
    if (undo.shared_page >= 0) {
      pool_.Release(sequence.pages.back());
      pool_.Share(undo.shared_page);
      sequence.pages.back() = undo.shared_page;
    }
    sequence.length = undo.length;
  }
  in_forward_ = false;
}

const Step& CacheManager::step() const {
  if (!in_forward_) TVM_INFER_THROW(CacheStateError) << "the cache is not in a step; call begin_forward() first";
  return step_;
}

// All that a step allocates, before it changes anything.
void CacheManager::Reserve(const int64_t* append_lengths, int64_t num_requests) {
  size_t num_indices = 0;
  for (int64_t i = 0; i < num_requests; ++i) {
    Sequence& sequence = sequences_[scratch_.slots[i]];
    const size_t num_pages = NumPages(sequence.length + append_lengths[i]);
    Reserve2x(&sequence.pages, num_pages);
    num_indices += num_pages;
  }
  if (num_indices > kMaxEntries) {
    TVM_INFER_THROW(ArgumentError) << "argument `ids`: the page lists of the step's " << num_requests << " sequences have " << num_indices
                                   << " entries together; at most " << kMaxEntries << " fit. Take the sequences in several steps";
  }
  Reserve2x(&undo_, num_requests);
  Reserve2x(&step_.qo_indptr, num_requests + 1);
  Reserve2x(&step_.kv_len, num_requests);
  Reserve2x(&step_.page_indptr, num_requests + 1);
  Reserve2x(&step_.page_indices, num_indices);
  Reserve2x(&step_.copies, num_requests);
}

void CacheManager::Grow(const int64_t* append_lengths, int64_t num_requests) noexcept {
  undo_.clear();
  step_.copies.clear();
  // Decided before any count changes: the first of two owners to copy would otherwise leave the second one alone with the page.
  for (int64_t i = 0; i < num_requests; ++i) {
    const int32_t slot = scratch_.slots[i];
    const Sequence& sequence = sequences_[slot];
    const int32_t fill = sequence.length % limits_.page_size;
    const bool writes_last = append_lengths[i] > 0 && fill != 0;
    const int32_t last = writes_last ? sequence.pages.back() : -1;
    const bool copies = writes_last && pool_.ref_count(last) > 1 && scratch_.keeper[last] != slot;
    if (writes_last && !copies) LeaveIndex(last);
    undo_.push_back({slot, sequence.length, static_cast<int32_t>(sequence.pages.size()), copies ? last : -1});
  }
  for (int64_t i = 0; i < num_requests; ++i) {
    Sequence& sequence = sequences_[undo_[i].slot];
    if (undo_[i].shared_page >= 0) {
      const int32_t copy = TakePage();
      step_.copies.push_back({undo_[i].shared_page, copy, sequence.length % limits_.page_size});
      pool_.Release(undo_[i].shared_page);
      sequence.pages.back() = copy;
    }
    sequence.length += static_cast<int32_t>(append_lengths[i]);
    const size_t num_pages = NumPages(sequence.length);
    while (sequence.pages.size() < num_pages) sequence.pages.push_back(TakePage());
  }
}

void CacheManager::FillStep(const int64_t* append_lengths, int64_t num_requests) noexcept {
  step_.qo_indptr.resize(num_requests + 1);
  step_.kv_len.resize(num_requests);
  step_.page_indptr.resize(num_requests + 1);
  step_.page_indices.clear();
  step_.qo_indptr[0] = step_.page_indptr[0] = 0;
  for (int64_t i = 0; i < num_requests; ++i) {
    const Sequence& sequence = sequences_[undo_[i].slot];
    step_.qo_indptr[i + 1] = step_.qo_indptr[i] + static_cast<int32_t>(append_lengths[i]);
    step_.kv_len[i] = sequence.length;
    step_.page_indices.insert(step_.page_indices.end(), sequence.pages.begin(), sequence.pages.end());
    step_.page_indptr[i + 1] = static_cast<int32_t>(step_.page_indices.size());
  }
}

}  // namespace tvm_infer::kv
