#include "tvm_infer/ffi/page_store.h"

#include <cstddef>
#include <cstring>
#include <new>

#include "tvm_infer/error.h"

namespace tvm_infer::ffi_api {
namespace {

class HostPageStore final : public PageStore {
 public:
  explicit HostPageStore(int64_t bytes) : bytes_(bytes), data_(new(std::nothrow) char[static_cast<size_t>(bytes)]) {
    if (data_ != nullptr) return;
    TVM_INFER_THROW(ArgumentError) << "the system has no " << bytes << " bytes for the contents of a sequence outside of the cache; remove "
                                   << "sequences that were swapped out";
  }
  char* data() override { return data_.get(); }
  int64_t bytes() const override { return bytes_; }
  void Wait() override {}

 private:
  int64_t bytes_;
  std::unique_ptr<char[]> data_;
};

// F(address in the cache, address in the store, bytes), for each layer and run.
template <typename F>
void ForEachRun(const PageMemory& memory, const std::vector<int32_t>& pages, const F& copy) {
  const std::vector<PageRun> runs = RunsOf(pages);
  for (int64_t layer = 0; layer < memory.num_layers; ++layer) {
    for (const PageRun& run : runs) {
      copy(memory.data + (layer * memory.num_pages + run.first_page) * memory.page_bytes,
           (layer * static_cast<int64_t>(pages.size()) + run.first_entry) * memory.page_bytes,
           static_cast<size_t>(run.count * memory.page_bytes));
    }
  }
}

}  // namespace

std::vector<PageRun> RunsOf(const std::vector<int32_t>& pages) {
  std::vector<PageRun> runs;
  for (size_t i = 0; i < pages.size(); ++i) {
    if (i > 0 && pages[i] == pages[i - 1] + 1) {
      ++runs.back().count;
    } else {
      runs.push_back({pages[i], static_cast<int64_t>(i), 1});
    }
  }
  return runs;
}

std::unique_ptr<PageStore> NewHostPageStore(int64_t bytes) { return std::make_unique<HostPageStore>(bytes); }

void HostPagesOut(const PageMemory& memory, const std::vector<int32_t>& pages, char* store) {
  ForEachRun(memory, pages, [&](const char* in_cache, int64_t offset, size_t bytes) { std::memcpy(store + offset, in_cache, bytes); });
}

void HostPagesIn(const PageMemory& memory, const std::vector<int32_t>& pages, const char* store) {
  ForEachRun(memory, pages, [&](char* in_cache, int64_t offset, size_t bytes) { std::memcpy(in_cache, store + offset, bytes); });
}

}  // namespace tvm_infer::ffi_api
