#include "tvm_infer/kv/shared_pages.h"

#include <algorithm>
#include <cstring>

namespace tvm_infer::kv {

const SharedRuns& SharedPages::Find(const Step& step, const PagePool& pool, int32_t page_size) {
  step_ = &step;
  page_size_ = page_size;
  found_ = {};
  members_.clear();
  runs_.clear();
  for (int32_t r = 0; r < step.num_requests(); ++r) {
    const bool has_rows = step.qo_indptr[r + 1] > step.qo_indptr[r];
    const int32_t page = PageAt(r, 0);
    if (has_rows && page != kNoPage && pool.ref_count(page) > 1) {
      members_.push_back({r, static_cast<int32_t>(members_.size()), 0});
    }
  }
  if (members_.size() < 2) return found_;
  if (branch_of_.empty()) branch_of_.assign(pool.num_pages(), -1);
  tree_of_.assign(step.num_requests(), -1);
  end_of_tree_.resize(members_.size());
  const auto count = static_cast<int32_t>(members_.size());
  Branch(0, count, 0);
  for (const Segment& tree : segments_) {
    end_of_tree_[tree.begin] = tree.end;
    for (int32_t i = tree.begin; i < tree.end; ++i) tree_of_[members_[i].request] = tree.begin;
  }
  while (!segments_.empty()) {
    const Segment segment = segments_.back();
    segments_.pop_back();
    Divide(segment);
  }
  if (runs_.empty()) return found_;
  MakeOrder();
  found_ = {order_.data(), runs_.data(), static_cast<int32_t>(runs_.size())};
  return found_;
}

// Members that go on with the same page behind `from` pages stand together afterwards, and are a segment if there are several.
void SharedPages::Branch(int32_t begin, int32_t end, int32_t from) {
  int32_t num_branches = 0;
  for (int32_t i = begin; i < end; ++i) {
    Member& member = members_[i];
    const int32_t page = PageAt(member.request, from);
    if (page == kNoPage) {
      member.key = num_branches++;
      continue;
    }
    if (branch_of_[page] < 0) branch_of_[page] = num_branches++;
    member.key = branch_of_[page];
  }
  for (int32_t i = begin; i < end; ++i) {
    const int32_t page = PageAt(members_[i].request, from);
    if (page != kNoPage) branch_of_[page] = -1;
  }
  Sort(begin, end);
  for (int32_t i = begin, next; i < end; i = next) {
    for (next = i + 1; next < end && members_[next].key == members_[i].key;) ++next;
    if (next - i > 1) segments_.push_back({i, next, from});
  }
}

// The runs along the path of a segment's first member, from all that goes with it to those that go furthest; who leaves the path branches.
void SharedPages::Divide(const Segment& segment) {
  const int32_t first = members_[segment.begin].request;
  members_[segment.begin].key = -NumPages(first) - 1;
  for (int32_t i = segment.begin + 1; i < segment.end; ++i) {
    members_[i].key = -CommonPages(first, members_[i].request, segment.from);
  }
  Sort(segment.begin, segment.end);
  for (int32_t end = segment.end; end - segment.begin > 1;) {
    const int32_t pages = -members_[end - 1].key;
    runs_.push_back({segment.begin, end, pages * page_size_});
    int32_t longer = end - 1;
    while (longer > segment.begin + 1 && -members_[longer - 1].key == pages) --longer;
    if (end - longer > 1) Branch(longer, end, pages);
    end = longer;
  }
}

void SharedPages::Sort(int32_t begin, int32_t end) {
  std::sort(members_.begin() + begin, members_.begin() + end,
            [](const Member& a, const Member& b) { return a.key != b.key ? a.key < b.key : a.place < b.place; });
  for (int32_t i = begin; i < end; ++i) members_[i].place = i;
}

// Pages that two requests have in common, at least `from`. Blocks of 64 at first: at the speed of the memory.
int32_t SharedPages::CommonPages(int32_t a, int32_t b, int32_t from) const {
  constexpr int32_t kBlock = 64;
  const int32_t *x = Pages(a), *y = Pages(b);
  const int32_t end = std::min(NumPages(a), NumPages(b));
  while (from + kBlock <= end && std::memcmp(x + from, y + from, kBlock * sizeof(int32_t)) == 0) from += kBlock;
  while (from < end && x[from] == y[from]) ++from;
  return from;
}

// Trees among the requests that share nothing, and the runs as the planner wants them.
void SharedPages::MakeOrder() {
  order_.clear();
  place_in_order_.resize(members_.size());
  for (int32_t r = 0; r < step_->num_requests(); ++r) {
    const int32_t tree = tree_of_[r];
    if (tree < 0) order_.push_back(r);
    if (tree < 0 || end_of_tree_[tree] == 0) continue;
    for (int32_t i = tree; i < end_of_tree_[tree]; ++i) {
      place_in_order_[i] = static_cast<int32_t>(order_.size());
      order_.push_back(members_[i].request);
    }
    end_of_tree_[tree] = 0;  // is in the order
  }
  for (SharedRun& run : runs_) {
    const int32_t size = run.end - run.begin;
    run.begin = place_in_order_[run.begin];
    run.end = run.begin + size;
  }
  std::sort(runs_.begin(), runs_.end(), [](const SharedRun& a, const SharedRun& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end != b.end ? a.end > b.end : a.kv_end < b.kv_end;
  });
}

}  // namespace tvm_infer::kv
