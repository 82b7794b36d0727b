#include "tvm_infer/ffi/kv_cache.h"

#include <tvm/ffi/memory.h>

#include <new>
#include <numeric>
#include <utility>
#include <vector>

#include "tvm_infer/ffi/common.h"
#include "tvm_infer/ffi/model.h"
#include "tvm_infer/ffi/plan.h"
#include "tvm_infer/ffi/rope_checks.h"

namespace tvm_infer::ffi_api {
namespace {

using tvm::ffi::Shape;
using tvm::ffi::Tensor;

void CheckSameLength(const Shape& ids, const Shape& append_lengths) {
  if (ids.size() != append_lengths.size()) {
    TVM_INFER_THROW(ArgumentError) << "argument `append_lengths` has " << append_lengths.size() << " entries and `ids` " << ids.size()
                                   << "; they must have one for each sequence of the step";
  }
}

int64_t PagesAfter(const PagedKVCache& kv, const Shape& ids, const Shape& append_lengths) {
  CheckSameLength(ids, append_lengths);
  return kv->manager().PagesAfter(ids.data(), append_lengths.data(), static_cast<int64_t>(ids.size()));
}

void CheckHostInt64(const TensorView& tensor, const char* name) {
  CheckCpu(tensor, name);
  CheckDType(tensor, name, DLDataType{kDLInt, 64, 1}, "tokens and rows are int64");
  CheckRank(tensor, name, 1, "one value each");
  CheckContiguous(tensor, name);
}

// There are at most as many as the step has rows, so that they have their place.
void CheckLogitRows(const kv::StepInputs& inputs, int64_t num_rows) {
  if (inputs.num_logits > num_rows) {
    TVM_INFER_THROW(ArgumentError) << "argument `logit_rows` has " << inputs.num_logits << " entries; the step has " << num_rows
                                   << " rows: name each at most once";
  }
  for (int64_t i = 0; i < inputs.num_logits; ++i) {
    if (inputs.logit_rows[i] >= 0 && inputs.logit_rows[i] < num_rows) continue;
    TVM_INFER_THROW(ArgumentError) << "argument `logit_rows` has " << inputs.logit_rows[i] << " at entry " << i
                                   << "; the step has rows 0 to " << num_rows - 1;
  }
}

Shape ToShape(const std::vector<int64_t>& values) { return Shape(values.begin(), values.end()); }

}  // namespace

void AttentionWithKVCache(PagedKVCache kv, int64_t layer, TensorView q, TensorView k, TensorView v, double sm_scale, int64_t causal,
                          TensorView out) {
  Guarded([&] { kv->Attention(layer, q, k, v, sm_scale, causal != 0, out); });
}

void AttentionWithKVCacheFusedQKV(PagedKVCache kv, int64_t layer, TensorView qkv, double sm_scale, int64_t causal, TensorView out) {
  Guarded([&] { kv->FusedAttention(layer, qkv, sm_scale, causal != 0, out); });
}

void AttentionWithKVCacheRope(PagedKVCache kv, int64_t layer, TensorView q, TensorView k, TensorView v, TensorView inv_freq,
                              int64_t interleaved, double magnitude, double sm_scale, int64_t causal, TensorView rotated_q,
                              TensorView out) {
  Guarded([&] {
    const RopeArguments rope{inv_freq, interleaved, magnitude};
    kv->RopeAttention(layer, q, k, v, rope, sm_scale, causal != 0, rotated_q, out);
  });
}

void KVCacheSetRope(PagedKVCache kv, TensorView inv_freq, int64_t interleaved, double magnitude) {
  Guarded([&] {
    CheckRotation(inv_freq, interleaved, magnitude, kv->config().head_dim, "the cache", kHost);
    kv->SetRope(inv_freq, interleaved != 0, magnitude);
  });
}

void KVCacheSetVariant(PagedKVCache kv, Shape layers, Optional<VariantCall> variant, int64_t causal, Shape band) {
  Guarded([&] { kv->SetVariant(layers, variant, causal, MakeBand(band)); });
}

void KVCacheSetSharedPrefix(PagedKVCache kv, int64_t is_on) {
  Guarded([&] { kv->SetSharedPrefix(is_on != 0); });
}

PagedKVCache KVCacheCreate(int64_t num_layers, int64_t num_qo_heads, int64_t num_kv_heads, int64_t head_dim, DLDataType dtype,
                           int64_t page_size, int64_t num_pages, int64_t max_batch, int64_t max_tokens, int64_t num_ctas,
                           int64_t num_threads, DLDevice device) {
  return KVCacheCreateUnequal(num_layers, num_qo_heads, num_kv_heads, head_dim, head_dim, dtype, dtype, page_size, num_pages, max_batch,
                              max_tokens, num_ctas, num_threads, device);
}

PagedKVCache KVCacheCreateScaled(int64_t num_layers, int64_t num_qo_heads, int64_t num_kv_heads, int64_t head_dim, DLDataType dtype,
                                 DLDataType kv_dtype, int64_t page_size, int64_t num_pages, int64_t max_batch, int64_t max_tokens,
                                 int64_t num_ctas, int64_t num_threads, DLDevice device) {
  return KVCacheCreateUnequal(num_layers, num_qo_heads, num_kv_heads, head_dim, head_dim, dtype, kv_dtype, page_size, num_pages, max_batch,
                              max_tokens, num_ctas, num_threads, device);
}

PagedKVCache KVCacheCreateUnequal(int64_t num_layers, int64_t num_qo_heads, int64_t num_kv_heads, int64_t head_dim, int64_t head_dim_vo,
                                  DLDataType dtype, DLDataType kv_dtype, int64_t page_size, int64_t num_pages, int64_t max_batch,
                                  int64_t max_tokens, int64_t num_ctas, int64_t num_threads, DLDevice device) {
  return Guarded([&] {
    CheckModelIsPlain();
    return MakeKVCache({num_layers, num_qo_heads, num_kv_heads, head_dim, head_dim_vo, dtype, kv_dtype, page_size, num_pages, max_batch,
                        max_tokens, num_ctas, num_threads, device});
  });
}

void KVCacheSetScales(PagedKVCache kv, TensorView k_scales, TensorView v_scales) {
  Guarded([&] { kv->SetScales(k_scales, v_scales); });
}

DLDataType KVCacheDTypeOf(PagedKVCache kv) { return kv->config().dtype; }

PagedKVCache MakeKVCache(const KVCacheConfig& config) {
  try {
    return PagedKVCache(tvm::ffi::make_object<PagedKVCacheObj>(config));
  } catch (const std::bad_alloc&) {
    TVM_INFER_THROW(ArgumentError) << "argument `num_pages` is " << config.num_pages
                                   << ": the system has no memory to keep book of so many pages; "
                                   << "take fewer, or larger ones (page_size)";
  }
}

void KVCacheAdd(PagedKVCache kv, int64_t id) {
  Guarded([&] { kv->manager().Add(id); });
}
void KVCacheRemove(PagedKVCache kv, int64_t id) {
  Guarded([&] { kv->Remove(id); });
}
void KVCacheFork(PagedKVCache kv, int64_t parent, int64_t child, int64_t position) {
  Guarded([&] { kv->manager().Fork(parent, child, position); });
}
void KVCachePop(PagedKVCache kv, int64_t id, int64_t num_tokens) {
  Guarded([&] { kv->manager().Pop(id, num_tokens); });
}
void KVCacheTruncate(PagedKVCache kv, int64_t id, int64_t length) {
  Guarded([&] { kv->manager().Truncate(id, length); });
}
void KVCacheDropPages(PagedKVCache kv, int64_t id, int64_t first_page, int64_t num_pages) {
  Guarded([&] { kv->manager().DropPages(id, first_page, num_pages); });
}
void KVCacheMoveTokens(PagedKVCache kv, Shape ids, Shape src, Shape dst) {
  Guarded([&] {
    for (const auto& [name, shape] : {std::pair{"src", src}, std::pair{"dst", dst}}) {
      if (shape.size() == ids.size()) continue;
      TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` has " << shape.size() << " entries and `ids` " << ids.size()
                                     << "; they must have one for each move";
    }
    kv->MoveTokens(ids.data(), src.data(), dst.data(), static_cast<int64_t>(ids.size()));
  });
}
void KVCacheClear(PagedKVCache kv) {
  Guarded([&] { kv->Clear(); });
}

void KVCacheBeginForward(PagedKVCache kv, Shape ids, Shape append_lengths, int64_t causal) {
  Guarded([&] {
    CheckSameLength(ids, append_lengths);
    kv->BeginForward(ids.data(), append_lengths.data(), static_cast<int64_t>(ids.size()), causal != 0,
                     kv::StepInputs{-1, nullptr, nullptr, 0});
  });
}

void KVCacheBeginStep(PagedKVCache kv, Shape ids, Shape append_lengths, int64_t causal, int64_t num_rows, Optional<TensorView> token_ids,
                      Optional<TensorView> logit_rows) {
  Guarded([&] {
    CheckSameLength(ids, append_lengths);
    if (num_rows < 0) TVM_INFER_THROW(ArgumentError) << "argument `num_rows` is " << num_rows << "; it must be at least 0";
    const int64_t num_tokens = std::accumulate(append_lengths.begin(), append_lengths.end(), int64_t{0});
    kv::StepInputs inputs{num_rows, nullptr, nullptr, 0};
    if (token_ids.has_value()) {
      CheckHostInt64(token_ids.value(), "token_ids");
      CheckDim(token_ids.value(), "token_ids", 0, num_tokens, "the sum of append_lengths");
      inputs.token_ids = DataPtr<int64_t>(token_ids);
    }
    if (logit_rows.has_value()) {
      CheckHostInt64(logit_rows.value(), "logit_rows");
      inputs.num_logits = logit_rows.value().size(0);
      inputs.logit_rows = DataPtr<int64_t>(logit_rows);
      CheckLogitRows(inputs, num_rows);
    }
    kv->BeginForward(ids.data(), append_lengths.data(), static_cast<int64_t>(ids.size()), causal != 0, inputs);
  });
}

tvm::ffi::Array<Tensor> KVCacheStepInputs(PagedKVCache kv, int64_t num_rows, int64_t num_logits) {
  return Guarded(
      [&] { return tvm::ffi::Array<Tensor>({kv->InputIds(num_rows), kv->PositionIds(num_rows), kv->LogitRows(num_rows, num_logits)}); });
}
void KVCacheEndForward(PagedKVCache kv) {
  Guarded([&] { kv->EndForward(); });
}
void KVCacheCancelForward(PagedKVCache kv) {
  Guarded([&] { kv->CancelForward(); });
}
bool KVCacheInForward(PagedKVCache kv) { return kv->manager().in_forward(); }

Tensor KVCacheQueryPositions(PagedKVCache kv) {
  return Guarded([&] { return kv->QueryPositions(); });
}
Tensor KVCachePositionIds(PagedKVCache kv) {
  return Guarded([&] { return kv->manager().step(), kv->PositionIds(kv->num_rows()); });
}
Tensor KVCachePlan(PagedKVCache kv) {
  return Guarded([&] { return kv->CurrentPlan(0); });
}
Tensor KVCacheLayerPlan(PagedKVCache kv, int64_t layer) {
  return Guarded([&] { return kv->CurrentPlan(layer); });
}

int64_t KVCacheSeqLen(PagedKVCache kv, int64_t id) {
  return Guarded([&] { return int64_t{kv->manager().Length(id)}; });
}
Shape KVCacheSequences(PagedKVCache kv) { return ToShape(kv->manager().Ids()); }
int64_t KVCacheNumFreePages(PagedKVCache kv) { return kv->manager().pool().num_free(); }
int64_t KVCacheBytes(PagedKVCache kv) { return kv->manager().pool().num_used() * kv->bytes_per_page(); }
int64_t KVCacheBytesAfter(PagedKVCache kv, Shape ids, Shape append_lengths) {
  return Guarded([&] { return PagesAfter(kv, ids, append_lengths) * kv->bytes_per_page(); });
}
int64_t KVCachePagesAfter(PagedKVCache kv, Shape ids, Shape append_lengths) {
  return Guarded([&] { return PagesAfter(kv, ids, append_lengths); });
}
int64_t KVCachePeakPages(PagedKVCache kv, int64_t length, int64_t max_append) {
  return Guarded([&] {
    if (length < 0) TVM_INFER_THROW(ArgumentError) << "argument `length` is " << length << "; it must be at least 0";
    if (max_append < 1) TVM_INFER_THROW(ArgumentError) << "argument `max_append` is " << max_append << "; it must be at least 1";
    return kv->manager().PeakPages(length, max_append);
  });
}
int64_t KVCacheWindowLeft(PagedKVCache kv) {
  const kv::KeyWindow& window = kv->manager().window();
  return window.is_bounded() ? window.max_left() : -1;
}
Shape KVCachePageTable(PagedKVCache kv, int64_t id) {
  return Guarded([&] {
    const std::vector<int32_t>& pages = kv->manager().Pages(id);
    return Shape(pages.begin(), pages.end());
  });
}
Tensor KVCachePages(PagedKVCache kv, int64_t layer) {
  return Guarded([&] { return kv->Pages(layer); });
}
Tensor KVCacheValuePages(PagedKVCache kv, int64_t layer) {
  return Guarded([&] { return kv->ValuePages(layer); });
}
Shape KVCacheConfigOf(PagedKVCache kv) {
  const KVCacheConfig& c = kv->config();
  return Shape({c.num_layers, c.num_qo_heads, c.num_kv_heads, c.head_dim, c.page_size, c.num_pages, c.max_batch, c.max_tokens, c.num_ctas,
                c.num_threads, kv->bytes_per_page(), static_cast<int64_t>(c.device.device_type), int64_t{c.device.device_id},
                c.head_dim_vo});
}

void KVCacheBind(PagedKVCache kv, int64_t token) {
  Guarded([&] { kv->Bind(token); });
}
void KVCacheRelease(PagedKVCache kv, int64_t token) {
  Guarded([&] { kv->Release(token); });
}

Shape KVCacheDebugState(PagedKVCache kv) { return ToShape(kv->manager().DumpState()); }

}  // namespace tvm_infer::ffi_api
