// A fixed number of pages, each free, held by so many owners, or kept: without owners, but with contents that may be wanted again. Pages
// are numbers: their memory is elsewhere.
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
  // Pages without owners: kept ones count, since they are given up where others are needed (prefix_index.h).
  int32_t num_free() const { return static_cast<int32_t>(free_.size()) + num_kept_; }
  int32_t num_used() const { return num_pages() - num_free(); }
  int32_t num_kept() const { return num_kept_; }
  int32_t ref_count(int32_t page) const { return ref_counts_[page]; }
  // The free pages that nobody wants again; the last one is handed out next.
  const std::vector<int32_t>& free_pages() const { return free_; }

  // A page of free_pages(), now with one owner. There must be one.
  int32_t Take() noexcept {
    const int32_t page = free_.back();
    free_.pop_back();
    ref_counts_[page] = 1;
    return page;
  }

  // One more owner of a page that has some, or that is kept.
  void Share(int32_t page) noexcept {
    if (ref_counts_[page]++ == 0) Unlink(page);
  }

  // One owner fewer; the last one frees the page, unless it is wanted. Take() then gives it out first: released in reverse order of
  // taking, pages leave the pool as it was. Never allocates: `free_` was as long as it can get.
  void Release(int32_t page) noexcept {
    if (--ref_counts_[page] > 0) return;
    if (IsWanted(page)) {
      Link(page);
    } else {
      free_.push_back(page);
    }
  }

  // ---- Contents that may be wanted again. Room for them is made once, by WantPages(). ----

  void WantPages() {
    wanted_.assign(num_pages(), 0);
    newer_.assign(num_pages() + 1, num_pages());
    older_.assign(num_pages() + 1, num_pages());
  }
  // The page is kept when its last owner releases it.
  void Want(int32_t page) noexcept { wanted_[page] = 1; }
  void Unwant(int32_t page) noexcept {
    wanted_[page] = 0;
    if (ref_counts_[page] > 0) return;
    Unlink(page);
    free_.push_back(page);
  }
  bool IsWanted(int32_t page) const { return !wanted_.empty() && wanted_[page] != 0; }
  // The kept page whose last owner released it first. num_kept() must be positive.
  int32_t oldest_kept() const { return newer_[num_pages()]; }

 private:
  // Kept pages are a ring through entry num_pages, oldest first behind it.
  void Link(int32_t page) noexcept {
    const int32_t end = num_pages(), newest = older_[end];
    older_[page] = newest;
    newer_[page] = end;
    newer_[newest] = older_[end] = page;
    ++num_kept_;
  }
  void Unlink(int32_t page) noexcept {
    newer_[older_[page]] = newer_[page];
    older_[newer_[page]] = older_[page];
    --num_kept_;
  }

  std::vector<int32_t> ref_counts_;  // [num_pages], 0: free or kept
  std::vector<int32_t> free_;        // a stack
  std::vector<uint8_t> wanted_;      // [num_pages]; empty: none ever is
  std::vector<int32_t> newer_, older_;
  int32_t num_kept_ = 0;
};

}  // namespace tvm_infer::kv
