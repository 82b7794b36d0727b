// The paged KV cache as an object: page memory, the bookkeeping of kv/, and the plan of the step under way.
//
// It passes through the Relax VM as an opaque object and serves `attention_with_kv_cache` at every layer. Not thread-safe: one thread
// steps a cache at a time (kernels inside a call use their own threads).
#pragma once

#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/object.h>

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tvm_infer/ffi/common.h"
#include "tvm_infer/ffi/kv_executor.h"
#include "tvm_infer/ffi/variant.h"
#include "tvm_infer/kv/cache_manager.h"
#include "tvm_infer/kv/shared_pages.h"
#include "tvm_infer/schedule/planner.h"

namespace tvm_infer::ffi_api {

// A rotation as arguments of a call, by rope.h's names.
struct RopeArguments {
  const TensorView& inv_freq;
  int64_t interleaved;
  double magnitude;
};

class PagedKVCacheObj : public tvm::ffi::Object {
 public:
  // Throws ArgumentError, DTypeError, ExecutorError before anything large is allocated. Page memory is not touched: the system gives it
  // out page by page as sequences grow.
  explicit PagedKVCacheObj(const KVCacheConfig& config);

  // Grows the sequences, plans, copies shared pages that will be written, and brings all of it to the device by one asynchronous copy.
  // A failure changes nothing. inputs.num_rows < 0: as many rows as tokens. Where prefixes are reused, the token_ids of a causal step are
  // remembered: keys and values of another depend on tokens behind theirs.
  void BeginForward(const int64_t* ids, const int64_t* append_lengths, int64_t num_requests, bool causal, const kv::StepInputs& inputs);
  void EndForward() { manager_.EndForward(); }
  void CancelForward() { manager_.CancelForward(); }

  // kv::CacheManager::Moves, made.
  void MoveTokens(const int64_t* ids, const int64_t* src, const int64_t* dst, int64_t num_moves);

  void Remove(int64_t id);
  void Clear();

  // Contents of a sequence in host memory (kv_cache_swap.cc). CacheStateError in a step. The id stays where it is swapped out, and nothing
  // but Remove, SwapIn and ExportPages can be done with it then. Pages that others share are copied all the same.
  void SwapOut(int64_t id);
  void SwapIn(int64_t id);  // OutOfPagesError
  int64_t swapped_bytes() const;
  // [num_layers, pages it has, 2, num_kv_heads, page_size, head_dim] on the host: a copy. Slots behind its end hold anything.
  tvm::ffi::Tensor ExportPages(int64_t id) const;
  // A new sequence with these contents, in the same shape; arguments as of kv::CacheManager::AddFilled.
  void ImportPages(int64_t id, const TensorView& pages, int64_t length, const kv::CacheManager::Gone& gone, const int64_t* tokens,
                   int64_t num_tokens, int64_t space);

  // Stores k and v of the step's tokens at `layer`, then o = attention of q to all keys of its own sequence. Repeatable in a step.
  void Attention(int64_t layer, const TensorView& q, const TensorView& k, const TensorView& v, double sm_scale, bool causal,
                 const TensorView& o);

