// Attention variants of a cache's layers, and a plan a step for each band that they have.
#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "tvm_infer/ffi/kv_cache_object.h"

namespace tvm_infer::ffi_api {
namespace {

constexpr int32_t kNamed = -1;  // Layer::plan of a layer that is given its band

kv::KeyWindow SeenIn(const MaskBand& band) { return {band.left, band.num_sink, band.chunk}; }

std::string BandText(const MaskBand& b) {
  return "window_left " + std::to_string(b.left) + ", window_right " + std::to_string(b.right) + ", num_sink " +
         std::to_string(b.num_sink) + ", chunk " + std::to_string(b.chunk);
}

}  // namespace

tvm::ffi::Tensor PagedKVCacheObj::Keep(const void* host, const tvm::ffi::Shape& shape, DLDataType dtype, const char* what) const {
  const int64_t numel = shape.Product();
  const tvm::ffi::Tensor flat = executor_->Allocate({numel}, dtype, what);
  executor_->Upload(host, numel * dtype.bits / 8, flat);
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t axis = shape.size(); axis-- > 1;) strides[axis - 1] = strides[axis] * shape[axis];
  return flat.as_strided(shape, tvm::ffi::ShapeView(strides.data(), strides.size()), 0);
}

void PagedKVCacheObj::SetVariant(const tvm::ffi::Shape& layers, const tvm::ffi::Optional<VariantCall>& call, int64_t causal,
                                 MaskBand band) {
  if (manager_.in_forward()) {
    TVM_INFER_THROW(CacheStateError) << "kv_cache_set_variant in a step, which is planned already; end_forward() comes first";
  }
  if (owner_ != 0 && has_stepped_) {
    TVM_INFER_THROW(CacheStateError) << "kv_cache_set_variant on a cache that ran steps for executable " << owner_
                                     << ", whose graphs know its kernels and addresses. Set variants before the first step, on a new cache";
  }
  if (causal < -1 || causal > 1) TVM_INFER_THROW(ArgumentError) << "argument `causal` is " << causal << "; it must be -1, 0 or 1";
  if (causal != 0) band.right = kUnbounded;  // a causal step says it
  if (!call.has_value() && (band.num_sink > 0 || band.chunk > 0)) {
    TVM_INFER_THROW(ArgumentError) << "argument `band` has " << band.num_sink << " sinks and chunks of " << band.chunk
                                   << " without a variant; kernels test them by a variant's mask: pass the variant that has it";
  }
  ComputeCapacity(Params(causal == 1, band), PlanLimits{});  // throws for what is no band
  if (call.has_value()) {
    executor_->CheckVariant();
    call.value()->At(executor_->place());
  }
  CheckStaysPlain(layers, call.has_value() || !(band == MaskBand()));
  std::vector<Layer> next = layers_;
  // Layers that were not named keep theirs.
  std::vector<MaskBand> bands;
  for (const int64_t layer : layers) {
    Pages(layer);
    next[layer] = {call, static_cast<int32_t>(causal), kNamed};
  }
  for (Layer& layer : next) {
    const MaskBand& own = layer.plan == kNamed ? band : bands_[layer.plan];
    auto found = std::find(bands.begin(), bands.end(), own);
    if (found == bands.end()) found = bands.insert(bands.end(), own);
    layer.plan = static_cast<int32_t>(found - bands.begin());
  }
  if (bands.size() > kMaxPlans) {
    TVM_INFER_THROW(ArgumentError) << "argument `band`, " << BandText(band) << ": layers of the cache would have " << bands.size()
                                   << " different bands; a step has at most " << kMaxPlans
                                   << " plans, one for each. Give layers the same window, sinks and chunks where they may";
  }
  kv::KeyWindow seen = SeenIn(bands.front());  // by all layers together
  for (const MaskBand& own : bands) seen = kv::Union(seen, SeenIn(own));
  manager_.CheckWindow(seen);
  if (bands != bands_) {
    KVMemory memory;  // what cannot be allocated changes nothing
    memory.selection = memory_.selection;
    AllocateStep(&memory, bands);
    TakeStep(std::move(memory));
  }
  manager_.SetWindow(seen);
  bands_ = std::move(bands);
  layers_ = std::move(next);
  if (manager_.reuses_prefixes()) manager_.ForgetTokens();  // keys and values of layers behind come out otherwise from now on
}

LayerCall PagedKVCacheObj::CallOf(int64_t layer, const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& o,
                                  double sm_scale) const {
  const Layer& own = layers_[layer];
  return {layer, q, k, v, o, sm_scale, own.plan, own.variant.has_value() ? own.variant.value()->At(executor_->place()) : nullptr};
}

}  // namespace tvm_infer::ffi_api
