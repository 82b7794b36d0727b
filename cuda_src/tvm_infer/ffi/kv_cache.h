// Packed functions of the paged KV cache. `kv` is the object that kv_cache_create returns; ids are any int64.
//
// A step:  kv_cache_begin_forward -> attention_with_kv_cache for each layer -> kv_cache_end_forward (or _cancel_forward).
// An operation that throws has changed nothing. Errors: kv/cache_manager.h, kv_cache_object.h.
#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>

#include <cstdint>

#include "tvm_infer/ffi/kv_cache_object.h"

#define TVM_INFER_KV_CACHE_FUNCTIONS(V)                              \
  V(attention_with_kv_cache, AttentionWithKVCache)                   \
  V(attention_with_kv_cache_fused_qkv, AttentionWithKVCacheFusedQKV) \
  V(attention_with_kv_cache_rope, AttentionWithKVCacheRope)          \
  V(kv_cache_set_rope, KVCacheSetRope)                               \
  V(kv_cache_set_variant, KVCacheSetVariant)                         \
  V(kv_cache_set_shared_prefix, KVCacheSetSharedPrefix)              \
  V(kv_cache_create, KVCacheCreate)                                  \
  V(kv_cache_create_scaled, KVCacheCreateScaled)                     \
  V(kv_cache_create_unequal, KVCacheCreateUnequal)                   \
  V(kv_cache_set_scales, KVCacheSetScales)                           \
  V(kv_cache_dtype, KVCacheDTypeOf)                                  \
  V(kv_cache_add, KVCacheAdd)                                        \
  V(kv_cache_remove, KVCacheRemove)                                  \
  V(kv_cache_fork, KVCacheFork)                                      \
  V(kv_cache_pop, KVCachePop)                                        \
  V(kv_cache_truncate, KVCacheTruncate)                              \
  V(kv_cache_drop_pages, KVCacheDropPages)                           \
  V(kv_cache_move_tokens, KVCacheMoveTokens)                         \
  V(kv_cache_clear, KVCacheClear)                                    \
  V(kv_cache_begin_forward, KVCacheBeginForward)                     \
  V(kv_cache_end_forward, KVCacheEndForward)                         \
  V(kv_cache_cancel_forward, KVCacheCancelForward)                   \
  V(kv_cache_in_forward, KVCacheInForward)                           \
  V(kv_cache_query_positions, KVCacheQueryPositions)                 \
  V(kv_cache_position_ids, KVCachePositionIds)                       \
  V(kv_cache_begin_step, KVCacheBeginStep)                           \
  V(kv_cache_step_inputs, KVCacheStepInputs)                         \
  V(kv_cache_plan, KVCachePlan)                                      \
  V(kv_cache_layer_plan, KVCacheLayerPlan)                           \
  V(kv_cache_seq_len, KVCacheSeqLen)                                 \
  V(kv_cache_sequences, KVCacheSequences)                            \
  V(kv_cache_num_free_pages, KVCacheNumFreePages)                    \
  V(kv_cache_bytes, KVCacheBytes)                                    \
  V(kv_cache_bytes_after, KVCacheBytesAfter)                         \
  V(kv_cache_pages_after, KVCachePagesAfter)                         \
  V(kv_cache_peak_pages, KVCachePeakPages)                           \
  V(kv_cache_window_left, KVCacheWindowLeft)                         \
  V(kv_cache_page_table, KVCachePageTable)                           \
  V(kv_cache_pages, KVCachePages)                                    \
  V(kv_cache_value_pages, KVCacheValuePages)                         \
  V(kv_cache_config, KVCacheConfigOf)                                \
  V(kv_cache_bind, KVCacheBind)                                      \
  V(kv_cache_release, KVCacheRelease)                                \
  V(kv_cache_debug_state, KVCacheDebugState)

