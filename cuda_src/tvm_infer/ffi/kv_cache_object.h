// The paged KV cache as an object: page memory, the bookkeeping of kv/, and the plan of the step under way.
//
// It passes through the Relax VM as an opaque object and serves `attention_with_kv_cache` at every layer. Not thread-safe: one thread
// steps a cache at a time (kernels inside a call use their own threads).
#pragma once

#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/object.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "tvm_infer/cpu/attention.h"
#include "tvm_infer/ffi/common.h"
#include "tvm_infer/kv/cache_manager.h"
#include "tvm_infer/schedule/planner.h"

namespace tvm_infer::ffi_api {

struct KVCacheConfig {
  int64_t num_layers, num_qo_heads, num_kv_heads, head_dim;
  DLDataType dtype;
  int64_t page_size, num_pages;
  int64_t max_batch;    // sequences in one step
  int64_t max_tokens;   // new tokens in one step: the longest prefill chunk
  int64_t num_ctas;     // work queues of a plan; 0: the executor's threads
  int64_t num_threads;  // of the cpu executor; 0: its default
  DLDevice device;
};

class PagedKVCacheObj : public tvm::ffi::Object {
 public:
  // Throws ArgumentError, DTypeError, ExecutorError before anything large is allocated. Page memory is not touched: the system gives it
  // out page by page as sequences grow.
  explicit PagedKVCacheObj(const KVCacheConfig& config);

  // Grows the sequences, copies shared pages that will be written, plans. A failure changes nothing.
  void BeginForward(const int64_t* ids, const int64_t* append_lengths, int64_t num_requests, bool causal);
  void EndForward() { manager_.EndForward(); }
  void CancelForward() { manager_.CancelForward(); }

  // Stores k and v of the step's tokens at `layer`, then o = attention of q to all keys of its own sequence. Repeatable in a step.
  void Attention(int64_t layer, const TensorView& q, const TensorView& k, const TensorView& v, double sm_scale, bool causal,
                 const TensorView& o);

  // int64 [num_tokens] in the layout of `ndim`: 1 [num_tokens], 2 [1, num_tokens]. A view: the next step overwrites it.
  tvm::ffi::Tensor QueryPositions(int ndim) const;
  // int32, the bytes used of the last plan. A view: the next step overwrites it.
  tvm::ffi::Tensor CurrentPlan() const;
  // [num_pages, 2, num_kv_heads, page_size, head_dim]: keys are [:, 0], values [:, 1].
  const tvm::ffi::Tensor& Pages(int64_t layer) const;

  int64_t bytes_per_page() const { return bytes_per_page_; }  // keys and values of all layers
  const KVCacheConfig& config() const { return config_; }
  kv::CacheManager& manager() { return manager_; }

  // A CUDA graph that an executable captured does not see which cache it replays, so a cache serves one executable (by its token).
  void Bind(int64_t token);
  void Release(int64_t token);

  // The type index is made at first use: a static object, linked into a model, may register nothing when it is loaded. The key carries
  // the ABI (common.h), so that a model built against another layout gets a type error that names both.
  static constexpr const char* _type_key = "tvm_infer.PagedKVCache.v1";
  static_assert(kAbiVersion == 1, "a new ABI needs a new type key");
  static constexpr bool _type_final = true;
  static constexpr bool _type_mutable = true;
  static constexpr int32_t _type_child_slots = 0;
  static constexpr int32_t _type_depth = tvm::ffi::Object::_type_depth + 1;
  static int32_t _GetOrAllocRuntimeTypeIndex();
  static int32_t RuntimeTypeIndex() noexcept { return _GetOrAllocRuntimeTypeIndex(); }

 private:
  PlanParams Params(bool causal) const;
  void CopySharedPages(const std::vector<kv::PageCopy>& copies);
  cpu::KVSource Source(int64_t layer) const;

  KVCacheConfig config_;
  cpu::DType dtype_;
  // One per layer, at a fixed address for the cache's life. Before manager_: what is too large to allocate fails here, untouched.
  std::vector<tvm::ffi::Tensor> pages_;
  kv::CacheManager manager_;
  Planner planner_;
  const TileClass* tile_classes_;
  int32_t num_tile_classes_;
  bool causal_ = true;  // of the plan
  int64_t plan_bytes_ = 0;
  int64_t partial_rows_;
  int64_t bytes_per_page_;
  int64_t owner_ = 0;  // Bind()'s token; 0: none
  // At fixed addresses for the cache's life.
  tvm::ffi::Tensor plan_;             // int32 [capacity]
  tvm::ffi::Tensor partial_o_;        // float32 [partial_rows, head_dim]
  tvm::ffi::Tensor partial_lse_;      // float32 [partial_rows]
  tvm::ffi::Tensor query_positions_;  // int64 [max_tokens]
};

class PagedKVCache : public tvm::ffi::ObjectRef {
 public:
  explicit PagedKVCache(tvm::ffi::ObjectPtr<PagedKVCacheObj> object) : ObjectRef(std::move(object)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(PagedKVCache, tvm::ffi::ObjectRef, PagedKVCacheObj);
};

}  // namespace tvm_infer::ffi_api
