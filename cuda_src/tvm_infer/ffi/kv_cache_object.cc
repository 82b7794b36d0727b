#include "tvm_infer/ffi/kv_cache_object.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "tvm_infer/ffi/kv_dtype.h"

namespace tvm_infer::ffi_api {
namespace {

constexpr DLDataType kInt32 = {kDLInt, 32, 1};
constexpr DLDataType kInt64 = {kDLInt, 64, 1};
constexpr DLDataType kFloat32 = {kDLFloat, 32, 1};
constexpr int64_t kMaxHeadDim = 256;
// Room for keys that sequences share: two levels of prefixes around a token of each sequence. Steps that need more (deep trees of many
// sequences, long appends) are planned as if nothing were shared.
constexpr int32_t kSharedLevels = 2;
constexpr int64_t kMaxPageEntries = int64_t{1} << 22;  // of a step's page tables: 16 MiB, 67 million keys in pages of 16

const KVCacheConfig& Checked(const KVCacheConfig& c) {
  const struct {
    const char* name;
    int64_t value;
    int64_t least;
  } counts[] = {{"num_layers", c.num_layers, 1},  {"num_qo_heads", c.num_qo_heads, 1}, {"num_kv_heads", c.num_kv_heads, 1},
                {"head_dim", c.head_dim, 8},      {"page_size", c.page_size, 1},       {"num_pages", c.num_pages, 1},
                {"max_batch", c.max_batch, 1},    {"max_tokens", c.max_tokens, 1},     {"num_ctas", c.num_ctas, 0},
                {"num_threads", c.num_threads, 0}};
  for (const auto& count : counts) {
    if (count.value < count.least || count.value > std::numeric_limits<int32_t>::max()) {
      TVM_INFER_THROW(ArgumentError) << "argument `" << count.name << "` is " << count.value << "; it must be from " << count.least
                                     << " to 2^31 - 1";
    }
  }
  if (c.num_qo_heads % c.num_kv_heads != 0) {
    TVM_INFER_THROW(ArgumentError) << "argument `num_qo_heads` is " << c.num_qo_heads
                                   << "; it must be a multiple of num_kv_heads = " << c.num_kv_heads;
  }
  if (c.head_dim > kMaxHeadDim || c.head_dim % 8 != 0) {
    TVM_INFER_THROW(ArgumentError) << "argument `head_dim` is " << c.head_dim << "; it must be a multiple of 8, from 8 to " << kMaxHeadDim
                                   << ". Pad the heads with zeros (and keep sm_scale that of the unpadded width)";
  }
  if (c.head_dim_vo < 8 || c.head_dim_vo > c.head_dim || c.head_dim_vo % 8 != 0) {
    TVM_INFER_THROW(ArgumentError) << "argument `head_dim_vo` is " << c.head_dim_vo
                                   << "; it must be a multiple of 8, from 8 to head_dim = " << c.head_dim
                                   << " (on CUDA head_dim, or 128 beside a head_dim of 192). Pad the heads with zeros";
  }
  const bool is_float = c.dtype.lanes == 1 && ((c.dtype.code == kDLFloat && (c.dtype.bits == 32 || c.dtype.bits == 16)) ||
                                               (c.dtype.code == kDLBfloat && c.dtype.bits == 16));
  if (!is_float) {
    TVM_INFER_THROW(DTypeError) << "argument `dtype` is " << DTypeString(c.dtype)
                                << "; it must be float32, float16 or bfloat16. 8-bit floats are for keys "
                                   "and values alone: kv_cache_create_scaled has a kv_dtype";
  }
  CheckDTypePair(FindKVDType(c.dtype)->type, "dtype", CheckKVDTypeOf(c.kv_dtype, "kv_dtype"), "kv_dtype");
  // In floating point, where it cannot overflow: all sizes below are then sure to fit in 64 bits.
  const double bytes = 1.0 * c.num_layers * c.num_pages * c.num_kv_heads * c.page_size * (c.head_dim + c.head_dim_vo) * c.kv_dtype.bits / 8;
  if (bytes > static_cast<double>(int64_t{1} << 62)) {
    TVM_INFER_THROW(ArgumentError) << "argument `num_pages` is " << c.num_pages << ": the cache would have " << bytes
                                   << " bytes, which no address reaches; take fewer pages";
  }
  return c;
}

kv::CacheLimits Limits(const KVCacheConfig& c) {
  return {static_cast<int32_t>(c.page_size), static_cast<int32_t>(c.num_pages), static_cast<int32_t>(c.max_batch),
          static_cast<int32_t>(c.max_tokens)};
}

// A tensor that keeps the memory of another, as int32 words.
struct AliasAllocator {
  tvm::ffi::Tensor owner;
  void AllocData(DLTensor* tensor) { tensor->data = DataPtr<void>(TensorView(owner)); }
  void FreeData(DLTensor*) {}
};

tvm::ffi::Tensor AsWords(const tvm::ffi::Tensor& tensor, int64_t num_words) {
  const int64_t shape[] = {num_words};
  return tvm::ffi::Tensor::FromNDAlloc(AliasAllocator{tensor}, tvm::ffi::ShapeView(shape, 1), kInt32, tensor.device());
}

}  // namespace

int32_t PagedKVCacheObj::_GetOrAllocRuntimeTypeIndex() {
  static const int32_t index = [] {
    TVMFFIByteArray key{_type_key, std::char_traits<char>::length(_type_key)};
    return TVMFFITypeGetOrAllocIndex(&key, -1, _type_depth, _type_child_slots, 0, tvm::ffi::Object::_GetOrAllocRuntimeTypeIndex());
  }();
  return index;
}

PagedKVCacheObj::PagedKVCacheObj(const KVCacheConfig& config)
    : config_(Checked(config)),
      executor_(MakeKVExecutor(config_)),
      layers_(static_cast<size_t>(config.num_layers)),
      memory_(AllocateMemory()),
      manager_(Limits(config)) {}

KVMemory PagedKVCacheObj::AllocateMemory() {
  executor_->Complete(&config_);
  costs_ = executor_->TileTable();
  KVMemory memory;
  const KVCacheConfig& c = config_;
  AllocatePages(&memory);
  if (IsScaled(FindKVDType(c.kv_dtype)->type)) {
    memory.k_scales = executor_->Allocate({c.num_layers, c.num_kv_heads}, kFloat32, "scales");
    memory.v_scales = executor_->Allocate({c.num_layers, c.num_kv_heads}, kFloat32, "scales");
    const std::vector<float> ones(static_cast<size_t>(c.num_layers * c.num_kv_heads), 1.f);
    for (const tvm::ffi::Tensor& scales : {memory.k_scales, memory.v_scales}) {
      executor_->Upload(ones.data(), static_cast<int64_t>(ones.size() * sizeof(float)), scales);
    }
  }
  AllocateStep(&memory, bands_);
  return memory;
}

// What depends on the plans of a step.
void PagedKVCacheObj::AllocateStep(KVMemory* memory, const std::vector<MaskBand>& bands) const {
  const KVCacheConfig& c = config_;
  // A plan grows with the number of keys only where KV is cut at a fixed size.
  const auto max_batch = static_cast<int32_t>(c.max_batch), max_tokens = static_cast<int32_t>(c.max_tokens);
  const PlanLimits limits{max_batch, max_tokens, 0, kSharedLevels, std::min(max_batch, max_tokens)};
  int64_t plan_bytes = 0, partial_rows = 0;
  for (const MaskBand& band : bands) {
    for (const bool causal : {true, false}) {
      const PlanCapacity capacity = ComputeCapacity(Params(causal, band), limits);
      plan_bytes = std::max(plan_bytes, capacity.plan_bytes);
      partial_rows = std::max(partial_rows, capacity.partial_rows);
    }
  }
  KVSelection& selection = memory->selection;
  int32_t num_lists = 0;
  if (selection.is_on()) {
    num_lists = static_cast<int32_t>(c.max_batch * c.num_kv_heads);
    PlanLimits lists{max_batch, max_batch, 0};
    lists.has_head_lists = true;
    int64_t list_plan_bytes = plan_bytes;  // attention finds the plan of a step that does not select in the same place
    for (const bool causal : {true, false}) {
      const PlanCapacity capacity = ComputeCapacity(Params(causal, MaskBand()), lists);
      list_plan_bytes = std::max(list_plan_bytes, capacity.plan_bytes);
      partial_rows = std::max(partial_rows, capacity.partial_rows);
    }
    const bool is_cuda = executor_->place().is_cuda();
    selection.host_planned = AllocateHost({list_plan_bytes / 4}, kInt32);
    selection.planned = is_cuda ? executor_->Allocate({list_plan_bytes / 4}, kInt32, "a plan for lists of pages") : selection.host_planned;
    selection.plan = executor_->Allocate({list_plan_bytes / 4}, kInt32, "a plan for lists of pages");
    selection.scores = executor_->Allocate({c.max_batch, c.num_kv_heads, selection.max_pages}, kFloat32, "scores of pages");
  }
  // Sequences that give back pages are longer than the pool.
  const bool is_bounded = std::all_of(bands.begin(), bands.end(), [](const MaskBand& band) { return band.has_begin(); });
  const int64_t entries = is_bounded ? kMaxPageEntries : std::min(c.max_batch * c.num_pages, kMaxPageEntries);
  memory->layout = std::make_unique<const kv::StepLayout>(kv::StepLimits{
      max_batch, max_tokens, plan_bytes, entries, static_cast<int32_t>(bands.size()), num_lists, selection.budget.num_pages});
  memory->host_step = AllocateHost({memory->layout->bytes() / 8}, kInt64);
  memory->step =
      executor_->place().is_cuda() ? executor_->Allocate({memory->layout->bytes() / 8}, kInt64, "a step's tables") : memory->host_step;
  memory->step_words = AsWords(memory->step, memory->layout->bytes() / 4);
  memory->workspace = executor_->Allocate({partial_rows * (c.head_dim_vo + 1)}, kFloat32, "partial results");
  memory->partial_rows = partial_rows;
}

PlanParams PagedKVCacheObj::Params(bool causal, const MaskBand& band) const {
  PlanParams params;
  params.num_ctas = static_cast<int32_t>(config_.num_ctas);
  params.num_qo_heads = static_cast<int32_t>(config_.num_qo_heads);
  params.num_kv_heads = static_cast<int32_t>(config_.num_kv_heads);
  params.band = band;
  if (causal) params.band.right = 0;
  params.fixed_split_size = kSplitAuto;
  params.SetCosts(costs_);
  return params;
}

// Whether pages that sequences share may be read once for all in this plan: every layer that uses it makes the same of them for each. Where
// layers select there must be others that use it.
bool PagedKVCacheObj::MayShare(int32_t plan, bool selects) const {
  if (!finds_shared_ || !bands_[plan].IsSharable()) return false;
  bool is_used = false;
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (layers_[i].plan != plan) continue;
    if (layers_[i].variant.has_value() && !layers_[i].variant.value()->takes_shared_keys()) return false;
    is_used |= !selects || !memory_.selection.Has(static_cast<int64_t>(i));
  }
  return is_used;
}

