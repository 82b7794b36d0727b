// The pages of a cache: keys and values of a token beside each other in one page, of one width or of two.
#include "tvm_infer/ffi/kv_cache_object.h"

namespace tvm_infer::ffi_api {

void PagedKVCacheObj::AllocatePages(KVMemory* memory) const {
  const KVCacheConfig& c = config_;
  const int64_t k_head = c.page_size * c.head_dim, v_head = c.page_size * c.head_dim_vo, page = c.num_kv_heads * (k_head + v_head);
  memory->page_bytes = PageBytes(c.num_kv_heads, c.page_size, c.head_dim, c.head_dim_vo, c.kv_dtype.bits);
  if (c.has_equal_widths()) {
    memory->all_pages =
        executor_->Allocate({c.num_layers, c.num_pages, 2, c.num_kv_heads, c.page_size, c.head_dim}, c.kv_dtype, "its pages");
    const int64_t shape[] = {c.num_pages, 2, c.num_kv_heads, c.page_size, c.head_dim};
    const int64_t strides[] = {page, c.num_kv_heads * k_head, k_head, c.head_dim, 1};
    for (int64_t layer = 0; layer < c.num_layers; ++layer) {
      memory->pages.push_back(
          memory->all_pages.as_strided(tvm::ffi::ShapeView(shape, 5), tvm::ffi::ShapeView(strides, 5), layer * c.num_pages * page));
    }
    return;
  }
  memory->all_pages = executor_->Allocate({c.num_layers, c.num_pages, page}, c.kv_dtype, "its pages");
  const auto view = [&](int64_t width, int64_t head, int64_t first) {
    const int64_t shape[] = {c.num_pages, c.num_kv_heads, c.page_size, width}, strides[] = {page, head, width, 1};
    return memory->all_pages.as_strided(tvm::ffi::ShapeView(shape, 4), tvm::ffi::ShapeView(strides, 4), first);
  };
  for (int64_t layer = 0; layer < c.num_layers; ++layer) {
    const int64_t first = layer * c.num_pages * page;
    memory->pages.push_back(view(c.head_dim, k_head, first));
    memory->v_pages.push_back(view(c.head_dim_vo, v_head, first + c.num_kv_heads * k_head));
  }
}

const tvm::ffi::Tensor& PagedKVCacheObj::Pages(int64_t layer) const {
  if (layer < 0 || layer >= config_.num_layers) {
    TVM_INFER_THROW(ArgumentError) << "argument `layer` is " << layer << " but the cache has " << config_.num_layers
                                   << " layers; it must be from 0 to " << config_.num_layers - 1;
  }
  return memory_.pages[layer];
}

tvm::ffi::Tensor PagedKVCacheObj::ValuePages(int64_t layer) const {
  const tvm::ffi::Tensor& pages = Pages(layer);
  if (!config_.has_equal_widths()) return memory_.v_pages[layer];
  const KVCacheConfig& c = config_;
  const int64_t head = c.page_size * c.head_dim, values = c.num_kv_heads * head;
  const int64_t shape[] = {c.num_pages, c.num_kv_heads, c.page_size, c.head_dim}, strides[] = {2 * values, head, c.head_dim, 1};
  return pages.as_strided(tvm::ffi::ShapeView(shape, 4), tvm::ffi::ShapeView(strides, 4), values);
}

void PagedKVCacheObj::CheckEqualWidths(const char* operation, const char* way_out) const {
  if (config_.has_equal_widths()) return;
  TVM_INFER_THROW(ArgumentError) << operation << " is for caches whose keys and values are as wide; this one has head_dim "
                                 << config_.head_dim << " and head_dim_vo " << config_.head_dim_vo << ". " << way_out;
}

}  // namespace tvm_infer::ffi_api
