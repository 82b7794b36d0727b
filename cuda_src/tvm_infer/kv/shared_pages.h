// Which sequences of a step begin with the same pages: a forest of any depth, found in the page tables themselves, so that it does not
// matter whether pages are shared because sequences were forked, or for another reason.
#pragma once

#include <cstdint>
#include <vector>

#include "tvm_infer/kv/cache_manager.h"
#include "tvm_infer/schedule/shared_runs.h"

namespace tvm_infer::kv {

class SharedPages {
 public:
  // Runs of the step's requests. Requests of a run stand where the first of them would; those without new tokens are in no run. Reads each
  // entry of the page tables once at most, and of a request whose first page has one owner that page only. Allocates nothing once it has
  // seen a step as large. Valid until the next call.
  const SharedRuns& Find(const Step& step, const PagePool& pool, int32_t page_size);

 private:
  // Members [begin, end) share their first `from` pages, and a run says so if there are any.
  struct Segment {
    int32_t begin, end, from;
  };
  struct Member {
    int32_t request;
    int32_t place;  // breaks ties
    int32_t key;    // what members are sorted by
  };

  void Divide(const Segment& segment);
  void Branch(int32_t begin, int32_t end, int32_t from);
  void Sort(int32_t begin, int32_t end);
  void MakeOrder();
  const int32_t* Pages(int32_t request) const { return step_->page_indices.data() + step_->page_indptr[request]; }
  int32_t NumPages(int32_t request) const { return step_->page_indptr[request + 1] - step_->page_indptr[request]; }
  int32_t PageAt(int32_t request, int32_t index) const { return index < NumPages(request) ? Pages(request)[index] : kNoPage; }
  int32_t CommonPages(int32_t a, int32_t b, int32_t from) const;

  const Step* step_ = nullptr;
  int32_t page_size_ = 0;
  std::vector<Member> members_;
  std::vector<Segment> segments_;        // to be divided
  std::vector<int32_t> branch_of_;       // [num_pages]: the branch that goes on with this page; -1 between calls
  std::vector<int32_t> tree_of_;         // [num_requests]: place of its tree's first member, or -1
  std::vector<int32_t> end_of_tree_;     // [members]: of the tree that begins here
  std::vector<int32_t> place_in_order_;  // [members]
  std::vector<int32_t> order_;
  std::vector<SharedRun> runs_;
  SharedRuns found_;
};

}  // namespace tvm_infer::kv
