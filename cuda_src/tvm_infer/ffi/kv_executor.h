// The device half of a KV cache: where its memory is and who computes. One class for each executor; the object (kv_cache_object.h) plans
// and keeps book the same way for both.
#pragma once

#include <tvm/ffi/container/tensor.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <vector>

#include "tvm_infer/element_type.h"
#include "tvm_infer/ffi/common.h"
#include "tvm_infer/ffi/page_store.h"
#include "tvm_infer/kv/step_buffer.h"
#include "tvm_infer/schedule/page_budget.h"
#include "tvm_infer/schedule/planner.h"
#include "tvm_infer/variant/cpu_functions.h"

namespace tvm_infer::ffi_api {

struct KVCacheConfig {
  int64_t num_layers, num_qo_heads, num_kv_heads;
  int64_t head_dim;     // of q and k
  int64_t head_dim_vo;  // of v and o, at most head_dim
  DLDataType dtype;     // of q, k, v and o
  DLDataType kv_dtype;  // of the pages: dtype, or one that is scaled (kv_dtype.h)
  int64_t page_size, num_pages;
  int64_t max_batch;    // sequences in one step
  int64_t max_tokens;   // rows of one step: the longest prefill chunk
  int64_t num_ctas;     // work queues of a plan; 0: the executor's own choice
  int64_t num_threads;  // of the cpu executor; 0: its default
  DLDevice device;

  bool has_equal_widths() const { return head_dim == head_dim_vo; }
};

// In a page of one layer: the keys of all heads, then the values.
struct PagePlanes {
  int64_t offset;       // bytes, in the page
  int64_t row_bytes;    // a token's
  int64_t plane_bytes;  // a head's
};
inline std::array<PagePlanes, 2> PlanesOf(const KVCacheConfig& c) {
  const int64_t k_row = BytesOf(c.head_dim, c.kv_dtype.bits), v_row = BytesOf(c.head_dim_vo, c.kv_dtype.bits);
  return {PagePlanes{0, k_row, c.page_size * k_row}, PagePlanes{c.num_kv_heads * c.page_size * k_row, v_row, c.page_size * v_row}};
}

// Of a cache whose layers select pages in steps of one token a sequence (page_selection.h): bounds of its pages, and what such a step works
// in. Lists and their lengths are in the step's block (kv/step_buffer.h).
struct KVSelection {
  PageBudget budget{};
  bool is_sum = false;    // scores of the query heads of a KV head are added
  int32_t max_pages = 0;  // of a sequence in a step that selects
  // Of each layer that selects [num_pages, 2, num_kv_heads, head_dim], of the queries' type; undefined of layers that stay dense.
  std::vector<tvm::ffi::Tensor> bounds;
  int64_t bounds_bytes = 0;        // of a page, all layers that have some
  tvm::ffi::Tensor scores;         // float32 [max_batch, num_kv_heads, max_pages]
  tvm::ffi::Tensor tables;         // int32 [4 * num_pages + 2]: lengths and page tables of pages whose bounds are to be made
  tvm::ffi::Tensor host_planned;   // int32: a plan for full lists, on the host
  tvm::ffi::Tensor planned, plan;  // the same where the executor computes, and the one that ends where lists end
  bool is_on() const { return budget.num_pages > 0; }
  bool Has(int64_t layer) const { return is_on() && bounds[layer].defined(); }
};

// What a cache owns, at fixed addresses for its life.
struct KVMemory {
  // [num_layers, num_pages, 2, num_kv_heads, page_size, head_dim]; of two widths [num_layers, num_pages, elements of PlanesOf].
  tvm::ffi::Tensor all_pages;
  std::vector<tvm::ffi::Tensor> pages;  // of each layer: views; of two widths those of keys, [num_pages, num_kv_heads, page_size, head_dim]
  std::vector<tvm::ffi::Tensor> v_pages;  // of two widths those of values, head_dim_vo wide; else empty
  tvm::ffi::Tensor host_step, step;       // int64: what a step reads (kv/step_buffer.h), written on the host, read on the device; on the
                                          // host one tensor
  tvm::ffi::Tensor step_words;            // `step` as int32
  tvm::ffi::Tensor k_scales, v_scales;    // float32 [num_layers, num_kv_heads], of pages that are scaled; else undefined
  tvm::ffi::Tensor workspace;             // float32 [partial rows * (head_dim_vo + 1)]
  std::unique_ptr<const kv::StepLayout> layout;
  int64_t partial_rows = 0;  // of the workspace
  int64_t page_bytes = 0;    // of one layer, without bounds
  KVSelection selection;
  bool is_scaled() const { return k_scales.defined(); }
};

// How a cache rotates queries and keys; its memory is at fixed addresses too.
struct KVRope {
  tvm::ffi::Tensor inv_freq;   // float32 [head_dim / 2], of which rotary_dim / 2 are set
  tvm::ffi::Tensor rotated_q;  // [max_tokens, num_qo_heads, head_dim]: the layer's queries, between rotation and attention
  int64_t rotary_dim = 0;
  bool is_interleaved = false;
  float magnitude = 1;  // on cosine and sine
  bool is_set() const { return inv_freq.defined(); }
};

inline constexpr int32_t kMaxPlans = 4;  // of a step: bands that the layers of one model may have

// How one layer's queries and keys turn on their way.
struct LayerRope {
  const float* inv_freq;        // [rotary_dim / 2], where the executor computes
  const TensorView& rotated_q;  // [num_rows, num_qo_heads, head_dim], contiguous heads: between rotation and attention
  int32_t rotary_dim;
  bool is_interleaved;
  float magnitude;     // on cosine and sine
  const char* q_name;  // of the argument that queries come in, for messages
};

// The step under way.
struct KVStep {
  const kv::Step* step = nullptr;
  int64_t num_rows = 0;  // of q, k, v and o; those behind step->num_tokens() are padding
  int64_t plan_bytes[kMaxPlans] = {};
  uint64_t capture_keys[kMaxPlans] = {};
  // Of a cache whose layers select. They do in a step of one token a sequence, where some sequence has more pages than a list; the plan for
  // lists is for as many requests as the step may have with its rows, num_list_requests: those behind its own have empty lists.
  bool selects = false;
  bool lists_changed = false;  // what is to be in KVSelection::planned is not what was there in the last step
  int32_t num_list_requests = 0;
  int32_t list_band = 0;  // which plan the layers that select have in other steps
  int64_t last_plan_bytes(const kv::StepLayout& layout) const { return plan_bytes[layout.limits().num_plans - 1]; }
};

// One layer's q, k, v and o: [num_rows, heads, head_dim or head_dim_vo], of the cache's heads, widths and dtype.
struct LayerCall {
  int64_t layer;
  const TensorView &q, &k, &v, &o;
  double sm_scale;
  int32_t plan = 0;                        // which of the step's
  const variant::Call* variant = nullptr;  // null: none
  const LayerRope* rope = nullptr;         // rotates q and k on their way; null: they come as they are to be
};

// A page, and how many of its slots hold tokens.
struct PageFill {
  int32_t page, num_tokens;
};

// Tables of pages as requests of one page each, whose tokens are all new: what UpdatePageBounds takes. In KVSelection::tables, in words.
struct FillTables {
  explicit FillTables(int64_t num_pages)
      : qo_indptr(0), kv_len(num_pages + 1), page_indptr(2 * num_pages + 1), page_indices(3 * num_pages + 2), size(4 * num_pages + 2) {}
  std::vector<int32_t> Words(const std::vector<PageFill>& pages) const;
  int64_t qo_indptr, kv_len, page_indptr, page_indices, size;
};

class KVExecutor {
 public:
  virtual ~KVExecutor() = default;

