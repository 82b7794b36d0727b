// The packed functions of libtvm_infer.so that the adapter calls. It links none of our code: it finds the functions by name, so that one
// adapter, built on the user's machine, serves the library that is loaded.
#pragma once

#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/function.h>

#include <cstdint>

#define TVM_INFER_MLC_CALLS(V)         \
  V(attention_with_kv_cache)           \
  V(attention_with_kv_cache_fused_qkv) \
  V(kv_cache_set_rope)                 \
  V(stream_is_capturing)               \
  V(cpu_info)                          \
  V(cpu_tile_table)                    \
  V(cuda_tile_table)                   \
  V(kv_cache_add)                      \
  V(kv_cache_begin_forward)            \
  V(kv_cache_clear)                    \
  V(kv_cache_config)                   \
  V(kv_cache_create)                   \
  V(kv_cache_debug_state)              \
  V(kv_cache_drop_pages)               \
  V(kv_cache_end_forward)              \
  V(kv_cache_fork)                     \
  V(kv_cache_in_forward)               \
  V(kv_cache_move_tokens)              \
  V(kv_cache_num_free_pages)           \
  V(kv_cache_page_table)               \
  V(kv_cache_pages)                    \
  V(kv_cache_pop)                      \
  V(kv_cache_remove)                   \
  V(kv_cache_seq_len)                  \
  V(kv_cache_sequences)                \
  V(kv_cache_set_variant)              \
  V(merge)                             \
  V(paged_attention)                   \
  V(plan)                              \
  V(plan_capacity)                     \
  V(plan_upload)                       \
  V(cuda_info)                         \
  V(ragged_attention)                  \
  V(rope_append_paged)                 \
  V(scale_lse)                         \
  V(variant_append_attention)          \
  V(variant_call)                      \
  V(variant_paged_attention)           \
  V(variant_ragged_attention)

namespace tvm_infer::mlc {

struct Calls {
#define TVM_INFER_MLC_DECLARE(name) tvm::ffi::Function name;
  TVM_INFER_MLC_CALLS(TVM_INFER_MLC_DECLARE)
#undef TVM_INFER_MLC_DECLARE
};

// Looked up at the first call; throws where libtvm_infer.so is not loaded.
const Calls& Library();

// The `band` of plan and plan_capacity: window_left, window_right, num_sink, chunk. -1 for all keys of a side, 0 for none.
inline tvm::ffi::Shape BandOf(int64_t window_left, bool is_causal) { return {window_left, is_causal ? 0 : -1, 0, 0}; }

}  // namespace tvm_infer::mlc