  // How FusedAttention rotates, for all layers: frequencies are copied from the host. CacheStateError in a step, or where the cache holds
  // sequences and this is another rotation than theirs.
  void SetRope(const TensorView& inv_freq, bool is_interleaved, double magnitude);
  // Scales of pages that have some, float32 [num_layers, num_kv_heads] on the host, each finite and above 0; 1 before. CacheStateError in a
  // step, and where the cache holds sequences, whose elements have others.
  void SetScales(const TensorView& k_scales, const TensorView& v_scales);
  // A copy of dense host data in memory of the cache's own kind, in the order of its stream: for tables of variants. `what`: in errors.
  tvm::ffi::Tensor Keep(const void* host, const tvm::ffi::Shape& shape, DLDataType dtype, const char* what) const;
  // What the layers' attention is besides; without a variant plain attention in this band, which has neither sinks nor chunks then. Layers
  // of other bands get a plan of their own each step. causal: that begin_forward must say, -1 for either. band: right is for steps that
  // are not causal. CacheStateError in a step, and once steps ran for an executable, whose graphs know kernels and addresses;
  // ArgumentError for more than kMaxPlans bands. Where every layer's band hides keys before a token, sequences give back pages that leave
  // the widest (kv/cache_manager.h); ArgumentError for a wider one than a sequence has kept keys for.
  void SetVariant(const tvm::ffi::Shape& layers, const tvm::ffi::Optional<VariantCall>& call, int64_t causal, MaskBand band);
  // Layers but those that stay dense keep bounds of their pages from now on, and in steps of one token a sequence each KV head reads
  // budget.num_pages of them at most (kv_cache_selection.h); 0: all read all keys. max_pages: of a sequence in such a step; 0: all of the
  // cache. CacheStateError in a step, where the cache holds sequences, and once steps ran for an executable; ArgumentError for numbers out
  // of their ranges and for layers with a variant or a band.
  void SetPageBudget(const PageBudget& budget, bool is_sum, int64_t max_pages, const tvm::ffi::Shape& dense_layers);
  const KVSelection& selection() const { return memory_.selection; }
  // Whether the layers that may select pages did in the step under way, or the last one.
  bool selects() const { return step_.selects; }
  // Whether steps look for pages that their sequences share, to read them once (kv/shared_pages.h); on at first.
  void SetSharedPrefix(bool is_on);
  // Attention of rotated queries to rotated keys, before their rotation q, k and v in one: qkv [num_rows, num_qo_heads + 2 * num_kv_heads,
  // head_dim]. CacheStateError before SetRope.
  void FusedAttention(int64_t layer, const TensorView& qkv, double sm_scale, bool causal, const TensorView& o);
  // The same with q, k and v apart and the rotation in the call: inv_freq float32 [rotary_dim / 2] where the cache is. Writes rotated_q.
  void RopeAttention(int64_t layer, const TensorView& q, const TensorView& k, const TensorView& v, const RopeArguments& rope,
                     double sm_scale, bool causal, const TensorView& rotated_q, const TensorView& o);

  // Positions of the step's tokens, int64 [num_tokens], on the host. A view: the next step overwrites it.
  tvm::ffi::Tensor QueryPositions() const;
  // What a model reads in a step of so many rows, on the device, int64: a view at an address that depends on the numbers alone, which every
  // step of as many rows overwrites. ArgumentError beyond max_tokens.
  tvm::ffi::Tensor InputIds(int64_t num_rows) const;                       // [1, num_rows]
  tvm::ffi::Tensor PositionIds(int64_t num_rows) const;                    // [1, num_rows]
  tvm::ffi::Tensor LogitRows(int64_t num_rows, int64_t num_logits) const;  // [num_logits]
  int64_t num_rows() const { return step_.num_rows; }
  // int32, the bytes used of the last plan, on the host. A view: the next step overwrites it.
  tvm::ffi::Tensor CurrentPlan(int64_t layer) const;
  // [num_pages, 2, num_kv_heads, page_size, head_dim]: keys are [:, 0], values [:, 1]. Of two widths keys alone, [num_pages, num_kv_heads,
  // page_size, head_dim].
  const tvm::ffi::Tensor& Pages(int64_t layer) const;
  tvm::ffi::Tensor ValuePages(int64_t layer) const;  // [num_pages, num_kv_heads, page_size, head_dim_vo]

  int64_t bytes_per_page() const { return kv_bytes_per_page() + memory_.selection.bounds_bytes; }  // of all layers
  const KVCacheConfig& config() const { return config_; }
  kv::CacheManager& manager() { return manager_; }

  // A CUDA graph that an executable captured does not see which cache it replays, so a cache serves one executable (by its token).
  void Bind(int64_t token);
  void Release(int64_t token);

  // The type index is made at first use: a static object, linked into a model, may register nothing when it is loaded. The key carries
  // the ABI (common.h), so that a model built against another layout gets a type error that names both.
  static constexpr const char* _type_key = "tvm_infer.PagedKVCache.v5";
  static_assert(kAbiVersion == 5, "a new ABI needs a new type key");
  static constexpr bool _type_final = true;
  static constexpr bool _type_mutable = true;
  static constexpr int32_t _type_child_slots = 0;
  static constexpr int32_t _type_depth = tvm::ffi::Object::_type_depth + 1;
  static int32_t _GetOrAllocRuntimeTypeIndex();
  static int32_t RuntimeTypeIndex() noexcept { return _GetOrAllocRuntimeTypeIndex(); }

