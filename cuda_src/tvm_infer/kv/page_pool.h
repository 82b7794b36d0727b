// A fixed number of pages, each free or held by so many owners. Pages are numbers: their memory is elsewhere.
#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

namespace tvm_infer::kv {

class PagePool {
 public:
  // Pages are first handed out in ascending order, so that a young cache touches only the memory it uses.
  explicit PagePool(int32_t num_pages) : ref_counts_(num_pages, 0), free_(num_pages) { std::iota(free_.rbegin(), free_.rend(), 0); }

  int32_t num_pages() const { return static_cast<int32_t>(ref_counts_.size()); }
  int32_t num_free() const { return static_cast<int32_t>(free_.size()); }
  int32_t num_used() const { return num_pages() - num_free(); }
  int32_t ref_count(int32_t page) const { return ref_counts_[page]; }
  // The free pages; the last one is handed out next.
  const std::vector<int32_t>& free_pages() const { return free_; }

  // A free page, now with one owner. num_free() must be positive.
  int32_t Take() noexcept {
    const int32_t page = free_.back();
    free_.pop_back();
    ref_counts_[page] = 1;
    return page;
  }

  // One more owner of a page that has some.
  void Share(int32_t page) noexcept { ++ref_counts_[page]; }

  // One owner fewer; the last one frees the page. Take() then gives it out first: released in reverse order of taking, pages leave
  // the pool as it was. Never allocates: `free_` was as long as it can get.
  void Release(int32_t page) noexcept {
    if (--ref_counts_[page] == 0) free_.push_back(page);
  }

 private:
  std::vector<int32_t> ref_counts_;  // [num_pages], 0: free
  std::vector<int32_t> free_;        // a stack
};

}  // namespace tvm_infer::kv
