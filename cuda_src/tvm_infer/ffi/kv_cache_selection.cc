#include "tvm_infer/ffi/kv_cache_selection.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "tvm_infer/ffi/page_selection_checks.h"

namespace tvm_infer::ffi_api {
namespace {

constexpr int64_t kMaxListEntries = int64_t{1} << 28;  // of a step's lists: 1 GiB; entries of page tables are of 32 bits

bool IsIn(const tvm::ffi::Shape& layers, int64_t layer) { return std::find(layers.begin(), layers.end(), layer) != layers.end(); }

}  // namespace

void PagedKVCacheObj::SetPageBudget(const PageBudget& budget, bool is_sum, int64_t max_pages, const tvm::ffi::Shape& dense_layers) {
  if (manager_.in_forward()) {
    TVM_INFER_THROW(CacheStateError) << "kv_cache_set_page_budget in a step, which is planned already; end_forward() comes first";
  }
  if (owner_ != 0 && has_stepped_) {
    TVM_INFER_THROW(CacheStateError) << "kv_cache_set_page_budget on a cache that ran steps for executable " << owner_
                                     << ", whose graphs know its kernels and addresses. Set it before the first step, on a new cache";
  }
  if (const size_t count = manager_.Ids().size(); count > 0) {
    TVM_INFER_THROW(CacheStateError)
        << "kv_cache_set_page_budget on a cache that holds " << count
        << " sequences, of whose pages it has no bounds. Set it before the first sequence, or clear() the cache";
  }
  if (max_pages < 0) {
    TVM_INFER_THROW(ArgumentError) << "argument `max_pages` is " << max_pages << "; it must be at least 1, or 0 for all pages of the cache";
  }
  const int64_t num_lists = config_.max_batch * config_.num_kv_heads;
  if (num_lists * budget.num_pages > kMaxListEntries) {
    TVM_INFER_THROW(ArgumentError) << "argument `num_pages` is " << budget.num_pages << " for lists of " << config_.max_batch
                                   << " sequences and " << config_.num_kv_heads << " KV heads; a step's lists have at most "
                                   << kMaxListEntries << " pages: take fewer, or a smaller max_batch";
  }
  if (budget.num_pages > 0) executor_->PrepareSelection();
  KVMemory memory;  // what cannot be allocated changes nothing
  KVSelection& selection = memory.selection;
  if (budget.num_pages > 0) {
    selection.budget = budget;
    selection.is_sum = is_sum;
    selection.max_pages = static_cast<int32_t>(max_pages == 0 ? config_.num_pages : std::min(max_pages, config_.num_pages));
    AllocateBounds(&selection, dense_layers);
  }
  AllocateStep(&memory, bands_);
  TakeStep(std::move(memory));
  if (manager_.reuses_prefixes()) manager_.ForgetTokens();  // pages that were filled before have no bounds
}

void PagedKVCacheObj::AllocateBounds(KVSelection* selection, const tvm::ffi::Shape& dense_layers) const {
  const KVCacheConfig& c = config_;
  for (const int64_t layer : dense_layers) Pages(layer);  // throws for what is no layer
  std::vector<int64_t> selecting;
  for (int64_t layer = 0; layer < c.num_layers; ++layer) {
    if (IsIn(dense_layers, layer)) continue;
    if (!layers_[layer].is_plain(bands_)) {
      TVM_INFER_THROW(ArgumentError)
          << "argument `dense_layers` does not have layer " << layer
          << ", which has an attention variant, a window or chunks; these know positions, which lists of pages do "
             "not have: let the layer stay dense";
    }
    selecting.push_back(layer);
  }
  if (selecting.empty()) {
    TVM_INFER_THROW(ArgumentError) << "argument `dense_layers` has all " << c.num_layers
                                   << " layers of the cache; leave out those that are to select, or set no page budget";
  }
  const auto count = static_cast<int64_t>(selecting.size());
  const tvm::ffi::Tensor all = executor_->Allocate({count, c.num_pages, 2, c.num_kv_heads, c.head_dim}, c.dtype, "bounds of its pages");
  const int64_t head = c.head_dim, side = c.num_kv_heads * head, page = 2 * side;
  const int64_t shape[] = {c.num_pages, 2, c.num_kv_heads, c.head_dim}, strides[] = {page, side, head, 1};
  selection->bounds.resize(static_cast<size_t>(c.num_layers));
  for (int64_t i = 0; i < count; ++i) {
    selection->bounds[selecting[i]] =
        all.as_strided(tvm::ffi::ShapeView(shape, 4), tvm::ffi::ShapeView(strides, 4), i * c.num_pages * page);
  }
  selection->bounds_bytes = count * page * c.dtype.bits / 8;
  selection->tables = executor_->Allocate({FillTables(c.num_pages).size}, DLDataType{kDLInt, 32, 1}, "tables of its pages");
}

void PagedKVCacheObj::TakeStep(KVMemory&& memory) {
  memory_.layout = std::move(memory.layout);
  memory_.host_step = memory.host_step;
  memory_.step = memory.step;
  memory_.step_words = memory.step_words;
  memory_.workspace = memory.workspace;
  memory_.partial_rows = memory.partial_rows;
  memory_.selection = std::move(memory.selection);
  planned_requests_ = 0;
  planned_ = Planned::kUnknown;
  step_ = KVStep();
}

void PagedKVCacheObj::CheckStaysPlain(const tvm::ffi::Shape& layers, bool is_changed) const {
  if (!is_changed || !memory_.selection.is_on()) return;
  for (const int64_t layer : layers) {
    Pages(layer);
    if (!memory_.selection.Has(layer)) continue;
    TVM_INFER_THROW(ArgumentError) << "argument `layers` has " << layer
                                   << ", a layer that selects pages; a variant, a window or chunks know positions, which lists of pages do "
                                      "not have: let the layer stay dense (dense_layers of the page budget)";
  }
}

bool PagedKVCacheObj::Selects(const kv::Step& step) const {
  const KVSelection& selection = memory_.selection;
  const int32_t num_requests = step.num_requests();
  bool selects = false;
  for (int32_t r = 0; r < num_requests; ++r) {
    if (step.qo_indptr[r + 1] != r + 1) return false;  // not one token each
    selects |= !selection.budget.TakesAll(step.kv_len[r]);
  }
  for (int32_t r = 0; selects && r < num_requests; ++r) {
    if (selection.budget.PagesOf(step.kv_len[r]) <= selection.max_pages) continue;
    TVM_INFER_THROW(WorkspaceError) << "sequence " << r << " of the step has " << selection.budget.PagesOf(step.kv_len[r])
                                    << " pages; the page budget has room for the scores of max_pages = " << selection.max_pages
                                    << " of a sequence: make the cache with more";
  }
  return selects;
}

void PagedKVCacheObj::PlanLists(const kv::Step& step, bool causal, KVStep* next) {
  const KVSelection& selection = memory_.selection;
  next->selects = Selects(step);
  next->num_list_requests = static_cast<int32_t>(std::min(next->num_rows, config_.max_batch));
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    if (selection.Has(static_cast<int64_t>(layer))) next->list_band = layers_[layer].plan;
  }
  if (next->selects && (next->num_list_requests != planned_requests_ || causal != planned_causal_)) {
    const int32_t num_requests = next->num_list_requests;
    std::vector<int32_t> qo_indptr(static_cast<size_t>(num_requests) + 1);
    std::iota(qo_indptr.begin(), qo_indptr.end(), 0);
    const std::vector<int32_t> kv_len(static_cast<size_t>(num_requests * config_.num_kv_heads),
                                      selection.budget.num_pages * selection.budget.page_size);
    planned_requests_ = 0;
    planned_ = Planned::kUnknown;
    const TensorView words(selection.host_planned);
    planner_.PlanHeadLists(Params(causal, MaskBand()), qo_indptr.data(), kv_len.data(), num_requests, DataPtr<void>(words),
                           words.numel() * 4, memory_.partial_rows);
    planned_requests_ = num_requests;
    planned_causal_ = causal;
  }
  next->lists_changed = planned_ != (next->selects ? Planned::kLists : Planned::kNothing);
}

