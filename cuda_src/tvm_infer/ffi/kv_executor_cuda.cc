// The KV cache on a CUDA device.
#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "tvm_infer/cuda/attention.h"
#include "tvm_infer/cuda/copy_pages.h"
#include "tvm_infer/cuda/memory.h"
#include "tvm_infer/cuda/move_tokens.h"
#include "tvm_infer/cuda/page_selection.h"
#include "tvm_infer/cuda/rope_append.h"
#include "tvm_infer/cuda/staging.h"
#include "tvm_infer/cuda/tile_table.h"
#include "tvm_infer/ffi/attention_cuda.h"
#include "tvm_infer/ffi/cuda_launch.h"
#include "tvm_infer/ffi/cuda_scope.h"
#include "tvm_infer/ffi/kv_dtype.h"
#include "tvm_infer/ffi/kv_executor.h"
#include "tvm_infer/ffi/page_selection_cuda.h"
#include "tvm_infer/ffi/page_store_cuda.h"

namespace tvm_infer::ffi_api {
namespace {

struct DeviceAllocator {
  const char* what;
  void AllocData(DLTensor* tensor) {
    tensor->data = cuda::AllocateDevice(tensor->device.device_id, static_cast<int64_t>(tvm::ffi::GetDataSize(*tensor)), what);
  }
  void FreeData(DLTensor* tensor) { cuda::FreeDevice(tensor->device.device_id, tensor->data); }
};

cuda::DTypeTag TagOf(DLDataType dtype) { return on_cuda::ToTag(FindKVDType(dtype)->type); }

// Row `row` of a dense float32 matrix.
tvm::ffi::Tensor RowOf(const tvm::ffi::Tensor& matrix, int64_t row) {
  const int64_t shape[] = {matrix.size(1)}, strides[] = {1};
  return matrix.as_strided(tvm::ffi::ShapeView(shape, 1), tvm::ffi::ShapeView(strides, 1), row * matrix.size(1));
}

// A dense view of `length` int32 words at `offset` bytes.
tvm::ffi::Tensor Words(const tvm::ffi::Tensor& words, int64_t offset, int64_t length) {
  const int64_t shape[] = {length}, strides[] = {1};
  return words.as_strided(tvm::ffi::ShapeView(shape, 1), tvm::ffi::ShapeView(strides, 1), offset / 4);
}

// What a layer selects with; none for one that does not.
class OwnSelectionTensors {
 public:
  OwnSelectionTensors(const KVMemory& memory, const KVStep& step, int64_t layer) {
    const KVSelection& from = memory.selection;
    if (!from.Has(layer)) return;
    const kv::StepLayout& layout = *memory.layout;
    const int64_t n = step.num_list_requests, num_kv_heads = from.scores.size(1), max_pages = from.scores.size(2);
    const int64_t shape[] = {n, num_kv_heads, max_pages}, strides[] = {num_kv_heads * max_pages, max_pages, 1};
    tensors_ = {from.bounds[layer],
                Words(memory.step_words, layout.list_kv_len(), n),
                Words(memory.step_words, layout.page_indptr(), n + 1),
                from.scores.as_strided(tvm::ffi::ShapeView(shape, 3), tvm::ffi::ShapeView(strides, 3), 0),
                Words(memory.step_words, layout.lists(), n * num_kv_heads * from.budget.num_pages),
                Words(memory.step_words, layout.list_indptr(), int64_t{layout.limits().num_lists} + 1),
                from.planned,
                from.plan};
    own_.emplace(on_cuda::OwnSelection{View(0), View(1), View(2), View(3), View(4), View(5), View(6), View(7), from.budget, from.is_sum});
  }
  const on_cuda::OwnSelection* get() const { return own_.has_value() ? &*own_ : nullptr; }

 private:
  TensorView View(size_t i) const { return TensorView(tensors_[i]); }

  std::vector<tvm::ffi::Tensor> tensors_;
  std::optional<on_cuda::OwnSelection> own_;
};

class CudaKVExecutor final : public KVExecutor {
 public:
  explicit CudaKVExecutor(const KVCacheConfig& config) : config_(config) {
    CheckDevice();
    CheckPageSize();
    Complete(&config_);
    pinned_ = std::make_shared<cuda::PinnedPool>(config_.device.device_id);
  }

