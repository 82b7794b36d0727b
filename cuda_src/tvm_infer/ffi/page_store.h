// Contents of pages in host memory: of sequences that were swapped out, or are on their way out of a cache or into one.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace tvm_infer::ffi_api {

// Memory [num_layers, num_pages of the sequence, bytes of a page in a layer].
class PageStore {
 public:
  virtual ~PageStore() = default;
  virtual char* data() = 0;
  virtual int64_t bytes() const = 0;
  virtual void Wait() = 0;  // until the copies to and from it so far are done
};

// The pages of a cache, [num_layers, num_pages, page_bytes].
struct PageMemory {
  char* data;
  int64_t num_layers, num_pages;
  int64_t page_bytes;  // of one layer
};

// Pages that follow each other in a sequence and in memory: one copy.
struct PageRun {
  int64_t first_page, first_entry, count;
};
std::vector<PageRun> RunsOf(const std::vector<int32_t>& pages);

std::unique_ptr<PageStore> NewHostPageStore(int64_t bytes);
void HostPagesOut(const PageMemory& memory, const std::vector<int32_t>& pages, char* store);
void HostPagesIn(const PageMemory& memory, const std::vector<int32_t>& pages, const char* store);

}  // namespace tvm_infer::ffi_api