void PagedKVCacheObj::SetSharedPrefix(bool is_on) {
  if (manager_.in_forward()) {
    TVM_INFER_THROW(CacheStateError) << "kv_cache_set_shared_prefix in a step, which is planned already; end_forward() comes first";
  }
  finds_shared_ = is_on;
}

int64_t PagedKVCacheObj::NumRows(const kv::Step& step, const kv::StepInputs& inputs) const {
  const int64_t num_rows = inputs.num_rows < 0 ? step.num_tokens() : inputs.num_rows;
  if (num_rows < step.num_tokens() || num_rows > config_.max_tokens) {
    TVM_INFER_THROW(ArgumentError) << "argument `num_rows` is " << num_rows << "; a step of " << step.num_tokens()
                                   << " tokens has from that to max_tokens = " << config_.max_tokens << " rows";
  }
  return num_rows;
}

void PagedKVCacheObj::BeginForward(const int64_t* ids, const int64_t* append_lengths, int64_t num_requests, bool causal,
                                   const kv::StepInputs& inputs) {
  const kv::Step& step = manager_.BeginForward(ids, append_lengths, num_requests);
  try {
    if (inputs.token_ids != nullptr && causal) manager_.NoteTokens(inputs.token_ids);
    kv::StepInputs padded = inputs;
    KVStep next;
    next.step = &step;
    next.num_rows = padded.num_rows = NumRows(step, inputs);
    char* block = DataPtr<char>(TensorView(memory_.host_step));
    const kv::StepLayout& layout = *memory_.layout;
    step_.plan_bytes[0] = 0;  // the last step's plan is written over now, also where this step fails
    if (memory_.selection.is_on()) PlanLists(step, causal, &next);
    const SharedRuns* found = nullptr;
    for (int32_t i = 0; i < layout.limits().num_plans; ++i) {
      const PlanParams params = Params(causal, bands_[i]);
      const bool may_share = MayShare(i, next.selects);
      if (may_share && found == nullptr) found = &shared_pages_.Find(step, manager_.pool(), manager_.limits().page_size);
      next.capture_keys[i] = CaptureKey(params);
      next.plan_bytes[i] = planner_.Plan(params, step.qo_indptr.data(), step.kv_len.data(), step.num_requests(), block + layout.plan(i),
                                         layout.limits().plan_bytes, memory_.partial_rows, may_share ? *found : SharedRuns{});
    }
    const kv::StepRange range = kv::FillStep(layout, step, padded, next.last_plan_bytes(layout), block);
    if (memory_.selection.is_on()) kv::FillLists(layout, step, next.selects, block);
    planned_ = Planned::kUnknown;  // where this fails
    executor_->BeginStep(memory_, next, range);
    planned_ = next.selects ? Planned::kLists : Planned::kNothing;
    step_ = next;
  } catch (...) {
    manager_.CancelForward();
    throw;
  }
  causal_ = causal;
  has_stepped_ = true;
}