  // Fills in what config leaves to the executor; throws ExecutorError or DTypeError for what it has no kernels for.
  virtual void Complete(KVCacheConfig* config) const = 0;
  // Costs that plans are made with: a static table.
  virtual TileCosts TileTable() const = 0;
  // Uninitialised memory of the device that lives as long as the tensor. `what` it is for, in errors.
  virtual tvm::ffi::Tensor Allocate(std::initializer_list<int64_t> shape, DLDataType dtype, const char* what) const = 0;
  // Copies shared pages that the step writes to, and brings `range` of the step's block to the device.
  virtual void BeginStep(const KVMemory& memory, const KVStep& step, const kv::StepRange& range) = 0;
  // One move after the other, in every layer.
  virtual void MoveTokens(const KVMemory& memory, const std::vector<kv::TokenMove>& moves) const = 0;
  // Host memory for the contents of pages, of `bytes`, as this executor copies them fastest.
  virtual std::unique_ptr<PageStore> NewStore(int64_t bytes) const = 0;
  // The contents of `pages` in every layer, [num_layers, pages.size(), bytes of a page in a layer], to the store or back from it, in the
  // order of the stream: returns before a device is done.
  virtual void CopyPagesOut(const KVMemory& memory, const std::vector<int32_t>& pages, PageStore* store) const = 0;
  virtual void CopyPagesIn(const KVMemory& memory, const std::vector<int32_t>& pages, PageStore* store) const = 0;
  // Where tensors of a call must be.
  virtual Place place() const = 0;
  // Throws ExecutorError where heads cannot be rotated so.
  virtual void CheckRope(int64_t rotary_dim) const = 0;
  // Throws ExecutorError where layers of such a cache take no variant.
  virtual void CheckVariant() const = 0;
  // From the host to memory of this executor, in the order of its stream. `host` may be written again at once.
  virtual void Upload(const void* host, int64_t bytes, const tvm::ffi::Tensor& to) const = 0;
  // Appends k and v, then o = attention of q; rows of padding append nowhere and get o = 0.
  virtual void Attention(const KVMemory& memory, const KVStep& step, const LayerCall& call) = 0;
  // Throws where layers of such a cache cannot select pages; loads what they need to.
  virtual void PrepareSelection() const = 0;
  // Bounds of these pages from the keys in them, in every layer that selects. Each page once.
  virtual void UpdateBounds(const KVMemory& memory, const std::vector<PageFill>& pages) const = 0;
};

// `config` is checked but for what the executor has an opinion on. Throws ExecutorError for a device that has none.
std::unique_ptr<KVExecutor> MakeKVExecutor(const KVCacheConfig& config);
std::unique_ptr<KVExecutor> MakeHostKVExecutor(const KVCacheConfig& config);
std::unique_ptr<KVExecutor> MakeCudaKVExecutor(const KVCacheConfig& config);

// Uninitialised host memory, aligned for vector registers; large blocks to huge pages.
tvm::ffi::Tensor AllocateHost(std::initializer_list<int64_t> shape, DLDataType dtype);

}  // namespace tvm_infer::ffi_api
