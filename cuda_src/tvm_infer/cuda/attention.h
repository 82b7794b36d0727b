// Launches kernels/attention_sm90.cuh: kernel by shape, tensor maps of K and V, one persistent grid.
#pragma once

#include <cstdint>

#include "tvm_infer/cuda/dtype.h"
#include "tvm_infer/cuda/params.h"
#include "tvm_infer/variant/cpu_functions.h"

namespace tvm_infer::cuda {

struct Kernel;

inline constexpr int32_t kRagged = 0;  // AttentionLaunch::page_size of keys without pages

// All pointers are device memory. q, o, k and v and their strides are on 16-byte boundaries, partial_o and the plan too (the caller
// checks: it knows their names).
struct AttentionLaunch {
  int32_t device_id;
  void* stream;
  DTypeTag dtype;         // of q and o
  DTypeTag kv_dtype;      // dtype, or IsScaled
  int32_t head_dim;       // of q and k
  int32_t head_dim_vo;    // of v and o
  int32_t page_size;      // kRagged, or tokens in a page
  int64_t num_pages;      // pages that k and v hold; ragged: their rows
  int32_t max_plan_ctas;  // of how many CTAs the plan's tensor can hold the first works; at least 1
  // All fields. Ragged: strides of pages are unused. The plan's heads are expected.num_kv_heads and group_size.
  AttentionParams params;
  const variant::Call* variant;  // null: none; valid until LaunchAttention returns
};

// Whether kernels have pages of so many tokens, and a text that names what they have.
bool HasPageSize(DTypeTag kv_dtype, int32_t page_size);
const char* PageSizes(DTypeTag kv_dtype);
// Throws Error("ExecutorError") where there are none; `name`: whose pages they are.
void CheckPageSize(DTypeTag kv_dtype, int32_t page_size, const char* name);
// The same where keys of other widths than values take no variant. What changes queries or keys is refused where its kernel is built, which
// knows the variant's code (tvm_infer/jit/variants.py).
void CheckTakesVariant(int32_t head_dim, int32_t head_dim_vo, const char* name);

// The launch's kernel, loaded: what goes before it on the stream is launched once this has not thrown. The device's context is current.
// Throws Error("ExecutorError") where no kernel has this shape, none can be built or the device's architecture has none, and
// Error("ArgumentError") for tensors that it cannot address.
const Kernel& PrepareAttention(const AttentionLaunch& launch);

// With its kernel. Does not synchronise, allocates nothing, keeps no state: good inside a capture.
void LaunchAttention(const AttentionLaunch& launch, const Kernel& kernel);

}  // namespace tvm_infer::cuda