  void Complete(KVCacheConfig* config) const override {
    if (config->num_ctas == 0) config->num_ctas = cuda::GetDevice(config->device.device_id).num_sms;
    config->num_threads = 0;
  }
  TileCosts TileTable() const override {
    return cuda::TileTable(TagOf(config_.dtype), TagOf(config_.kv_dtype), static_cast<int32_t>(config_.head_dim),
                           static_cast<int32_t>(config_.head_dim_vo));
  }
  tvm::ffi::Tensor Allocate(std::initializer_list<int64_t> shape, DLDataType dtype, const char* what) const override {
    return tvm::ffi::Tensor::FromNDAlloc(DeviceAllocator{what}, tvm::ffi::ShapeView(shape.begin(), shape.size()), dtype, config_.device);
  }
  Place place() const override { return {config_.device, "kv"}; }
  void BeginStep(const KVMemory& memory, const KVStep& step, const kv::StepRange& range) override;
  void MoveTokens(const KVMemory& memory, const std::vector<kv::TokenMove>& moves) const override;
  std::unique_ptr<PageStore> NewStore(int64_t bytes) const override { return NewCudaPageStore(pinned_, bytes); }
  void CopyPagesOut(const KVMemory& memory, const std::vector<int32_t>& pages, PageStore* store) const override {
    CudaPagesOut(Layout(memory), pages, store, config_.device);
  }
  void CopyPagesIn(const KVMemory& memory, const std::vector<int32_t>& pages, PageStore* store) const override {
    CudaPagesIn(Layout(memory), pages, store, config_.device);
  }
  void CheckRope(int64_t rotary_dim) const override {
    cuda::CheckRopeShape(static_cast<int32_t>(config_.head_dim), static_cast<int32_t>(config_.head_dim_vo),
                         static_cast<int32_t>(rotary_dim), "kv");
  }
  void CheckVariant() const override {
    cuda::CheckTakesVariant(static_cast<int32_t>(config_.head_dim), static_cast<int32_t>(config_.head_dim_vo), "kv");
  }
  void Upload(const void* host, int64_t bytes, const tvm::ffi::Tensor& to) const override;
  void Attention(const KVMemory& memory, const KVStep& step, const LayerCall& call) override;
  void PrepareSelection() const override;
  void UpdateBounds(const KVMemory& memory, const std::vector<PageFill>& pages) const override;

 private:
  void BringLists(const KVMemory& memory, const KVStep& step, const CudaScope& scope) const;
  void CheckDevice() const;
  void CheckPageSize() const;
  PageMemory Layout(const KVMemory& memory) const {
    return {DataPtr<char>(TensorView(memory.all_pages)), config_.num_layers, config_.num_pages, memory.page_bytes};
  }

  OptionalTensor ValuesOf(const KVMemory& memory, int64_t layer) const {
    return config_.has_equal_widths() ? OptionalTensor() : OptionalTensor(TensorView(memory.v_pages[layer]));
  }