namespace tvm_infer::ffi_api {

// Stores k, v of the step's tokens at `layer`, then attends q to all keys of each token's sequence. One call, because a model's
// compiler takes packed calls as pure and could drop an append whose result nobody reads. Repeatable: a second call stores the same.
//   q, out  [num_tokens, num_qo_heads, head_dim]; k, v [num_tokens, num_kv_heads, head_dim]; strided, head_dim contiguous, cache's dtype.
//   out overlaps none of the others. causal as in begin_forward.
void AttentionWithKVCache(PagedKVCache kv, int64_t layer, tvm::ffi::TensorView q, tvm::ffi::TensorView k, tvm::ffi::TensorView v,
                          double sm_scale, int64_t causal, tvm::ffi::TensorView out);

// The same with rotary embedding on the way (kv_cache_set_rope comes first): q and k are rotated by their positions, and k is stored so.
// Repeatable, since qkv is not written.
//   qkv  [num_tokens, num_qo_heads + 2 * num_kv_heads, head_dim], strided, head_dim contiguous: q, k and v of the projection
void AttentionWithKVCacheFusedQKV(PagedKVCache kv, int64_t layer, tvm::ffi::TensorView qkv, double sm_scale, int64_t causal,
                                  tvm::ffi::TensorView out);

// The same with q, k and v apart, and the rotation in the call, so that layers may differ and nothing is set before: arguments as of
// rope_append_paged (rope.h), inv_freq where the cache is.
//   q, k, v, out  as of attention_with_kv_cache, before rotation; rotated_q as q: it is written, and overlaps none of the others
void AttentionWithKVCacheRope(PagedKVCache kv, int64_t layer, tvm::ffi::TensorView q, tvm::ffi::TensorView k, tvm::ffi::TensorView v,
                              tvm::ffi::TensorView inv_freq, int64_t interleaved, double magnitude, double sm_scale, int64_t causal,
                              tvm::ffi::TensorView rotated_q, tvm::ffi::TensorView out);

// How attention_with_kv_cache_fused_qkv rotates, at every layer; arguments as of rope_append_paged (rope.h), but inv_freq float32
// [rotary_dim / 2] on the host. Once, before the first sequence: rotated keys of one kind do not go with queries of another.
void KVCacheSetRope(PagedKVCache kv, tvm::ffi::TensorView inv_freq, int64_t interleaved, double magnitude);

// What the attention of `layers` is besides, from the next step on: a variant with its parameters (variant.h), whose mask has this band
// (window_left, window_right, num_sink, chunk, as of `plan`, plan.h); none: plain attention in this band. causal is what begin_forward must
// say, -1 for either; window_right is for a step that is not causal. Tables by request have an entry for each sequence of a step, in the
// order of its ids. Before the first step that an executable runs on the cache.
void KVCacheSetVariant(PagedKVCache kv, tvm::ffi::Shape layers, tvm::ffi::Optional<VariantCall> variant, int64_t causal,
                       tvm::ffi::Shape band);

// Whether a step's plan may read pages that several of its sequences share once for all, from the next step on; 1 at first. Layers with a
// window or a chunk never do, nor those that stand in one plan with a layer whose variant does not take such works (variant.h).
void KVCacheSetSharedPrefix(PagedKVCache kv, int64_t is_on);

// max_batch: sequences in one step; max_tokens: new tokens in one step, all sequences together (a longer prompt goes in chunks).
// num_ctas: work queues of a plan, 0 for one a thread; num_threads of the cpu executor, 0 for its default.
// ModelError in an exported model whose layers have attention variants: model_create_cache (model.h) makes one that has them.
PagedKVCache KVCacheCreate(int64_t num_layers, int64_t num_qo_heads, int64_t num_kv_heads, int64_t head_dim, DLDataType dtype,
                           int64_t page_size, int64_t num_pages, int64_t max_batch, int64_t max_tokens, int64_t num_ctas,
                           int64_t num_threads, DLDevice device);
// The same with pages of kv_dtype, "float8_e4m3fn" or "float8_e5m2": value = element * scale, scales 1 until they are set. Or of `dtype`.
PagedKVCache KVCacheCreateScaled(int64_t num_layers, int64_t num_qo_heads, int64_t num_kv_heads, int64_t head_dim, DLDataType dtype,
                                 DLDataType kv_dtype, int64_t page_size, int64_t num_pages, int64_t max_batch, int64_t max_tokens,
                                 int64_t num_ctas, int64_t num_threads, DLDevice device);
// The same whose values (and outputs) may be narrower than its keys (and queries): head_dim_vo at most head_dim.
PagedKVCache KVCacheCreateUnequal(int64_t num_layers, int64_t num_qo_heads, int64_t num_kv_heads, int64_t head_dim, int64_t head_dim_vo,
                                  DLDataType dtype, DLDataType kv_dtype, int64_t page_size, int64_t num_pages, int64_t max_batch,
                                  int64_t max_tokens, int64_t num_ctas, int64_t num_threads, DLDevice device);
// k_scales, v_scales: float32 [num_layers, num_kv_heads], contiguous, on the host; finite, above 0. Before the first sequence.
void KVCacheSetScales(PagedKVCache kv, tvm::ffi::TensorView k_scales, tvm::ffi::TensorView v_scales);
DLDataType KVCacheDTypeOf(PagedKVCache kv);  // of q, k, v and out

// The same without that question.
PagedKVCache MakeKVCache(const KVCacheConfig& config);

void KVCacheAdd(PagedKVCache kv, int64_t id);
void KVCacheRemove(PagedKVCache kv, int64_t id);
void KVCacheFork(PagedKVCache kv, int64_t parent, int64_t child, int64_t position);  // position -1: all of the parent
void KVCachePop(PagedKVCache kv, int64_t id, int64_t num_tokens);
void KVCacheTruncate(PagedKVCache kv, int64_t id, int64_t length);
// Takes num_pages whole pages out of the sequence, from its page first_page on: later tokens move to lower positions.
void KVCacheDropPages(PagedKVCache kv, int64_t id, int64_t first_page, int64_t num_pages);
// Copies keys and values of token src[i] of sequence ids[i] over those at dst[i], in every layer, one after the other; on a device in the
// order of its stream. What a token tree's accepted nodes need before the others are popped. Pages that are written must not be shared.
void KVCacheMoveTokens(PagedKVCache kv, tvm::ffi::Shape ids, tvm::ffi::Shape src, tvm::ffi::Shape dst);
void KVCacheClear(PagedKVCache kv);

// Grows sequence ids[i] by append_lengths[i] tokens and plans the step.
void KVCacheBeginForward(PagedKVCache kv, tvm::ffi::Shape ids, tvm::ffi::Shape append_lengths, int64_t causal);
// The same, with what a model reads beside the cache: token_ids int64 [num_tokens], logit_rows int64 [num_logits] (rows whose logits are
// wanted), both on the host, both optional. num_rows: rows of the step's tensors, at least its tokens; rows behind them are padding (token
// 0, position 0): nothing is appended for them and their outputs are 0. A captured graph of so many rows can be replayed then.
void KVCacheBeginStep(PagedKVCache kv, tvm::ffi::Shape ids, tvm::ffi::Shape append_lengths, int64_t causal, int64_t num_rows,
                      Optional<TensorView> token_ids, Optional<TensorView> logit_rows);
// Views on the cache's device that every step of as many rows (and logits) overwrites, at addresses that depend on these numbers alone:
// input_ids [1, num_rows], position_ids [1, num_rows], logit_rows [num_logits], int64.
tvm::ffi::Array<tvm::ffi::Tensor> KVCacheStepInputs(PagedKVCache kv, int64_t num_rows, int64_t num_logits);
void KVCacheEndForward(PagedKVCache kv);
// Takes the step's growth back.
void KVCacheCancelForward(PagedKVCache kv);
bool KVCacheInForward(PagedKVCache kv);

// Positions of the step's tokens in their sequences: int64 [num_tokens] on the host; position_ids: [1, num_rows] on the device. Views.
tvm::ffi::Tensor KVCacheQueryPositions(PagedKVCache kv);
tvm::ffi::Tensor KVCachePositionIds(PagedKVCache kv);
tvm::ffi::Tensor KVCachePlan(PagedKVCache kv);  // of the last step and layer 0, int32; a view
tvm::ffi::Tensor KVCacheLayerPlan(PagedKVCache kv, int64_t layer);

int64_t KVCacheSeqLen(PagedKVCache kv, int64_t id);
tvm::ffi::Shape KVCacheSequences(PagedKVCache kv);  // ids, ascending
int64_t KVCacheNumFreePages(PagedKVCache kv);
int64_t KVCacheBytes(PagedKVCache kv);  // of the pages in use, all layers
// Exact use in a step in which these sequences grow so far: copies of shared pages counted, those that leave windows not. Changes nothing;
// may exceed what the cache has.
int64_t KVCacheBytesAfter(PagedKVCache kv, tvm::ffi::Shape ids, tvm::ffi::Shape append_lengths);
int64_t KVCachePagesAfter(PagedKVCache kv, tvm::ffi::Shape ids, tvm::ffi::Shape append_lengths);
// Pages that a sequence has at most on its way to `length` tokens in steps of at most max_append, none of them shared.
int64_t KVCachePeakPages(PagedKVCache kv, int64_t length, int64_t max_append);
// Keys before its own that a token sees at most, in any layer, sinks apart; -1 for all. Pages behind go back to the pool.
int64_t KVCacheWindowLeft(PagedKVCache kv);
tvm::ffi::Shape KVCachePageTable(PagedKVCache kv, int64_t id);  // -1 for pages that were given back
tvm::ffi::Tensor KVCachePages(PagedKVCache kv, int64_t layer);  // [num_pages, 2, num_kv_heads, page_size, head_dim], no copy
// Values alone, [num_pages, num_kv_heads, page_size, head_dim_vo], no copy. Where that is not head_dim kv_cache_pages are keys alone.
tvm::ffi::Tensor KVCacheValuePages(PagedKVCache kv, int64_t layer);
// num_layers, num_qo_heads, num_kv_heads, head_dim, page_size, num_pages, max_batch, max_tokens, num_ctas, num_threads, bytes per page,
// device type (DLPack), device id, head_dim_vo
tvm::ffi::Shape KVCacheConfigOf(PagedKVCache kv);

// An executable takes the cache for itself (token: its own number, not 0); a second one gets CacheStateError.
void KVCacheBind(PagedKVCache kv, int64_t token);
void KVCacheRelease(PagedKVCache kv, int64_t token);

tvm::ffi::Shape KVCacheDebugState(PagedKVCache kv);  // kv::CacheManager::DumpState

}  // namespace tvm_infer::ffi_api