 private:
  // A layer's attention.
  struct Layer {
    tvm::ffi::Optional<VariantCall> variant;
    int32_t causal = -1;  // that a step must have; -1: either
    int32_t plan = 0;     // index in bands_
    bool is_plain(const std::vector<MaskBand>& bands) const { return !variant.has_value() && bands[plan] == MaskBand(); }
  };

  int64_t kv_bytes_per_page() const { return memory_.page_bytes * config_.num_layers; }  // keys and values
  PlanParams Params(bool causal, const MaskBand& band) const;
  bool MayShare(int32_t plan, bool selects) const;
  void AllocateStep(KVMemory* memory, const std::vector<MaskBand>& bands) const;
  void AllocateBounds(KVSelection* selection, const tvm::ffi::Shape& dense_layers) const;
  void TakeStep(KVMemory&& memory);  // what AllocateStep allocated
  // Whether the step's layers select, and the plan for their lists. WorkspaceError for a sequence of too many pages.
  void PlanLists(const kv::Step& step, bool causal, KVStep* next);
  bool Selects(const kv::Step& step) const;
  void CheckStaysPlain(const tvm::ffi::Shape& layers, bool is_changed) const;  // ArgumentError for a layer that selects
  // Anew, of all pages that a sequence has; of the pages of these positions.
  void UpdateBoundsOf(int64_t id) const;
  void UpdateBoundsAt(const int64_t* ids, const int64_t* positions, int64_t count) const;
  LayerCall CallOf(int64_t layer, const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& o,
                   double sm_scale) const;
  KVMemory AllocateMemory();  // sets the executor's costs too
  void AllocatePages(KVMemory* memory) const;
  int64_t NumRows(const kv::Step& step, const kv::StepInputs& inputs) const;
  void CheckBetweenSteps(const char* operation) const;
  void CheckEqualWidths(const char* operation, const char* way_out) const;  // ArgumentError
  std::unique_ptr<PageStore> StoreOf(size_t num_pages) const;
  void CheckCall(int64_t layer, double sm_scale, bool causal) const;
  void CheckTokens(const TensorView& tensor, const char* name, int64_t heads, const char* heads_name, bool is_vo = false) const;
  tvm::ffi::Tensor StepView(int64_t offset, int64_t length, bool is_batch_of_one) const;

  KVCacheConfig config_;
  std::unique_ptr<KVExecutor> executor_;
  TileCosts costs_;
  std::vector<MaskBand> bands_ = {MaskBand()};  // of each plan of a step that is not causal; in a causal one their right is 0
  std::vector<Layer> layers_;
  bool has_stepped_ = false;
  bool finds_shared_ = true;
  KVMemory memory_;  // before manager_: what is too large to allocate fails here, untouched
  kv::CacheManager manager_;
  Planner planner_;
  kv::SharedPages shared_pages_;
  int32_t planned_requests_ = 0;  // what KVSelection::host_planned is for: so many requests, and this mask; 0: nothing yet
  bool planned_causal_ = false;
  enum class Planned { kUnknown, kNothing, kLists } planned_ = Planned::kUnknown;  // what the last step left in KVSelection::planned
  KVStep step_;
  KVRope rope_;
  std::vector<float> inv_freq_;                                      // of rope_, on the host
  bool causal_ = true;                                               // of the plan
  int64_t owner_ = 0;                                                // Bind()'s token; 0: none
  int64_t last_owner_ = 0;                                           // whose keys and values the pages have
  std::unordered_map<int64_t, std::unique_ptr<PageStore>> swapped_;  // by sequence; null where it has no pages
};

class PagedKVCache : public tvm::ffi::ObjectRef {
 public:
  explicit PagedKVCache(tvm::ffi::ObjectPtr<PagedKVCacheObj> object) : ObjectRef(std::move(object)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(PagedKVCache, tvm::ffi::ObjectRef, PagedKVCacheObj);
};

}  // namespace tvm_infer::ffi_api
