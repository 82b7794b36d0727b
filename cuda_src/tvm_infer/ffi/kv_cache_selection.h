// Packed functions of a paged KV cache whose layers read selected pages (page_selection.h): in a step of one token a sequence each KV head
// of a layer attends to at most num_pages pages of a sequence, those whose keys its query may score best. Other steps, and steps none of
// whose sequences has more pages than that, are as without.
#pragma once

#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>

#include <cstdint>

#include "tvm_infer/ffi/kv_cache_object.h"

#define TVM_INFER_KV_CACHE_SELECTION_FUNCTIONS(V)   \
  V(kv_cache_set_page_budget, KVCacheSetPageBudget) \
  V(kv_cache_page_budget, KVCachePageBudget)        \
  V(kv_cache_page_bounds, KVCachePageBounds)        \
  V(kv_cache_selects_pages, KVCacheSelectsPages)

namespace tvm_infer::ffi_api {

// Before the first sequence, and before the first step that an executable runs. The cache keeps bounds of its pages from then on.
//
//   num_pages     of a list; 0: none, layers read all keys (again), and what follows says nothing
//
//   num_sink, num_recent, is_sum  as of select_pages and page_scores
//
//   max_pages     of a sequence in a step that selects, at most (scores take 4 * max_batch * num_kv_heads * max_pages bytes); 0: all
//
//   dense_layers  that read all pages in every step, and keep no bounds. Layers with a variant, a window or chunks must be among them
void KVCacheSetPageBudget(PagedKVCache kv, int64_t num_pages, int64_t num_sink, int64_t num_recent, int64_t is_sum, int64_t max_pages,
                          tvm::ffi::Shape dense_layers);

// num_pages, num_sink, num_recent, is_sum, max_pages, then the layers that stay dense; empty where no layer selects.
tvm::ffi::Shape KVCachePageBudget(PagedKVCache kv);

// [num_pages, 2, num_kv_heads, head_dim] of a layer, no copy: the least and the greatest element of each channel of a page's keys. Of full
// pages exact; of a page that was full before its sequence was shortened, or a step cancelled, those of all it held until it is written
// again (it is the last of every sequence that does not fill it, which is always read). ArgumentError for a layer that stays dense.
tvm::ffi::Tensor KVCachePageBounds(PagedKVCache kv, int64_t layer);

// Whether layers select in the step under way (or did in the last one).
bool KVCacheSelectsPages(PagedKVCache kv);

}  // namespace tvm_infer::ffi_api
