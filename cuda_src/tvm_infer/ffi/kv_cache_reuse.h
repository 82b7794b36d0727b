// Packed functions of the paged KV cache by which contents outlive their sequences: prefixes that are found by their tokens, and sequences
// that go to host memory and come back. None may be called in a step, unless said.
//
// `tokens` are int64 [n] on the host: any numbers that stand for what is at a position (a hash where it is no token).
#pragma once

#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>

#include <cstdint>

#include "tvm_infer/ffi/kv_cache_object.h"

#define TVM_INFER_KV_CACHE_REUSE_FUNCTIONS(V)               \
  V(kv_cache_enable_prefix_reuse, KVCacheEnablePrefixReuse) \
  V(kv_cache_reuses_prefixes, KVCacheReusesPrefixes)        \
  V(kv_cache_add_with_prefix, KVCacheAddWithPrefix)         \
  V(kv_cache_match_prefix, KVCacheMatchPrefix)              \
  V(kv_cache_commit_tokens, KVCacheCommitTokens)            \
  V(kv_cache_tokens, KVCacheTokens)                         \
  V(kv_cache_num_known_tokens, KVCacheNumKnownTokens)       \
  V(kv_cache_namespace, KVCacheNamespace)                   \
  V(kv_cache_num_shared_pages, KVCacheNumSharedPages)       \
  V(kv_cache_drop_prefixes, KVCacheDropPrefixes)            \
  V(kv_cache_prefix_stats, KVCachePrefixStats)              \
  V(kv_cache_debug_prefixes, KVCacheDebugPrefixes)          \
  V(kv_cache_swap_out, KVCacheSwapOut)                      \
  V(kv_cache_swap_in, KVCacheSwapIn)                        \
  V(kv_cache_is_swapped_out, KVCacheIsSwappedOut)           \
  V(kv_cache_swapped_bytes, KVCacheSwappedBytes)            \
  V(kv_cache_gone, KVCacheGone)                             \
  V(kv_cache_export_pages, KVCacheExportPages)              \
  V(kv_cache_import_pages, KVCacheImportPages)

namespace tvm_infer::ffi_api {

// From now on full pages are found by their tokens (kv/prefix_index.h). The functions below raise CacheStateError before.
void KVCacheEnablePrefixReuse(PagedKVCache kv);
bool KVCacheReusesPrefixes(PagedKVCache kv);  // any time
// kv_cache_add for a sequence that is to have `tokens`: how many of them it has from the beginning, a multiple of page_size and fewer than
// there are. The others are for steps to append. `space`: a number of the caller's; only sequences of one match.
int64_t KVCacheAddWithPrefix(PagedKVCache kv, int64_t id, TensorView tokens, int64_t space);
int64_t KVCacheMatchPrefix(PagedKVCache kv, TensorView tokens, int64_t space);  // the number alone; any time
// Says which tokens steps have appended that did not know them (kv_cache_begin_forward, or token_ids written on the device).
void KVCacheCommitTokens(PagedKVCache kv, int64_t id, TensorView tokens);
tvm::ffi::Shape KVCacheTokens(PagedKVCache kv, int64_t id);  // those known, from position 0 on; any time
int64_t KVCacheNumKnownTokens(PagedKVCache kv, int64_t id);
int64_t KVCacheNamespace(PagedKVCache kv, int64_t id);
int64_t KVCacheNumSharedPages(PagedKVCache kv, tvm::ffi::Shape ids);  // of these sequences' pages, those that others have, too; any time
void KVCacheDropPrefixes(PagedKVCache kv);
// lookups, hits, tokens asked for, tokens reused, pages given up, pages without a sequence, pages that can be found; any time
tvm::ffi::Shape KVCachePrefixStats(PagedKVCache kv);
tvm::ffi::Shape KVCacheDebugPrefixes(PagedKVCache kv);  // kv::CacheManager::DumpPrefixes

// To host memory and back, under the same id. On a device in the order of the current stream: neither waits for it.
void KVCacheSwapOut(PagedKVCache kv, int64_t id);
void KVCacheSwapIn(PagedKVCache kv, int64_t id);
bool KVCacheIsSwappedOut(PagedKVCache kv, int64_t id);
int64_t KVCacheSwappedBytes(PagedKVCache kv);  // host memory of sequences that are swapped out
// [begin, end) of positions that left windows and were given back; 0, 0 for none.
tvm::ffi::Shape KVCacheGone(PagedKVCache kv, int64_t id);
// [num_layers, pages, 2, num_kv_heads, page_size, head_dim] on the host, copied: of the pages that the sequence has, those of `gone` left
// out. Waits for the device.
tvm::ffi::Tensor KVCacheExportPages(PagedKVCache kv, int64_t id);
// A new sequence of `length` tokens with such contents. tokens: those known, at most `length`; they count where prefixes are reused.
void KVCacheImportPages(PagedKVCache kv, int64_t id, TensorView pages, int64_t length, tvm::ffi::Shape gone, TensorView tokens,
                        int64_t space);

}  // namespace tvm_infer::ffi_api