void PagedKVCacheObj::MoveTokens(const int64_t* ids, const int64_t* src, const int64_t* dst, int64_t num_moves) {
  const std::vector<kv::TokenMove> moves = manager_.Moves(ids, src, dst, num_moves);
  manager_.NoteMoves(ids, dst, moves);
  if (moves.empty()) return;
  executor_->MoveTokens(memory_, moves);
  if (memory_.selection.is_on()) UpdateBoundsAt(ids, dst, num_moves);
}

// q, k, v or o of a step: [num_rows, heads, head_dim] (v and o: head_dim_vo) of the cache's dtype, heads and widths, on its device.
void PagedKVCacheObj::CheckTokens(const TensorView& tensor, const char* name, int64_t heads, const char* heads_name, bool is_vo) const {
  if (executor_->place().is_cuda()) {
    CheckPlace(tensor, name, executor_->place());
  } else {
    CheckCpu(tensor, name);
  }
  CheckDType(tensor, name, config_.dtype, "the cache's");
  CheckRank(tensor, name, 3, "[num_tokens, heads, head_dim]");
  CheckDim(tensor, name, 1, heads, heads_name);
  CheckDim(tensor, name, 2, is_vo ? config_.head_dim_vo : config_.head_dim, is_vo ? "head_dim_vo of the cache" : "head_dim of the cache");
  CheckLastDimContiguous(tensor, name);
  if (tensor.size(0) == step_.num_rows) return;
  TVM_INFER_THROW(PlanMismatchError) << "argument `" << name << "` has shape " << ShapeString(tensor) << " but begin_forward announced "
                                     << step_.step->num_tokens() << " tokens"
                                     << (step_.num_rows == step_.step->num_tokens()
                                             ? std::string()
                                             : " in " + std::to_string(step_.num_rows) + " rows, padding included")
                                     << "; pass the step's tokens, all of them, in the order of its ids";
}

