// Rotary embedding on the way into the cache: a layer takes the projection's output as it is.
#include <algorithm>

#include "tvm_infer/ffi/kv_cache_object.h"
#include "tvm_infer/ffi/rope_checks.h"

namespace tvm_infer::ffi_api {
namespace {

constexpr DLDataType kFloat32 = {kDLFloat, 32, 1};

// Heads [begin, begin + count) of a tensor [num_rows, heads, head_dim], in place.
class Heads {
 public:
  Heads(const TensorView& tensor, int64_t begin, int64_t count)
      : shape_{tensor.size(0), count, tensor.size(2)}, strides_{Stride(tensor, 0), Stride(tensor, 1), Stride(tensor, 2)} {
    dl_.data = DataPtr<char>(tensor) + begin * strides_[1] * (tensor.dtype().bits / 8);
    dl_.device = tensor.device();
    dl_.ndim = 3;
    dl_.dtype = tensor.dtype();
    dl_.shape = shape_;
    dl_.strides = strides_;
    dl_.byte_offset = 0;
  }
  Heads(const Heads&) = delete;
  Heads& operator=(const Heads&) = delete;
  TensorView view() const { return TensorView(&dl_); }

 private:
  int64_t shape_[3], strides_[3];
  DLTensor dl_{};
};

// [num_rows, …] of a dense [more, heads, head_dim].
tvm::ffi::Tensor FirstRows(const tvm::ffi::Tensor& tensor, int64_t num_rows) {
  const int64_t heads = tensor.size(1), head_dim = tensor.size(2);
  const int64_t shape[] = {num_rows, heads, head_dim}, strides[] = {heads * head_dim, head_dim, 1};
  return tensor.as_strided(tvm::ffi::ShapeView(shape, 3), tvm::ffi::ShapeView(strides, 3), 0);
}

}  // namespace

void PagedKVCacheObj::SetRope(const TensorView& inv_freq, bool is_interleaved, double magnitude) {
  if (manager_.in_forward()) {
    TVM_INFER_THROW(CacheStateError) << "kv_cache_set_rope in a step, whose layers must rotate alike; end_forward() comes first";
  }
  const float* from = DataPtr<const float>(inv_freq);
  std::vector<float> values(from, from + inv_freq.size(0));
  const bool is_same =
      rope_.is_set() && values == inv_freq_ && is_interleaved == rope_.is_interleaved && static_cast<float>(magnitude) == rope_.magnitude;
  if (is_same) return;
  if (const size_t count = manager_.Ids().size(); count > 0) {
    TVM_INFER_THROW(CacheStateError) << "kv_cache_set_rope on a cache that holds " << count
                                     << " sequences: keys that are rotated otherwise, or not at all, do not go with its queries. Set it "
                                        "before the first sequence, or clear() the cache";
  }
  executor_->CheckRope(2 * inv_freq.size(0));
  KVRope next = rope_;
  if (!next.is_set()) {
    next.inv_freq = executor_->Allocate({std::max<int64_t>(1, config_.head_dim / 2)}, kFloat32, "frequencies");
    next.rotated_q = executor_->Allocate({config_.max_tokens, config_.num_qo_heads, config_.head_dim}, config_.dtype, "rotated queries");
  }
  next.rotary_dim = 2 * inv_freq.size(0);
  next.is_interleaved = is_interleaved;
  next.magnitude = static_cast<float>(magnitude);
  executor_->Upload(values.data(), static_cast<int64_t>(values.size() * sizeof(float)), next.inv_freq);
  rope_ = next;
  inv_freq_ = std::move(values);
  if (manager_.reuses_prefixes()) manager_.ForgetTokens();
}

void PagedKVCacheObj::FusedAttention(int64_t layer, const TensorView& qkv, double sm_scale, bool causal, const TensorView& o) {
  CheckCall(layer, sm_scale, causal);
  if (!rope_.is_set()) {
    TVM_INFER_THROW(CacheStateError) << "the cache does not know how to rotate queries and keys; call kv_cache_set_rope (set_rope) before "
                                        "its first sequence, with no frequencies where nothing is to be rotated";
  }
  CheckEqualWidths("attention_fused_qkv", "Pass q, k and v apart");
  const int64_t num_qo_heads = config_.num_qo_heads, num_kv_heads = config_.num_kv_heads;
  CheckTokens(qkv, "qkv", num_qo_heads + 2 * num_kv_heads, "num_qo_heads + 2 * num_kv_heads of the cache");
  CheckTokens(o, "out", num_qo_heads, "num_qo_heads of the cache");
  if (step_.num_rows == 0) return;
  const Heads q(qkv, 0, num_qo_heads), k(qkv, num_qo_heads, num_kv_heads), v(qkv, num_qo_heads + num_kv_heads, num_kv_heads);
  const TensorView views[] = {q.view(), k.view(), v.view()};
  LayerCall call = CallOf(layer, views[0], views[1], views[2], o, sm_scale);
  const tvm::ffi::Tensor rotated = FirstRows(rope_.rotated_q, step_.num_rows);
  const TensorView rotated_q(rotated);
  const LayerRope rope{DataPtr<const float>(TensorView(rope_.inv_freq)),
                       rotated_q,
                       static_cast<int32_t>(rope_.rotary_dim),
                       rope_.is_interleaved,
                       rope_.magnitude,
                       "qkv"};
  call.rope = &rope;
  executor_->Attention(memory_, step_, call);
}

void PagedKVCacheObj::RopeAttention(int64_t layer, const TensorView& q, const TensorView& k, const TensorView& v, const RopeArguments& rope,
                                    double sm_scale, bool causal, const TensorView& rotated_q, const TensorView& o) {
  CheckCall(layer, sm_scale, causal);
  CheckTokens(q, "q", config_.num_qo_heads, "num_qo_heads of the cache");
  CheckTokens(k, "k", config_.num_kv_heads, "num_kv_heads of the cache");
  CheckTokens(v, "v", config_.num_kv_heads, "num_kv_heads of the cache", /*is_vo=*/true);
  CheckTokens(rotated_q, "rotated_q", config_.num_qo_heads, "num_qo_heads of the cache");
  CheckTokens(o, "out", config_.num_qo_heads, "num_qo_heads of the cache", /*is_vo=*/true);
  CheckRotation(rope.inv_freq, rope.interleaved, rope.magnitude, config_.head_dim, "the cache", executor_->place());
  const int64_t rotary_dim = 2 * rope.inv_freq.size(0);
  executor_->CheckRope(rotary_dim);
  if (step_.num_rows == 0) return;
  const LayerRope own{DataPtr<const float>(rope.inv_freq), rotated_q, static_cast<int32_t>(rotary_dim), rope.interleaved == 1,
                      static_cast<float>(rope.magnitude),  "q"};
  LayerCall call = CallOf(layer, q, k, v, o, sm_scale);
  call.rope = &own;
  executor_->Attention(memory_, step_, call);
}

}  // namespace tvm_infer::ffi_api
