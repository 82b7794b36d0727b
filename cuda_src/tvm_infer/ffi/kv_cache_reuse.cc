#include "tvm_infer/ffi/kv_cache_reuse.h"

#include <new>

#include "tvm_infer/ffi/common.h"

namespace tvm_infer::ffi_api {
namespace {

using tvm::ffi::Shape;

struct Tokens {
  const int64_t* data;
  int64_t count;
};

Tokens Checked(const TensorView& tokens) {
  CheckCpu(tokens, "tokens");
  CheckDType(tokens, "tokens", DLDataType{kDLInt, 64, 1}, "tokens are int64");
  CheckRank(tokens, "tokens", 1, "one number each");
  CheckContiguous(tokens, "tokens");
  return {DataPtr<int64_t>(tokens), tokens.size(0)};
}

Shape ToShape(const std::vector<int64_t>& values) { return Shape(values.begin(), values.end()); }

}  // namespace

void KVCacheEnablePrefixReuse(PagedKVCache kv) {
  Guarded([&] {
    try {
      kv->manager().EnablePrefixReuse();
    } catch (const std::bad_alloc&) {
      TVM_INFER_THROW(ArgumentError) << "argument `prefix_reuse`: the system has no memory to remember the tokens of "
                                     << kv->config().num_pages << " pages of " << kv->config().page_size << "; take fewer pages";
    }
  });
}
bool KVCacheReusesPrefixes(PagedKVCache kv) { return kv->manager().reuses_prefixes(); }

int64_t KVCacheAddWithPrefix(PagedKVCache kv, int64_t id, TensorView tokens, int64_t space) {
  return Guarded([&] {
    const Tokens known = Checked(tokens);
    return kv->manager().AddWithPrefix(id, known.data, known.count, space);
  });
}
int64_t KVCacheMatchPrefix(PagedKVCache kv, TensorView tokens, int64_t space) {
  return Guarded([&] {
    const Tokens known = Checked(tokens);
    return kv->manager().MatchPrefix(known.data, known.count, space);
  });
}
void KVCacheCommitTokens(PagedKVCache kv, int64_t id, TensorView tokens) {
  Guarded([&] {
    const Tokens known = Checked(tokens);
    kv->manager().CommitTokens(id, known.data, known.count);
  });
}
Shape KVCacheTokens(PagedKVCache kv, int64_t id) {
  return Guarded([&] { return ToShape(kv->manager().Tokens(id)); });
}
int64_t KVCacheNumKnownTokens(PagedKVCache kv, int64_t id) {
  return Guarded([&] { return static_cast<int64_t>(kv->manager().Tokens(id).size()); });
}
int64_t KVCacheNamespace(PagedKVCache kv, int64_t id) {
  return Guarded([&] { return kv->manager().Space(id); });
}
int64_t KVCacheNumSharedPages(PagedKVCache kv, Shape ids) {
  return Guarded([&] { return kv->manager().NumShared(ids.data(), static_cast<int64_t>(ids.size())); });
}
void KVCacheDropPrefixes(PagedKVCache kv) {
  Guarded([&] { kv->manager().DropPrefixes(); });
}
Shape KVCachePrefixStats(PagedKVCache kv) {
  return Guarded([&] {
    const kv::PrefixIndex& index = kv->manager().prefixes();
    const kv::PrefixStats& s = index.stats();
    return Shape({s.lookups, s.hits, s.tokens_asked, s.tokens_reused, s.evictions, int64_t{kv->manager().pool().num_kept()},
                  int64_t{index.num_nodes()}});
  });
}
Shape KVCacheDebugPrefixes(PagedKVCache kv) {
  return Guarded([&] { return ToShape(kv->manager().DumpPrefixes()); });
}

void KVCacheSwapOut(PagedKVCache kv, int64_t id) {
  Guarded([&] { kv->SwapOut(id); });
}
void KVCacheSwapIn(PagedKVCache kv, int64_t id) {
  Guarded([&] { kv->SwapIn(id); });
}
bool KVCacheIsSwappedOut(PagedKVCache kv, int64_t id) {
  return Guarded([&] { return kv->manager().IsAway(id); });
}
int64_t KVCacheSwappedBytes(PagedKVCache kv) { return kv->swapped_bytes(); }
Shape KVCacheGone(PagedKVCache kv, int64_t id) {
  return Guarded([&] {
    const kv::CacheManager::Gone gone = kv->manager().GoneOf(id);
    return Shape({gone.begin, gone.end});
  });
}
tvm::ffi::Tensor KVCacheExportPages(PagedKVCache kv, int64_t id) {
  return Guarded([&] { return kv->ExportPages(id); });
}
void KVCacheImportPages(PagedKVCache kv, int64_t id, TensorView pages, int64_t length, Shape gone, TensorView tokens, int64_t space) {
  Guarded([&] {
    const Tokens known = Checked(tokens);
    if (gone.size() != 2) {
      TVM_INFER_THROW(ArgumentError) << "argument `gone` has " << gone.size() << " entries; it must have two: where it begins and ends";
    }
    kv->ImportPages(id, pages, length, {gone[0], gone[1]}, known.data, known.count, space);
  });
}

}  // namespace tvm_infer::ffi_api
