// rope.h on a CUDA device: the same arguments, all there; their values are not read, but for debug checks (attention_cuda.h).
#pragma once

#include "tvm_infer/ffi/attention_checks.h"
#include "tvm_infer/ffi/common.h"

namespace tvm_infer::ffi_api {

// A call's arguments, by rope.h's names.
struct RopeCall {
  TensorView q, k, v, inv_freq;
  bool is_interleaved;
  float magnitude;
  OptionalTensor plan, qo_indptr, kv_len;
  TensorView k_cache;
  OptionalTensor v_cache;
  int64_t kv_layout;
  TensorView kv_page_indptr, kv_page_indices, q_out;
  KVScales scales;
};

namespace on_cuda {

// `shape` and `cache`: of the cache and its page table, checked, as is everything else but its alignment.
void RopeAppendPaged(const Place& place, const RopeCall& call, const CacheShape& shape, const cpu::KVSource& cache);

}  // namespace on_cuda
}  // namespace tvm_infer::ffi_api
