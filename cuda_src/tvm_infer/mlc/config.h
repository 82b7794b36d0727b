// What a cache is created with, in the order of MLC's creation call, checked.
#pragma once

#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>
#include <tvm/runtime/tensor.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace tvm_infer::mlc {

using tvm::ffi::Optional;
using tvm::ffi::Shape;
using tvm::ffi::String;
using tvm::runtime::Tensor;

std::string ShapeText(const Shape& shape);  // "[1, 2]"

struct Config {
  int64_t num_layers, num_qo_heads, num_kv_heads, head_dim;
  int64_t page_size, num_pages;
  int64_t max_batch;   // sequences in one step
  int64_t max_tokens;  // new tokens in one step
  DLDataType dtype;
  DLDevice device;
  std::vector<int64_t> sliding_layers;  // of kind "mha_sliding", ascending: a token sees the last layer_window keys, its own included
  int64_t layer_window = 0;
  bool has_sequence_windows = false;  // sequences may be given windows
  // Rotary positions: queries and keys turn before they are stored, or as attention reads them, or not at all.
  bool rotates_before_storing = false, rotates_inline = false;

  bool is_sliding(int64_t layer) const { return std::binary_search(sliding_layers.begin(), sliding_layers.end(), layer); }
  bool is_cuda() const { return device.device_type == kDLCUDA; }
};

// The arguments as MLC has them; the comments give what is supported.
struct CreationArgs {
  Shape cache_config;     // max_batch, max_total_seq_len, prefill_chunk, page_size, support_sliding_window [, layer window]
  Shape layer_partition;  // 0, num_layers: one pipeline stage
  int64_t num_layers, num_qo_heads, num_kv_heads;
  int64_t qk_head_dim, v_head_dim;                            // equal
  Shape attn_kinds;                                           // 0 (mha) or 3 (mha_sliding) for all layers, or for each
  int64_t rope_mode;                                          // RoPEMode: 0 none, 1 normal (before keys are stored), 2 inline
  int64_t mla_original_qk_head_dim, mla_original_v_head_dim;  // 0
  bool enable_disaggregation;                                 // false
  Tensor init;                                                // any tensor of the cache's dtype, on its device
};

// Throws ArgumentError naming the argument, its value and the way out. What the executors take (dtype, head_dim, head counts) is checked by
// kv_cache_create.
Config CheckedConfig(const CreationArgs& args);

}  // namespace tvm_infer::mlc
