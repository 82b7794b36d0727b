#include "tvm_infer/ffi/cuda_launch.h"

#include <algorithm>
#include <vector>

#include "tvm_infer/cuda/driver.h"
#include "tvm_infer/ffi/value_checks.h"

namespace tvm_infer::ffi_api::on_cuda {

int32_t CheckPlanTensor(const TensorView& plan, const Place& place) {
  CheckIndex(plan, "plan", place);
  const int64_t bytes = plan.numel() * static_cast<int64_t>(sizeof(int32_t));
  if (bytes < static_cast<int64_t>(sizeof(PlanHeader) + sizeof(Work))) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `plan`, " << bytes << " bytes, is not a plan; upload one made by tvm_infer.plan";
  }
  CheckAligned(plan, "plan");
  return static_cast<int32_t>(std::min<int64_t>((bytes - sizeof(PlanHeader)) / sizeof(Work), INT32_MAX));
}

void SetHeads(cuda::ExpectedPlan* expected, const TensorView& q, int64_t num_kv_heads, const char* kv_name) {
  if (num_kv_heads < 1 || q.size(1) % num_kv_heads != 0) {
    TVM_INFER_THROW(ArgumentError) << "argument `q` has " << q.size(1) << " heads, shape " << ShapeString(q) << ", `" << kv_name << "` has "
                                   << num_kv_heads << "; query heads must be a multiple of KV heads";
  }
  expected->num_kv_heads = static_cast<int32_t>(num_kv_heads);
  expected->group_size = static_cast<int32_t>(q.size(1) / num_kv_heads);
}

void CheckAlignedCache(const TensorView& k_cache, const OptionalTensor& v_cache) {
  CheckAlignedRows(k_cache, "k_cache");
  if (v_cache.has_value()) CheckAlignedRows(v_cache.value(), "v_cache");
}

bool MayCheckValues(const CudaScope& scope) { return DebugChecks() && !cuda::IsCapturing(scope.stream()); }

void CheckDeviceScales(const CudaScope& scope, const KVScales& scales) {
  const auto check = [&scope](const OptionalTensor& tensor, const char* name) {
    if (!tensor.has_value()) return;
    const std::vector<int32_t> words = scope.ToHost(tensor.value());  // float32, as words
    CheckScaleValues(reinterpret_cast<const float*>(words.data()), tensor.value().numel(), name);
  };
  check(scales.k_scales, "k_scales");
  check(scales.v_scales, "v_scales");
}

cuda::AppendParams AppendLaunch(const Place& place, const TensorView& k, const TensorView& v, const TensorView& k_cache,
                                const OptionalTensor& v_cache, const cpu::KVSource& cache, const CacheShape& shape) {
  CheckNewTokens(k, v, shape, place);
  CheckDim(v, "v", 0, k.size(0), "as k");
  CheckAlignedRows(k, "k");
  CheckAlignedRows(v, "v");
  CheckAlignedCache(k_cache, v_cache);
  if (CheckFloat(k, "k") == cpu::DType::kFloat32) {
    TVM_INFER_THROW(ExecutorError) << "argument `k` has dtype float32; the cuda executor appends float16 and bfloat16. Cast it, or pass "
                                      "host tensors (the cpu executor takes float32)";
  }
  cuda::AppendParams params{};
  params.max_tokens = static_cast<int32_t>(k.size(0));
  params.kv_page_indptr = cache.page_indptr;
  params.kv_page_indices = cache.page_indices;
  params.k = DataPtr<void>(k);
  params.v = DataPtr<void>(v);
  params.k_stride_token = Stride(k, 0);
  params.k_stride_head = Stride(k, 1);
  params.v_stride_token = Stride(v, 0);
  params.v_stride_head = Stride(v, 1);
  params.k_cache = const_cast<void*>(cache.k);
  params.v_cache = const_cast<void*>(cache.v);
  params.k_cache_stride_page = cache.k_page_stride;
  params.k_cache_stride_head = cache.k_head_stride;
  params.k_cache_stride_token = cache.k_token_stride;
  params.v_cache_stride_page = cache.v_page_stride;
  params.v_cache_stride_head = cache.v_head_stride;
  params.v_cache_stride_token = cache.v_token_stride;
  params.k_scales = cache.k_scale.heads;
  params.v_scales = cache.v_scale.heads;
  params.k_scale = cache.k_scale.all;
  params.v_scale = cache.v_scale.all;
  params.num_kv_heads = shape.num_kv_heads;
  params.head_dim = shape.head_dim;
  params.page_size = shape.page_size;
  return params;
}

}  // namespace tvm_infer::ffi_api::on_cuda
