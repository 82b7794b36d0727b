#include "tvm_infer/cuda/append.h"

#include <algorithm>
#include <string>

#include "tvm_infer/cuda/driver.h"
#include "tvm_infer/cuda/kernels.h"
#include "tvm_infer/error.h"

namespace tvm_infer::cuda {
namespace {

constexpr int64_t kVectorElements = 8;  // 16 bytes
constexpr int64_t kWarp = 32;

CachedKernel& KernelOf(DTypeTag dtype, DTypeTag kv_dtype, int32_t head_dim, int32_t head_dim_vo) {
  static auto* const copies = new CachedKernel("append_b16");
  static auto* const copies_unequal = new CachedKernel("append_b16_h192_v128");
  if (head_dim != head_dim_vo) {
    if (head_dim == 192 && head_dim_vo == 128 && !IsScaled(kv_dtype)) return *copies_unequal;
    TVM_INFER_THROW(ExecutorError)
        << "argument `k` has head_dim " << head_dim << " and `v` " << head_dim_vo << (IsScaled(kv_dtype) ? " for pages of 8 bits" : "")
        << "; the cuda executor appends equal widths, and 192 with 128 in 16 bits. Pad the values with zeros, or "
           "pass host tensors (the cpu executor takes any head_dim_vo up to head_dim)";
  }
  if (!IsScaled(kv_dtype)) return *copies;
  const auto make = [](DTypeTag from, DTypeTag to) { return new CachedKernel(std::string("append_") + Suffix(from) + "_" + Suffix(to)); };
  static CachedKernel* const quantises[2][2] = {
      {make(DTypeTag::kFloat16, DTypeTag::kFloat8E4M3), make(DTypeTag::kFloat16, DTypeTag::kFloat8E5M2)},
      {make(DTypeTag::kBFloat16, DTypeTag::kFloat8E4M3), make(DTypeTag::kBFloat16, DTypeTag::kFloat8E5M2)}};
  return *quantises[dtype == DTypeTag::kBFloat16][kv_dtype == DTypeTag::kFloat8E5M2];
}

}  // namespace

void LaunchAppend(int32_t device_id, void* stream, DTypeTag dtype, DTypeTag kv_dtype, int32_t head_dim_vo, const AppendParams& params) {
  if (params.max_tokens == 0 || params.num_kv_heads == 0 || params.head_dim == 0) return;
  // Loads of a warp that copies 32 vectors at a time: the most warps that find work.
  const int64_t token_loads = (params.num_kv_heads * ((params.head_dim + head_dim_vo) / kVectorElements) + kWarp - 1) / kWarp;
  const int64_t loads = params.max_tokens * token_loads;
  if (loads > INT32_MAX) {
    TVM_INFER_THROW(ArgumentError) << "argument `k` has " << params.max_tokens << " tokens of " << params.num_kv_heads
                                   << " heads and head_dim " << params.head_dim
                                   << ": more than 2^31 copies of 512 bytes. Append them in several calls";
  }
  const Kernel& kernel = KernelOf(dtype, kv_dtype, params.head_dim, head_dim_vo).Get(device_id, stream);
  const int64_t warps = kernel.info.threads / kWarp;
  const int64_t grid = std::min<int64_t>((loads + warps - 1) / warps, GetDevice(device_id).num_sms * kernel.info.ctas_per_sm);
  void* args[] = {const_cast<AppendParams*>(&params)};
  LaunchKernel(kernel, static_cast<int32_t>(grid), stream, args);
}

}  // namespace tvm_infer::cuda
