// What the bindings of several CUDA kernels share: checks of what they are launched on, and the parameters of an append.
#pragma once

#include <cstdint>

#include "tvm_infer/cuda/dtype.h"
#include "tvm_infer/cuda/params.h"
#include "tvm_infer/ffi/attention_checks.h"
#include "tvm_infer/ffi/common.h"
#include "tvm_infer/ffi/cuda_scope.h"

namespace tvm_infer::ffi_api::on_cuda {

inline cuda::DTypeTag ToTag(cpu::DType dtype) { return static_cast<cuda::DTypeTag>(dtype); }

// Returns of how many CTAs the plan's tensor can hold the first works, which stand behind the header.
int32_t CheckPlanTensor(const TensorView& plan, const Place& place);
// The heads of a call's plan; throws where query heads are no multiple of KV heads.
void SetHeads(cuda::ExpectedPlan* expected, const TensorView& q, int64_t num_kv_heads, const char* kv_name);
void CheckAlignedCache(const TensorView& k_cache, const OptionalTensor& v_cache);
// Debug checks are on, and the stream is not being captured: they synchronise.
bool MayCheckValues(const CudaScope& scope);
// Copies of scale tensors, checked as those on the host are. Synchronises.
void CheckDeviceScales(const CudaScope& scope, const KVScales& scales);
// An append's parameters but its lengths.
cuda::AppendParams AppendLaunch(const Place& place, const TensorView& k, const TensorView& v, const TensorView& k_cache,
                                const OptionalTensor& v_cache, const cpu::KVSource& cache, const CacheShape& shape);

}  // namespace tvm_infer::ffi_api::on_cuda
