// A variant's hooks on the rows of a tile: calls of the generated code through pointers, a run of elements each.
#pragma once

#include "tvm_infer/cpu/kernels.h"

namespace tvm_infer::cpu::TVM_INFER_ISA {

inline constexpr int kMaxPairs = 128;  // head_dim 256

// Row r of the work's KV head `kv_head`.
TVM_INFER_INLINE variant::Row RowOfHead(const VariantJob& job, int r, int kv_head) {
  variant::Row row = job.rows[r];
  row.kv_head += kv_head;
  row.qo_head += kv_head * job.group_size;
  return row;
}

// Turns the scores s of row r into logits, in columns [begin, end) of the block that starts at key `block`. Only where the row sees them: a
// hook may index tables by the key's position, and those need not reach further. The softmax hides the other lanes.
TVM_INFER_INLINE void ApplyLogits(const TileJob& job, int kv_head, int r, int block, int begin, int end, float* s) {
  const VariantJob& variant = *job.variant;
  const int first = job.visible_begin[r] - block, last = job.visible_end[r] - block;
  begin = first > begin ? first : begin;
  end = last < end ? last : end;
  if (begin >= end) return;
  variant.logits(*variant.args, RowOfHead(variant, r, kv_head), block + begin, end - begin, s + begin);
}

// A row of queries, [head_dim] in float, as it enters the product.
TVM_INFER_INLINE void ApplyQuery(const VariantJob& job, int kv_head, int r, int head_dim, float* q) {
  float cos[kMaxPairs], sin[kMaxPairs];
  const variant::Row row = RowOfHead(job, r, kv_head);
  if (job.turn != nullptr) job.turn(*job.args, row, row.q_pos, job.num_pairs, cos, sin);
  job.query(*job.args, row, head_dim, cos, sin, q);
}

// o: a final row, normalised, in float. A row that sees no key stays 0.
TVM_INFER_INLINE void ApplyOutput(const VariantJob& job, int kv_head, int r, float lse, int head_dim, float* o) {
  if (lse == -__builtin_inff()) return;
  job.output(*job.args, RowOfHead(job, r, kv_head), lse, head_dim, o);
}

}  // namespace tvm_infer::cpu::TVM_INFER_ISA