void PagedKVCacheObj::UpdateBoundsOf(int64_t id) const {
  std::vector<PageFill> filled;
  const std::vector<int32_t>& pages = manager_.Pages(id);
  const int32_t length = manager_.Length(id), page_size = manager_.limits().page_size;
  for (size_t i = 0; i < pages.size(); ++i) {
    if (pages[i] == kv::kNoPage) continue;
    filled.push_back({pages[i], std::min(page_size, length - static_cast<int32_t>(i) * page_size)});
  }
  if (!filled.empty()) executor_->UpdateBounds(memory_, filled);
}

void PagedKVCacheObj::UpdateBoundsAt(const int64_t* ids, const int64_t* positions, int64_t count) const {
  std::vector<PageFill> filled;
  const int32_t page_size = manager_.limits().page_size;
  for (int64_t i = 0; i < count; ++i) {
    const auto entry = static_cast<int32_t>(positions[i] / page_size);
    filled.push_back({manager_.Pages(ids[i])[entry], std::min(page_size, manager_.Length(ids[i]) - entry * page_size)});
  }
  // Each page once: who writes one owns it alone, so that all say as many tokens.
  std::sort(filled.begin(), filled.end(), [](const PageFill& a, const PageFill& b) { return a.page < b.page; });
  filled.erase(std::unique(filled.begin(), filled.end(), [](const PageFill& a, const PageFill& b) { return a.page == b.page; }),
               filled.end());
  executor_->UpdateBounds(memory_, filled);
}