  KVCacheConfig config_;
  std::shared_ptr<cuda::PinnedPool> pinned_;  // of sequences that are swapped out
};

void CudaKVExecutor::CheckDevice() const {
  try {
    cuda::CheckArchitecture(cuda::GetDevice(config_.device.device_id));
  } catch (const Error& error) {
    throw Error(error.kind(), "argument `device` is " + DeviceString(config_.device) + ": " + error.what());
  }
}

void CudaKVExecutor::CheckPageSize() const {
  const cuda::DTypeTag kv_dtype = TagOf(config_.kv_dtype);
  if (cuda::HasPageSize(kv_dtype, static_cast<int32_t>(config_.page_size))) return;
  TVM_INFER_THROW(ExecutorError) << "argument `page_size` is " << config_.page_size << "; the cuda executor has kernels for "
                                 << cuda::PageSizes(kv_dtype) << ". Take one of these, or create the cache with device=\"cpu\"";
}

void CudaKVExecutor::BeginStep(const KVMemory& memory, const KVStep& step, const kv::StepRange& range) {
  const CudaScope scope(config_.device);
  if (cuda::IsCapturing(scope.stream())) {
    TVM_INFER_THROW(DeviceError) << "begin_forward() on a stream that is being captured for a graph: a replay would bring back the plan of "
                                    "the capture. Begin each step before the replay, outside of the graph";
  }
  const char* host = DataPtr<char>(TensorView(memory.host_step));
  char* device = DataPtr<char>(TensorView(memory.step));
  cuda::Upload(scope.device_id(), scope.stream(), host + range.begin, static_cast<size_t>(range.end - range.begin), device + range.begin);
  if (memory.selection.is_on()) BringLists(memory, step, scope);
  if (step.step->copies.empty()) return;
  cuda::CopyPagesParams params{};
  params.pages = DataPtr<void>(TensorView(memory.all_pages));
  const auto num_entries = static_cast<int64_t>(step.step->page_indices.size());
  params.copies = reinterpret_cast<const int32_t*>(device + memory.layout->copies(step.last_plan_bytes(*memory.layout), num_entries));
  params.layer_bytes = memory.page_bytes * config_.num_pages;
  params.page_bytes = memory.page_bytes;
  params.num_copies = static_cast<int32_t>(step.step->copies.size());
  params.num_layers = static_cast<int32_t>(config_.num_layers);
  cuda::LaunchCopyPages(scope.device_id(), scope.stream(), params);
}

// What layers that select run with, and layers of a graph that was captured for steps that do: a plan for lists and its copy, or the plan
// of the step in place of the copy, and word that nothing is selected.
void CudaKVExecutor::BringLists(const KVMemory& memory, const KVStep& step, const CudaScope& scope) const {
  const KVSelection& selection = memory.selection;
  const auto bring = [&](const void* host, int64_t bytes, const tvm::ffi::Tensor& to) {
    cuda::Upload(scope.device_id(), scope.stream(), host, static_cast<size_t>(bytes), DataPtr<void>(TensorView(to)));
  };
  if (!step.selects) {
    const char* const plan = DataPtr<char>(TensorView(memory.host_step)) + memory.layout->plan(step.list_band);
    bring(plan, step.plan_bytes[step.list_band], selection.plan);
    constexpr int32_t kNothing[4] = {kNothingPlanned};
    if (step.lists_changed) bring(kNothing, sizeof(kNothing), selection.planned);
    return;
  }
  if (!step.lists_changed) return;
  const void* const planned = DataPtr<void>(TensorView(selection.host_planned));
  const int64_t bytes = PlanView(planned).header->bytes_used;
  bring(planned, bytes, selection.planned);
  bring(planned, bytes, selection.plan);
}

void CudaKVExecutor::PrepareSelection() const {
  const CudaScope scope(config_.device);
  cuda::LoadPageSelection(scope.device_id(), scope.stream(), TagOf(config_.dtype), TagOf(config_.kv_dtype));
}

void CudaKVExecutor::UpdateBounds(const KVMemory& memory, const std::vector<PageFill>& pages) const {
  const FillTables tables(static_cast<int64_t>(pages.size()));
  Upload(tables.Words(pages).data(), tables.size * 4, memory.selection.tables);
  const auto words = [&](int64_t begin, int64_t length) { return Words(memory.selection.tables, begin * 4, length); };
  const auto count = static_cast<int64_t>(pages.size());
  const tvm::ffi::Tensor qo_indptr = words(tables.qo_indptr, count + 1), kv_len = words(tables.kv_len, count),
                         indptr = words(tables.page_indptr, count + 1), indices = words(tables.page_indices, count);
  const TensorView qo_indptr_view(qo_indptr), kv_len_view(kv_len);
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    if (!memory.selection.Has(layer)) continue;
    on_cuda::UpdateOwnBounds(place(), TensorView(memory.selection.bounds[layer]), {&qo_indptr_view, &kv_len_view},
                             TensorView(memory.pages[layer]), ValuesOf(memory, layer), TensorView(indptr), TensorView(indices));
  }
}

void CudaKVExecutor::MoveTokens(const KVMemory& memory, const std::vector<kv::TokenMove>& moves) const {
  const CudaScope scope(config_.device);
  if (cuda::IsCapturing(scope.stream())) {
    TVM_INFER_THROW(DeviceError)
        << "kv_cache_move_tokens on a stream that is being captured for a graph: a replay would move the tokens of "
           "the capture. Move tokens between steps, outside of the graph";
  }
  cuda::MoveTokensParams params{};
  params.layer_bytes = memory.page_bytes * config_.num_pages;
  params.page_bytes = memory.page_bytes;
  params.num_layers = static_cast<int32_t>(config_.num_layers);
  static_assert(sizeof(cuda::MoveTokensParams::Move) == sizeof(kv::TokenMove));
  for (size_t begin = 0; begin < moves.size(); begin += cuda::kMovesPerLaunch) {
    params.num_moves = static_cast<int32_t>(std::min<size_t>(moves.size() - begin, cuda::kMovesPerLaunch));
    std::memcpy(params.moves, moves.data() + begin, params.num_moves * sizeof(kv::TokenMove));
    const std::array<PagePlanes, 2> planes = PlanesOf(config_);
    const bool is_equal = config_.has_equal_widths();  // then values are as many planes more
    for (size_t i = 0; i < (is_equal ? 1 : planes.size()); ++i) {
      params.pages = DataPtr<char>(TensorView(memory.all_pages)) + planes[i].offset;
      params.row_bytes = static_cast<int32_t>(planes[i].row_bytes);
      params.plane_bytes = planes[i].plane_bytes;
      params.num_planes = static_cast<int32_t>((is_equal ? 2 : 1) * config_.num_kv_heads);
      cuda::LaunchMoveTokens(scope.device_id(), scope.stream(), params);
    }
  }
}

void CudaKVExecutor::Upload(const void* host, int64_t bytes, const tvm::ffi::Tensor& to) const {
  if (bytes == 0) return;
  const CudaScope scope(config_.device);
  if (cuda::IsCapturing(scope.stream())) {
    TVM_INFER_THROW(DeviceError) << "what a cache keeps (frequencies, scales, a variant's tables) cannot be set on a stream that is being "
                                    "captured for a graph: set it once, before the capture";
  }
  cuda::Upload(scope.device_id(), scope.stream(), host, static_cast<size_t>(bytes), DataPtr<void>(TensorView(to)));
}

void CudaKVExecutor::Attention(const KVMemory& memory, const KVStep& step, const LayerCall& call) {
  const kv::StepLayout& layout = *memory.layout;
  const tvm::ffi::Tensor plan = Words(memory.step_words, layout.plan(call.plan), layout.limits().plan_bytes / 4);
  const tvm::ffi::Tensor indptr = Words(memory.step_words, layout.page_indptr(), int64_t{layout.limits().max_batch} + 1);
  KVScales scales;
  tvm::ffi::Tensor k_scales, v_scales;
  if (memory.is_scaled()) {
    k_scales = RowOf(memory.k_scales, call.layer);
    v_scales = RowOf(memory.v_scales, call.layer);
    scales.k_scales = TensorView(k_scales);
    scales.v_scales = TensorView(v_scales);
  }
  const OptionalTensor values = ValuesOf(memory, call.layer);
  const OwnSelectionTensors selected(memory, step, call.layer);
  const auto attend = [&](const TensorView& q, const on_cuda::OwnRotation* rotation) {
    on_cuda::AppendOwnAttention(place(), TensorView(plan), step.capture_keys[call.plan], q, call.k, call.v,
                                TensorView(memory.pages[call.layer]), values, TensorView(indptr), TensorView(memory.step_words),
                                call.sm_scale, TensorView(memory.workspace), call.o, rotation, call.variant, scales, selected.get());
  };
  if (call.rope == nullptr) return attend(call.q, nullptr);
  const LayerRope& rope = *call.rope;
  CheckAlignedRows(rope.rotated_q, "rotated_q");
  const on_cuda::OwnRotation rotation{call.q, rope.q_name, rope.inv_freq, rope.rotary_dim, rope.is_interleaved, rope.magnitude};
  attend(rope.rotated_q, &rotation);
}

}  // namespace

std::unique_ptr<KVExecutor> MakeCudaKVExecutor(const KVCacheConfig& config) { return std::make_unique<CudaKVExecutor>(config); }

}  // namespace tvm_infer::ffi_api