void PagedKVCacheObj::CheckCall(int64_t layer, double sm_scale, bool causal) const {
  manager_.step();  // throws outside of a step
  Pages(layer);
  if (!std::isfinite(sm_scale)) TVM_INFER_THROW(ArgumentError) << "argument `sm_scale` is " << sm_scale << "; it must be finite";
  if (causal != causal_) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `causal` is " << causal
                                       << " but begin_forward planned the step with causal = " << causal_
                                       << "; a plan leaves out keys by its mask: begin the step with the same";
  }
  const Layer& own = layers_[layer];
  if (own.causal >= 0 && (own.causal != 0) != causal_) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `layer` is " << layer << ", whose variant has causal = " << own.causal
                                       << ", but begin_forward planned the step with causal = " << causal_
                                       << "; begin the step with the variant's";
  }
}

void PagedKVCacheObj::Attention(int64_t layer, const TensorView& q, const TensorView& k, const TensorView& v, double sm_scale, bool causal,
                                const TensorView& o) {
  CheckCall(layer, sm_scale, causal);
  CheckTokens(q, "q", config_.num_qo_heads, "num_qo_heads of the cache");
  CheckTokens(k, "k", config_.num_kv_heads, "num_kv_heads of the cache");
  CheckTokens(v, "v", config_.num_kv_heads, "num_kv_heads of the cache", /*is_vo=*/true);
  CheckTokens(o, "out", config_.num_qo_heads, "num_qo_heads of the cache", /*is_vo=*/true);
  if (step_.num_rows == 0) return;
  executor_->Attention(memory_, step_, CallOf(layer, q, k, v, o, sm_scale));
}