void KVCacheSetPageBudget(PagedKVCache kv, int64_t num_pages, int64_t num_sink, int64_t num_recent, int64_t is_sum, int64_t max_pages,
                          tvm::ffi::Shape dense_layers) {
  Guarded([&] {
    if (num_pages == 0) return kv->SetPageBudget({}, false, 0, {});
    if (num_pages < 0) {
      TVM_INFER_THROW(ArgumentError) << "argument `num_pages` is " << num_pages << "; a list has at least 1 page (0: no lists)";
    }
    if (is_sum != 0 && is_sum != 1) {
      TVM_INFER_THROW(ArgumentError) << "argument `is_sum` is " << is_sum
                                     << "; it must be 0 (the greatest of a KV head's query heads) or 1";
    }
    kv->SetPageBudget(CheckBudget(kv->config().page_size, num_pages, num_sink, num_recent), is_sum != 0, max_pages, dense_layers);
  });
}

tvm::ffi::Shape KVCachePageBudget(PagedKVCache kv) {
  const KVSelection& selection = kv->selection();
  std::vector<int64_t> values;
  if (selection.is_on()) {
    values = {selection.budget.num_pages, selection.budget.num_sink, selection.budget.num_recent, selection.is_sum, selection.max_pages};
    for (int64_t layer = 0; layer < kv->config().num_layers; ++layer) {
      if (!selection.Has(layer)) values.push_back(layer);
    }
  }
  return tvm::ffi::Shape(values.begin(), values.end());
}

tvm::ffi::Tensor KVCachePageBounds(PagedKVCache kv, int64_t layer) {
  return Guarded([&] {
    kv->Pages(layer);
    if (!kv->selection().Has(layer)) {
      TVM_INFER_THROW(ArgumentError) << "argument `layer` is " << layer
                                     << ", of whose pages the cache keeps no bounds: it has no page budget, or the layer stays dense";
    }
    return kv->selection().bounds[layer];
  });
}

bool KVCacheSelectsPages(PagedKVCache kv) { return kv->selects(); }

}  // namespace tvm_infer::ffi_api
