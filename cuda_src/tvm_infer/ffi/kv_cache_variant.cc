// Attention variants of a cache's layers, and a plan a step for each window that they have.
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "tvm_infer/ffi/kv_cache_object.h"

namespace tvm_infer::ffi_api {

void PagedKVCacheObj::SetVariant(const tvm::ffi::Shape& layers, const tvm::ffi::Optional<VariantCall>& call, int64_t causal,
                                 int64_t window_left) {
  if (manager_.in_forward()) {
    TVM_INFER_THROW(CacheStateError) << "kv_cache_set_variant in a step, which is planned already; end_forward() comes first";
  }
  if (owner_ != 0 && has_stepped_) {
    TVM_INFER_THROW(CacheStateError) << "kv_cache_set_variant on a cache that ran steps for executable " << owner_
                                     << ", whose graphs know its kernels and addresses. Set variants before the first step, on a new cache";
  }
  if (window_left < kUnbounded || window_left > INT32_MAX) {
    TVM_INFER_THROW(ArgumentError) << "argument `window_left` is " << window_left << "; it must be -1 (all keys) to " << INT32_MAX;
  }
  if (causal < -1 || causal > 1) TVM_INFER_THROW(ArgumentError) << "argument `causal` is " << causal << "; it must be -1, 0 or 1";
  if (call.has_value()) call.value()->At(executor_->place());
  std::vector<Layer> next = layers_;
  for (const int64_t layer : layers) {
    Pages(layer);
    next[layer] = {call, static_cast<int32_t>(causal), static_cast<int32_t>(window_left)};  // the window itself, for now
  }
  // Layers that were not named keep theirs.
  std::vector<int32_t> windows;
  for (size_t i = 0; i < next.size(); ++i) {
    const bool is_named = std::find(layers.begin(), layers.end(), static_cast<int64_t>(i)) != layers.end();
    const int32_t window = is_named ? next[i].plan : windows_[next[i].plan];
    auto found = std::find(windows.begin(), windows.end(), window);
    if (found == windows.end()) found = windows.insert(windows.end(), window);
    next[i].plan = static_cast<int32_t>(found - windows.begin());
  }
  if (windows.size() > kMaxPlans) {
    TVM_INFER_THROW(ArgumentError) << "argument `window_left` is " << window_left << ": layers of the cache would have " << windows.size()
                                   << " different windows; a step has at most " << kMaxPlans
                                   << " plans, one for each. Give layers the same "
                                   << "window where they may";
  }
  kv::KeyWindow seen{windows.front()};  // by all layers together
  for (const int32_t left : windows) seen = kv::Union(seen, {left});
  manager_.CheckWindow(seen);
  if (windows != windows_) {
    KVMemory memory;  // what cannot be allocated changes nothing
    AllocateStep(&memory, windows);
    memory_.layout = std::move(memory.layout);
    memory_.host_step = memory.host_step;
    memory_.step = memory.step;
    memory_.step_words = memory.step_words;
    memory_.workspace = memory.workspace;
    memory_.partial_rows = memory.partial_rows;
    step_ = KVStep();
  }
  manager_.SetWindow(seen);
  windows_ = std::move(windows);
  layers_ = std::move(next);
}

LayerCall PagedKVCacheObj::CallOf(int64_t layer, const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& o,
                                  double sm_scale) const {
  const Layer& own = layers_[layer];
  return {layer, q, k, v, o, sm_scale, own.plan, own.variant.has_value() ? own.variant.value()->At(executor_->place()) : nullptr};
}

}  // namespace tvm_infer::ffi_api