void PagedKVCacheObj::SetScales(const TensorView& k_scales, const TensorView& v_scales) {
  if (!memory_.is_scaled()) {
    TVM_INFER_THROW(ArgumentError) << "argument `k_scales` for a cache of " << DTypeString(config_.kv_dtype)
                                   << ", whose elements have no scale; create it with an 8-bit kv_dtype";
  }
  for (const auto& [tensor, name] : {std::pair{&k_scales, "k_scales"}, std::pair{&v_scales, "v_scales"}}) {
    CheckCpu(*tensor, name);
    CheckDType(*tensor, name, kFloat32, "scales are float32");
    CheckRank(*tensor, name, 2, "[num_layers, num_kv_heads]");
    CheckDim(*tensor, name, 0, config_.num_layers, "num_layers of the cache");
    CheckDim(*tensor, name, 1, config_.num_kv_heads, "num_kv_heads of the cache");
    CheckContiguous(*tensor, name);
    CheckScaleValues(DataPtr<const float>(*tensor), tensor->numel(), name);
  }
  if (manager_.in_forward()) {
    TVM_INFER_THROW(CacheStateError) << "kv_cache_set_scales in a step, whose tokens may be stored already; end_forward() comes first";
  }
  if (const size_t count = manager_.Ids().size(); count > 0) {
    TVM_INFER_THROW(CacheStateError) << "kv_cache_set_scales on a cache that holds " << count
                                     << " sequences, which were stored with other scales. Set them before the first sequence, or clear() "
                                        "the cache";
  }
  const int64_t bytes = k_scales.numel() * static_cast<int64_t>(sizeof(float));
  executor_->Upload(DataPtr<void>(k_scales), bytes, memory_.k_scales);
  executor_->Upload(DataPtr<void>(v_scales), bytes, memory_.v_scales);
  if (manager_.reuses_prefixes()) manager_.ForgetTokens();  // what kept pages hold was stored with other scales
}

tvm::ffi::Tensor PagedKVCacheObj::QueryPositions() const {
  const int64_t shape[] = {manager_.step().num_tokens()}, strides[] = {1};
  return memory_.host_step.as_strided(tvm::ffi::ShapeView(shape, 1), tvm::ffi::ShapeView(strides, 1),
                                      memory_.layout->position_ids(step_.num_rows) / 8);
}

tvm::ffi::Tensor PagedKVCacheObj::StepView(int64_t offset, int64_t length, bool is_batch_of_one) const {
  if (length < 0 || length > config_.max_tokens) {
    TVM_INFER_THROW(ArgumentError) << "argument `num_rows` is " << length << "; it must be from 0 to max_tokens = " << config_.max_tokens;
  }
  const int64_t shape[] = {1, length}, strides[] = {length, 1};
  const int skip = is_batch_of_one ? 0 : 1;
  return memory_.step.as_strided(tvm::ffi::ShapeView(shape + skip, 2 - skip), tvm::ffi::ShapeView(strides + skip, 2 - skip), offset / 8);
}

tvm::ffi::Tensor PagedKVCacheObj::InputIds(int64_t num_rows) const { return StepView(memory_.layout->input_ids(num_rows), num_rows, true); }
tvm::ffi::Tensor PagedKVCacheObj::PositionIds(int64_t num_rows) const {
  return StepView(memory_.layout->position_ids(num_rows), num_rows, true);
}
tvm::ffi::Tensor PagedKVCacheObj::LogitRows(int64_t num_rows, int64_t num_logits) const {
  return StepView(memory_.layout->logit_rows(num_rows, num_logits), num_logits, false);
}

tvm::ffi::Tensor PagedKVCacheObj::CurrentPlan(int64_t layer) const {
  Pages(layer);  // throws for what is none
  if (step_.plan_bytes[0] == 0)
    TVM_INFER_THROW(CacheStateError) << "the cache has no plan: no step was begun yet, or the last one failed; call begin_forward() first";
  const int32_t plan = layers_[layer].plan;
  const int64_t shape[] = {step_.plan_bytes[plan] / 4}, strides[] = {1};
  return AsWords(memory_.host_step, memory_.layout->bytes() / 4)
      .as_strided(tvm::ffi::ShapeView(shape, 1), tvm::ffi::ShapeView(strides, 1), memory_.layout->plan(plan) / 4);
}

void PagedKVCacheObj::Bind(int64_t token) {
  if (token == 0) TVM_INFER_THROW(ArgumentError) << "argument `token` is 0; an executable's token is any other number";
  if (owner_ != 0 && owner_ != token) {
    TVM_INFER_THROW(CacheStateError) << "the cache serves executable " << owner_ << " and cannot serve executable " << token
                                     << " too; give each its own cache, or release this one first";
  }
  // Pages that were filled for another, or by hand, are not what this one would fill them with.
  if (token != last_owner_ && manager_.reuses_prefixes()) manager_.ForgetTokens();
  owner_ = last_owner_ = token;
}

void PagedKVCacheObj::Release(int64_t token) {
  if (owner_ != token) {
    TVM_INFER_THROW(CacheStateError) << "executable " << token << " released a cache that "
                                     << (owner_ == 0 ? "serves none" : "serves executable " + std::to_string(owner_));
  }
  owner_ = 0;
}

}  // namespace tvm_infer::ffi_api
