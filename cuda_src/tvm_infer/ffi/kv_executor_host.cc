// The KV cache on the host.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "tvm_infer/cpu/attention.h"
#include "tvm_infer/cpu/page_selection.h"
#include "tvm_infer/cpu/rope_append.h"
#include "tvm_infer/ffi/kv_dtype.h"
#include "tvm_infer/ffi/kv_executor.h"

namespace tvm_infer::ffi_api {
namespace {

constexpr size_t kAlignment = kv::kStepAlignment;  // bytes: two cache lines, two AVX-512 registers
constexpr size_t kHugePage = size_t{2} << 20;

// Aligned memory that nobody has written: large blocks come from the system untouched and cost nothing until they are used.
struct AlignedAllocator {
  void AllocData(DLTensor* tensor) {
    const size_t bytes = std::max<size_t>(tvm::ffi::GetDataSize(*tensor), 1);
    const size_t alignment = bytes >= kHugePage ? kHugePage : kAlignment;
    const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    tensor->data = std::aligned_alloc(alignment, rounded);
    if (tensor->data == nullptr) {
      TVM_INFER_THROW(ArgumentError) << "the system has no " << bytes << " bytes for the pages or a workspace of the KV cache; create it "
                                     << "with fewer pages (num_pages) or a smaller step (max_batch, max_tokens)";
    }
#if defined(__linux__)
    // Attention reads small rows all over the cache, and would otherwise miss in the table of address translations at most of them. A wish:
    // where the system does not grant it, reads are slower and nothing else changes.
    if (alignment == kHugePage) madvise(tensor->data, rounded, MADV_HUGEPAGE);
#endif
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

class HostKVExecutor final : public KVExecutor {
 public:
  explicit HostKVExecutor(const KVCacheConfig& config)
      : config_(config), dtype_(FindKVDType(config.dtype)->type), kv_dtype_(FindKVDType(config.kv_dtype)->type) {
    Complete(&config_);
  }

  void Complete(KVCacheConfig* config) const override {
    if (config->num_ctas == 0) config->num_ctas = cpu::DefaultNumThreads();
    if (config->num_threads == 0) config->num_threads = cpu::DefaultNumThreads();
  }
  TileCosts TileTable() const override {
    return cpu::TileTable(dtype_, kv_dtype_, static_cast<int32_t>(config_.head_dim), static_cast<int32_t>(config_.head_dim_vo));
  }
  tvm::ffi::Tensor Allocate(std::initializer_list<int64_t> shape, DLDataType dtype, const char*) const override {
    return AllocateHost(shape, dtype);
  }
  Place place() const override { return kHost; }
  void BeginStep(const KVMemory& memory, const KVStep& step, const kv::StepRange& range) override;
  void MoveTokens(const KVMemory& memory, const std::vector<kv::TokenMove>& moves) const override;
  std::unique_ptr<PageStore> NewStore(int64_t bytes) const override { return NewHostPageStore(bytes); }
  void CopyPagesOut(const KVMemory& memory, const std::vector<int32_t>& pages, PageStore* store) const override {
    HostPagesOut(Layout(memory), pages, store->data());
  }
  void CopyPagesIn(const KVMemory& memory, const std::vector<int32_t>& pages, PageStore* store) const override {
    HostPagesIn(Layout(memory), pages, store->data());
  }
  void CheckRope(int64_t) const override {}  // any even number of elements
  void CheckVariant() const override {}
  void Upload(const void* host, int64_t bytes, const tvm::ffi::Tensor& to) const override {
    if (bytes > 0) std::memcpy(DataPtr<void>(TensorView(to)), host, static_cast<size_t>(bytes));
  }
  void Attention(const KVMemory& memory, const KVStep& step, const LayerCall& call) override;
  void PrepareSelection() const override {}
  void UpdateBounds(const KVMemory& memory, const std::vector<PageFill>& pages) const override;

 private:
  PageMemory Layout(const KVMemory& memory) const {
    return {DataPtr<char>(TensorView(memory.all_pages)), config_.num_layers, config_.num_pages, memory.page_bytes};
  }
  // k and v of the call; with a rope, its rotated queries too.
  void Append(const KVStep& step, const LayerCall& call, const cpu::KVSource& cache) const;
  cpu::KVSource Source(const KVMemory& memory, int64_t layer) const;
  cpu::PageBounds Bounds(const KVMemory& memory, int64_t layer) const;
  // Bounds of pages of `cache`, by lengths and its table.
  void BoundPages(const KVMemory& memory, int64_t layer, const cpu::KVSource& cache, int32_t num_requests, const int32_t* qo_indptr,
                  const int32_t* kv_len) const;
  // Lists of the layer for these queries, and their plan.
  void Select(const KVMemory& memory, const KVStep& step, int64_t layer, const TensorView& q) const;

  KVCacheConfig config_;
  cpu::DType dtype_, kv_dtype_;
};

// Only the slots that hold tokens: the rest of a page is never read.
void HostKVExecutor::BeginStep(const KVMemory& memory, const KVStep& step, const kv::StepRange&) {
  if (step.selects && step.lists_changed) {
    const TensorView planned(memory.selection.planned);
    std::memcpy(DataPtr<void>(TensorView(memory.selection.plan)), DataPtr<void>(planned), static_cast<size_t>(planned.numel()) * 4);
  }
  for (const tvm::ffi::Tensor& layer : memory.pages) {
    char* base = DataPtr<char>(TensorView(layer));
    for (const kv::PageCopy& copy : step.step->copies) {
      for (const PagePlanes& of : PlanesOf(config_)) {
        const char* src = base + copy.src * memory.page_bytes + of.offset;
        char* dst = base + copy.dst * memory.page_bytes + of.offset;
        for (int64_t head = 0; head < config_.num_kv_heads; ++head) {
          std::memcpy(dst + head * of.plane_bytes, src + head * of.plane_bytes, copy.num_tokens * of.row_bytes);
        }
      }
    }
  }
}

void HostKVExecutor::MoveTokens(const KVMemory& memory, const std::vector<kv::TokenMove>& moves) const {
  for (const tvm::ffi::Tensor& layer : memory.pages) {
    char* base = DataPtr<char>(TensorView(layer));
    for (const kv::TokenMove& move : moves) {
      if (move.src_page == move.dst_page && move.src_slot == move.dst_slot) continue;
      for (const PagePlanes& of : PlanesOf(config_)) {
        const char* src = base + move.src_page * memory.page_bytes + of.offset + move.src_slot * of.row_bytes;
        char* dst = base + move.dst_page * memory.page_bytes + of.offset + move.dst_slot * of.row_bytes;
        for (int64_t head = 0; head < config_.num_kv_heads; ++head) {
          std::memcpy(dst + head * of.plane_bytes, src + head * of.plane_bytes, of.row_bytes);
        }
      }
    }
  }
}

cpu::KVSource HostKVExecutor::Source(const KVMemory& memory, int64_t layer) const {
  cpu::KVSource source{};
  const std::array<PagePlanes, 2> planes = PlanesOf(config_);
  char* base = DataPtr<char>(TensorView(memory.pages[layer]));
  source.dtype = kv_dtype_;
  if (memory.is_scaled()) {
    source.k_scale.heads = DataPtr<const float>(TensorView(memory.k_scales)) + layer * config_.num_kv_heads;
    source.v_scale.heads = DataPtr<const float>(TensorView(memory.v_scales)) + layer * config_.num_kv_heads;
  }
  source.k = base;
  source.v = base + planes[1].offset;
  source.k_page_stride = source.v_page_stride = memory.page_bytes * 8 / config_.kv_dtype.bits;
  source.k_head_stride = config_.page_size * config_.head_dim;
  source.v_head_stride = config_.page_size * config_.head_dim_vo;
  source.k_token_stride = config_.head_dim;
  source.v_token_stride = config_.head_dim_vo;
  source.page_size = static_cast<int32_t>(config_.page_size);
  const int32_t* words = DataPtr<int32_t>(TensorView(memory.step_words));
  source.page_indptr = words + memory.layout->page_indptr() / 4;
  source.page_indices = words;
  return source;
}

void ZeroRows(const TensorView& o, int64_t begin, const KVCacheConfig& config) {
  const int64_t element_bytes = config.dtype.bits / 8;
  for (int64_t row = begin; row < o.size(0); ++row) {
    for (int64_t head = 0; head < o.size(1); ++head) {
      char* at = DataPtr<char>(o) + (row * Stride(o, 0) + head * Stride(o, 1)) * element_bytes;
      std::memset(at, 0, static_cast<size_t>(config.head_dim_vo * element_bytes));
    }
  }
}

void HostKVExecutor::Append(const KVStep& step, const LayerCall& call, const cpu::KVSource& cache) const {
  cpu::AppendArgs append{};
  append.dtype = dtype_;
  append.num_requests = step.step->num_requests();
  append.num_kv_heads = static_cast<int32_t>(config_.num_kv_heads);
  append.head_dim = static_cast<int32_t>(config_.head_dim);
  append.head_dim_vo = static_cast<int32_t>(config_.head_dim_vo);
  append.qo_indptr = step.step->qo_indptr.data();
  append.kv_len = step.step->kv_len.data();
  append.k = DataPtr<void>(call.k);
  append.v = DataPtr<void>(call.v);
  append.k_token_stride = Stride(call.k, 0);
  append.k_head_stride = Stride(call.k, 1);
  append.v_token_stride = Stride(call.v, 0);
  append.v_head_stride = Stride(call.v, 1);
  append.cache = cache;
  const int num_threads = static_cast<int>(config_.num_threads);
  if (call.rope == nullptr) return cpu::Append(append, num_threads);
  const TensorView& q_out = call.rope->rotated_q;
  cpu::RopeAppendArgs args{};
  args.append = append;
  args.num_tokens = step.step->num_tokens();
  args.num_qo_heads = static_cast<int32_t>(config_.num_qo_heads);
  args.q = DataPtr<void>(call.q);
  args.q_token_stride = Stride(call.q, 0);
  args.q_head_stride = Stride(call.q, 1);
  args.q_out = DataPtr<void>(q_out);
  args.q_out_token_stride = Stride(q_out, 0);
  args.q_out_head_stride = Stride(q_out, 1);
  args.inv_freq = call.rope->inv_freq;
  args.rotary_dim = call.rope->rotary_dim;
  args.is_interleaved = call.rope->is_interleaved;
  args.magnitude = call.rope->magnitude;
  cpu::RopeAppend(args, num_threads);
}

cpu::PageBounds HostKVExecutor::Bounds(const KVMemory& memory, int64_t layer) const {
  const TensorView bounds(memory.selection.bounds[layer]);
  return {dtype_, DataPtr<void>(bounds), Stride(bounds, 0), Stride(bounds, 1), Stride(bounds, 2)};
}

void HostKVExecutor::BoundPages(const KVMemory& memory, int64_t layer, const cpu::KVSource& cache, int32_t num_requests,
                                const int32_t* qo_indptr, const int32_t* kv_len) const {
  cpu::UpdatePageBoundsArgs args{};
  args.num_requests = num_requests;
  args.num_kv_heads = static_cast<int32_t>(config_.num_kv_heads);
  args.head_dim = static_cast<int32_t>(config_.head_dim);
  args.qo_indptr = qo_indptr;
  args.kv_len = kv_len;
  args.cache = cache;
  args.bounds = Bounds(memory, layer);
  cpu::UpdatePageBounds(args, static_cast<int>(config_.num_threads));
}

void HostKVExecutor::UpdateBounds(const KVMemory& memory, const std::vector<PageFill>& pages) const {
  const FillTables tables(static_cast<int64_t>(pages.size()));
  const std::vector<int32_t> words = tables.Words(pages);
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    if (!memory.selection.Has(layer)) continue;
    cpu::KVSource cache = Source(memory, layer);
    cache.page_indptr = words.data() + tables.page_indptr;
    cache.page_indices = words.data() + tables.page_indices;
    BoundPages(memory, layer, cache, static_cast<int32_t>(pages.size()), words.data() + tables.qo_indptr, words.data() + tables.kv_len);
  }
}

void HostKVExecutor::Select(const KVMemory& memory, const KVStep& step, int64_t layer, const TensorView& q) const {
  const KVSelection& selection = memory.selection;
  const kv::StepLayout& layout = *memory.layout;
  int32_t* const words = DataPtr<int32_t>(TensorView(memory.step_words));
  const TensorView scores(selection.scores);
  cpu::PageScoresArgs score{};
  score.num_requests = step.num_list_requests;
  score.num_qo_heads = static_cast<int32_t>(config_.num_qo_heads);
  score.num_kv_heads = static_cast<int32_t>(config_.num_kv_heads);
  score.head_dim = static_cast<int32_t>(config_.head_dim);
  score.page_size = selection.budget.page_size;
  score.is_sum = selection.is_sum;
  score.kv_len = words + layout.list_kv_len() / 4;
  score.dtype = dtype_;
  score.q = DataPtr<void>(q);
  score.q_token_stride = Stride(q, 0);
  score.q_head_stride = Stride(q, 1);
  score.page_indptr = words + layout.page_indptr() / 4;
  score.page_indices = words;
  score.bounds = Bounds(memory, layer);
  score.scores = DataPtr<float>(scores);
  score.score_request_stride = Stride(scores, 0);
  score.score_head_stride = Stride(scores, 1);
  score.min_pages = selection.budget.num_pages;
  cpu::PageScores(score, static_cast<int>(config_.num_threads));
  cpu::SelectPagesArgs select{};
  select.num_requests = score.num_requests;
  select.num_kv_heads = score.num_kv_heads;
  select.budget = selection.budget;
  select.kv_len = score.kv_len;
  select.page_indptr = score.page_indptr;
  select.page_indices = words;
  select.scores = score.scores;
  select.score_request_stride = score.score_request_stride;
  select.score_head_stride = score.score_head_stride;
  select.lists = words + layout.lists() / 4;
  select.planned = DataPtr<void>(TensorView(selection.planned));
  select.plan = DataPtr<void>(TensorView(selection.plan));
  cpu::SelectPages(select, static_cast<int>(config_.num_threads));
}

void HostKVExecutor::Attention(const KVMemory& memory, const KVStep& step, const LayerCall& call) {
  ZeroRows(call.o, step.step->num_tokens(), config_);
  if (step.step->num_tokens() == 0) return;
  cpu::KVSource cache = Source(memory, call.layer);
  Append(step, call, cache);
  const TensorView& q = call.rope == nullptr ? call.q : call.rope->rotated_q;
  cpu::AttentionArgs attend{};
  attend.plan = DataPtr<char>(TensorView(memory.step)) + memory.layout->plan(call.plan);
  if (memory.selection.Has(call.layer)) {
    BoundPages(memory, call.layer, cache, step.step->num_requests(), step.step->qo_indptr.data(), step.step->kv_len.data());
    if (step.selects) {
      Select(memory, step, call.layer, q);
      attend.plan = DataPtr<void>(TensorView(memory.selection.plan));
      cache.page_indptr = DataPtr<int32_t>(TensorView(memory.step_words)) + memory.layout->list_indptr() / 4;
    }
  }
  attend.variant = call.variant;
  attend.dtype = dtype_;
  attend.num_qo_heads = static_cast<int32_t>(config_.num_qo_heads);
  attend.num_kv_heads = static_cast<int32_t>(config_.num_kv_heads);
  attend.head_dim = static_cast<int32_t>(config_.head_dim);
  attend.head_dim_vo = static_cast<int32_t>(config_.head_dim_vo);
  attend.q = DataPtr<void>(q);
  attend.q_token_stride = Stride(q, 0);
  attend.q_head_stride = Stride(q, 1);
  attend.kv = cache;
  attend.sm_scale = static_cast<float>(call.sm_scale);
  attend.o = DataPtr<void>(call.o);
  attend.o_token_stride = Stride(call.o, 0);
  attend.o_head_stride = Stride(call.o, 1);
  const TensorView workspace(memory.workspace);
  attend.partial_o = DataPtr<float>(workspace);
  attend.partial_lse = attend.partial_o + workspace.numel() / (config_.head_dim_vo + 1) * config_.head_dim_vo;
  cpu::Attention(attend, static_cast<int>(config_.num_threads));
}

}  // namespace

tvm::ffi::Tensor AllocateHost(std::initializer_list<int64_t> shape, DLDataType dtype) {
  return tvm::ffi::Tensor::FromNDAlloc(AlignedAllocator(), tvm::ffi::ShapeView(shape.begin(), shape.size()), dtype, kHost.device);
}

std::unique_ptr<KVExecutor> MakeHostKVExecutor(const KVCacheConfig& config) { return std::make_unique<HostKVExecutor>(config); }

}  // namespace tvm_infer::ffi_api
