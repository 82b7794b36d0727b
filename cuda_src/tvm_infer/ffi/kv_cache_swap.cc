// Contents of a cache's sequences in host memory.
#include <cstring>
#include <utility>

#include "tvm_infer/ffi/kv_cache_object.h"

namespace tvm_infer::ffi_api {

void PagedKVCacheObj::CheckBetweenSteps(const char* operation) const {
  if (manager_.in_forward()) {
    TVM_INFER_THROW(CacheStateError) << operation << " in a step, whose keys and values are not all there; end_forward() (or "
                                     << "cancel_forward()) comes first";
  }
}

std::unique_ptr<PageStore> PagedKVCacheObj::StoreOf(size_t num_pages) const {
  if (num_pages == 0) return nullptr;
  return executor_->NewStore(static_cast<int64_t>(num_pages) * kv_bytes_per_page());
}

void PagedKVCacheObj::Remove(int64_t id) {
  manager_.Remove(id);
  swapped_.erase(id);
}

void PagedKVCacheObj::Clear() {
  manager_.Clear();
  swapped_.clear();
}

void PagedKVCacheObj::SwapOut(int64_t id) {
  CheckBetweenSteps("swap_out");
  manager_.CheckHere(id, "swap_out");
  const std::vector<int32_t> pages = manager_.HeldPages(id);
  std::unique_ptr<PageStore> store = StoreOf(pages.size());
  if (store != nullptr) executor_->CopyPagesOut(memory_, pages, store.get());
  swapped_[id] = std::move(store);
  manager_.SendAway(id);
}

void PagedKVCacheObj::SwapIn(int64_t id) {
  CheckBetweenSteps("swap_in");
  manager_.FetchBack(id);
  const auto found = swapped_.find(id);
  TVM_INFER_ICHECK(found != swapped_.end());
  try {
    if (found->second != nullptr) executor_->CopyPagesIn(memory_, manager_.HeldPages(id), found->second.get());
    if (memory_.selection.is_on()) UpdateBoundsOf(id);
  } catch (...) {
    manager_.SendAway(id);
    throw;
  }
  swapped_.erase(found);
}

int64_t PagedKVCacheObj::swapped_bytes() const {
  int64_t bytes = 0;
  for (const auto& [id, store] : swapped_) bytes += store == nullptr ? 0 : store->bytes();
  return bytes;
}

tvm::ffi::Tensor PagedKVCacheObj::ExportPages(int64_t id) const {
  CheckBetweenSteps("export_sequence");
  CheckEqualWidths("export_sequence", "Swap the sequence out and in instead (swap_out, swap_in)");
  const std::vector<int32_t> pages = manager_.HeldPages(id);  // none where it is swapped out
  const auto swapped = swapped_.find(id);
  std::unique_ptr<PageStore> copied;
  PageStore* store = swapped == swapped_.end() ? nullptr : swapped->second.get();
  if (!pages.empty()) {
    copied = StoreOf(pages.size());
    executor_->CopyPagesOut(memory_, pages, copied.get());
    store = copied.get();
  }
  const int64_t num_pages = store == nullptr ? 0 : store->bytes() / kv_bytes_per_page();
  const KVCacheConfig& c = config_;
  const tvm::ffi::Tensor result = AllocateHost({c.num_layers, num_pages, 2, c.num_kv_heads, c.page_size, c.head_dim}, c.kv_dtype);
  if (store != nullptr) {
    store->Wait();
    std::memcpy(DataPtr<char>(TensorView(result)), store->data(), static_cast<size_t>(store->bytes()));
  }
  return result;
}

void PagedKVCacheObj::ImportPages(int64_t id, const TensorView& pages, int64_t length, const kv::CacheManager::Gone& gone,
                                  const int64_t* tokens, int64_t num_tokens, int64_t space) {
  const KVCacheConfig& c = config_;
  CheckBetweenSteps("import_sequence");
  CheckEqualWidths("import_sequence", "Prefill the tokens instead");
  CheckCpu(pages, "pages");
  CheckDType(pages, "pages", c.kv_dtype, "the cache's");
  CheckRank(pages, "pages", 6, "[num_layers, pages, 2, num_kv_heads, page_size, head_dim]");
  const struct {
    int axis;
    int64_t size;
    const char* why;
  } sizes[] = {{0, c.num_layers, "num_layers of the cache"},
               {2, 2, "keys and values"},
               {3, c.num_kv_heads, "num_kv_heads of the cache"},
               {4, c.page_size, "page_size of the cache"},
               {5, c.head_dim, "head_dim of the cache"}};
  for (const auto& [axis, size, why] : sizes) CheckDim(pages, "pages", axis, size, why);
  CheckContiguous(pages, "pages");
  manager_.AddFilled(id, length, gone, tokens, num_tokens, space);
  try {
    const std::vector<int32_t> held = manager_.HeldPages(id);
    CheckDim(pages, "pages", 1, static_cast<int64_t>(held.size()), "the pages of so many tokens, less those of `gone`");
    if (const std::unique_ptr<PageStore> store = StoreOf(held.size()); store != nullptr) {
      std::memcpy(store->data(), DataPtr<char>(pages), static_cast<size_t>(store->bytes()));
      executor_->CopyPagesIn(memory_, held, store.get());
      if (memory_.selection.is_on()) UpdateBoundsOf(id);
    }
  } catch (...) {
    manager_.Remove(id);
    throw;
  }
  manager_.NoteFilled(id);
}

}  // namespace tvm_infer::ffi_api
