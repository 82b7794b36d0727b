// What the adapter library exports. It registers nothing when it is loaded: tvm_infer.runtime.mlc_library checks it first.
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include <utility>

#include "tvm_infer/mlc/config.h"
#include "tvm_infer/mlc/flashinfer_tag.h"
#include "tvm_infer/mlc/kv_cache.h"
#include "tvm_infer/mlc/rope.h"

#if !defined(MLC_ADAPTER_TVM_VERSION) || !defined(MLC_ADAPTER_TVM_LAYOUT)
#error "tvm_infer/runtime/mlc_library.py compiles this, and says which TVM's headers it uses"
#endif

namespace tvm_infer::mlc {
namespace {

using tvm::runtime::vm::AttentionKVCache;

// MLC's arguments of mlc.create_paged_kv_cache_generic, with attn_kinds after the widths and a tensor for dtype and device.
AttentionKVCache Create(Shape cache_config, Shape layer_partition, int64_t num_layers, int64_t num_qo_heads, int64_t num_kv_heads,
                        int64_t qk_head_dim, int64_t v_head_dim, Shape attn_kinds, int64_t mla_original_qk_head_dim,
                        int64_t mla_original_v_head_dim, int64_t rope_mode, double rope_scale, double rope_theta, String rope_scaling,
                        tvm::ffi::Any rope_ext_factors, int64_t rotary_dim, bool enable_disaggregation, Tensor init) {
  const Config config = CheckedConfig({std::move(cache_config), std::move(layer_partition), num_layers, num_qo_heads, num_kv_heads,
                                       qk_head_dim, v_head_dim, std::move(attn_kinds), rope_mode, mla_original_qk_head_dim,
                                       mla_original_v_head_dim, enable_disaggregation, std::move(init)});
  const RopeArgs rope{rope_scale, rope_theta, std::move(rope_scaling), std::move(rope_ext_factors), rotary_dim};
  return AttentionKVCache(tvm::ffi::make_object<MLCPagedKVCacheObj>(config, rope));
}

MLCPagedKVCacheObj* Cast(const AttentionKVCache& cache) {
  auto* ours = const_cast<MLCPagedKVCacheObj*>(cache.as<MLCPagedKVCacheObj>());
  if (ours == nullptr) {
    TVM_FFI_THROW(ArgumentError) << "argument `kv_cache` is a " << cache->GetTypeKey() << "; it must be a cache of mlc_kv_cache_create";
  }
  return ours;
}

void Register() {
  using tvm::ffi::Function;
  Function::SetGlobal("tvm_infer.mlc.prefill_plan", Function::FromTyped(PrefillPlan), true);
  Function::SetGlobal("tvm_infer.mlc.decode_plan", Function::FromTyped(DecodePlan), true);
  Function::SetGlobal("tvm_infer.mlc.paged_run", Function::FromTyped(PagedRun), true);
  Function::SetGlobal("tvm_infer.mlc.ragged_run", Function::FromTyped(RaggedRun), true);
  Function::SetGlobal("tvm_infer.mlc.decode_run", Function::FromTyped(DecodeRun), true);
  Function::SetGlobal("tvm_infer.mlc_kv_cache_create", Function::FromTyped(Create), true);
  Function::SetGlobal("tvm_infer.mlc_kv_cache_inner",
                      Function::FromTyped([](AttentionKVCache cache) { return tvm::ffi::Any(Cast(cache)->cache()); }), true);
  // TVM has the operation, but no builtin that reaches it.
  Function::SetGlobal("tvm_infer.mlc_debug_set_kv",
                      Function::FromTyped([](AttentionKVCache cache, int64_t seq_id, int64_t start_pos, Tensor k_data, Tensor v_data) {
                        Cast(cache)->DebugSetKV(seq_id, start_pos, std::move(k_data), std::move(v_data));
                      }),
                      true);
}

}  // namespace
}  // namespace tvm_infer::mlc

TVM_FFI_DLL_EXPORT_TYPED_FUNC(tvm_infer_mlc_tvm_version, [] { return tvm::ffi::String(MLC_ADAPTER_TVM_VERSION); });
TVM_FFI_DLL_EXPORT_TYPED_FUNC(tvm_infer_mlc_tvm_layout, [] { return tvm::ffi::String(MLC_ADAPTER_TVM_LAYOUT); });
TVM_FFI_DLL_EXPORT_TYPED_FUNC(tvm_infer_mlc_create, tvm_infer::mlc::Create);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(tvm_infer_mlc_register, tvm_infer::mlc::Register);
