#include "tvm_infer/mlc/config.h"

#include <tvm/ffi/error.h>

#include <algorithm>
#include <array>
#include <string>

namespace tvm_infer::mlc {

std::string ShapeText(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

namespace {

constexpr int64_t kMha = 0, kMhaSliding = 3;                        // TVM's AttnKind
constexpr int64_t kRopeNone = 0, kRopeNormal = 1, kRopeInline = 2;  // TVM's RoPEMode
constexpr int64_t kLayerWindow = 1024;                              // TVM's, where cache_config does not say

const char* AttnKindName(int64_t kind) {
  constexpr std::array<const char*, 4> names = {"mha", "mla", "linear", "mha_sliding"};
  return kind >= 0 && kind < static_cast<int64_t>(names.size()) ? names[kind] : "no kind";
}

void CheckCacheConfig(const Shape& config) {
  if (config.size() != 5 && config.size() != 6) {
    TVM_FFI_THROW(ArgumentError) << "argument `cache_config` is " << ShapeText(config)
                                 << "; it must be [max_batch_size, max_total_seq_len, prefill_chunk_size, page_size, "
                                 << "support_sliding_window] and may end with a layer_sliding_window_size";
  }
  constexpr std::array<const char*, 4> names = {"max_batch_size", "max_total_seq_len", "prefill_chunk_size", "page_size"};
  for (size_t i = 0; i < names.size(); ++i) {
    if (config[i] < 1 || config[i] > INT32_MAX) {
      TVM_FFI_THROW(ArgumentError) << "argument `cache_config` has " << names[i] << " = " << config[i] << "; it must be from 1 to 2^31 - 1";
    }
  }
  if (config[4] != 0 && config[4] != 1) {
    TVM_FFI_THROW(ArgumentError) << "argument `cache_config` has support_sliding_window = " << config[4] << "; it must be 0 or 1";
  }
  if (config.size() == 6 && (config[5] < 1 || config[5] > INT32_MAX)) {
    TVM_FFI_THROW(ArgumentError) << "argument `cache_config` has layer_sliding_window_size = " << config[5]
                                 << "; it must be from 1 to 2^31 - 1: the keys that a token sees, its own included";
  }
}

void SetRopeMode(const CreationArgs& args, Config* config) {
  if (args.rope_mode < kRopeNone || args.rope_mode > kRopeInline) {
    TVM_FFI_THROW(ArgumentError) << "argument `rope_mode` is " << args.rope_mode
                                 << "; it must be 0 (none), 1 (normal: keys are stored rotated) or 2 (inline: attention rotates them)";
  }
  // In a cache whose sequences may have windows TVM rotates inline, by positions within the window, whatever mode it was created with.
  const bool may_slide = args.cache_config[4] != 0;
  config->rotates_inline = args.rope_mode == kRopeInline || (args.rope_mode == kRopeNormal && may_slide);
  config->rotates_before_storing = args.rope_mode == kRopeNormal && !may_slide;
}

void CheckLayers(const CreationArgs& args) {
  if (args.layer_partition.size() != 2 || args.layer_partition[0] != 0 || args.layer_partition[1] != args.num_layers) {
    TVM_FFI_THROW(ArgumentError) << "argument `layer_partition` is " << ShapeText(args.layer_partition)
                                 << " with num_layers = " << args.num_layers
                                 << "; this cache serves one pipeline stage with all layers: pass [0, num_layers] and "
                                 << "build the model with pipeline_parallel_stages = 1";
  }
  if (args.attn_kinds.size() != 1 && static_cast<int64_t>(args.attn_kinds.size()) != args.num_layers) {
    TVM_FFI_THROW(ArgumentError) << "argument `attn_kinds` has " << args.attn_kinds.size()
                                 << " entries with num_layers = " << args.num_layers << "; it must have one, or one for each layer";
  }
  for (size_t layer = 0; layer < args.attn_kinds.size(); ++layer) {
    if (args.attn_kinds[layer] != kMha && args.attn_kinds[layer] != kMhaSliding) {
      TVM_FFI_THROW(ArgumentError) << "argument `attn_kinds` is " << args.attn_kinds[layer] << " (" << AttnKindName(args.attn_kinds[layer])
                                   << ") for layer " << layer
                                   << ", and this cache has mha (0) and mha_sliding (3) so far; keep TVM's own cache for this model";
    }
  }
}

void CheckHeads(const CreationArgs& args) {
  if (args.v_head_dim != args.qk_head_dim) {
    TVM_FFI_THROW(ArgumentError) << "argument `v_head_dim` is " << args.v_head_dim << " and `qk_head_dim` is " << args.qk_head_dim
                                 << "; this cache keeps keys and values of one width: pad the narrower with zeros";
  }
  for (const auto& [name, value] : {std::pair{"mla_original_qk_head_dim", args.mla_original_qk_head_dim},
                                    std::pair{"mla_original_v_head_dim", args.mla_original_v_head_dim}}) {
    if (value != 0) {
      TVM_FFI_THROW(ArgumentError) << "argument `" << name << "` is " << value
                                   << ", and this cache has no latent attention (MLA) yet; pass 0, or keep TVM's own cache for this model";
    }
  }
  if (args.enable_disaggregation) {
    TVM_FFI_THROW(ArgumentError) << "argument `enable_disaggregation` is true, and this cache does not send keys to other machines yet; "
                                 << "pass false";
  }
}

}  // namespace

Config CheckedConfig(const CreationArgs& args) {
  CheckCacheConfig(args.cache_config);
  CheckLayers(args);
  CheckHeads(args);
  const Shape& c = args.cache_config;
  Config config{};
  SetRopeMode(args, &config);
  config.num_layers = args.num_layers;
  config.num_qo_heads = args.num_qo_heads;
  config.num_kv_heads = args.num_kv_heads;
  config.head_dim = args.qk_head_dim;
  config.page_size = c[3];
  // As many as TVM makes: its schedulers count on the one more.
  config.num_pages = (c[1] + c[3] - 1) / c[3] + 1;
  config.max_batch = c[0];
  // A decode step has a token for each sequence, whatever the prefill chunk.
  config.max_tokens = std::max(c[2], c[0]);
  for (int64_t layer = 0; layer < args.num_layers; ++layer) {
    if (args.attn_kinds[args.attn_kinds.size() == 1 ? 0 : layer] == kMhaSliding) config.sliding_layers.push_back(layer);
  }
  config.layer_window = c.size() == 6 ? c[5] : kLayerWindow;
  // As in TVM, where layers with windows take the place of sequences with windows.
  config.has_sequence_windows = c[4] != 0 && config.sliding_layers.empty();
  if (c[4] != 0) config.num_pages += 2 * config.max_batch;  // a window and sinks that begin and end within pages
  config.dtype = args.init->dtype;
  config.device = args.init->device;
  return config;
}

}  // namespace tvm_infer::mlc
