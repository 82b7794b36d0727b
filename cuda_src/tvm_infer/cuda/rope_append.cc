#include "tvm_infer/cuda/rope_append.h"

#include <algorithm>
#include <string>

#include "tvm_infer/cuda/driver.h"
#include "tvm_infer/cuda/kernels.h"
#include "tvm_infer/error.h"

namespace tvm_infer::cuda {
namespace {

constexpr int64_t kWarp = 32;
constexpr int32_t kLaneElements = 16;  // of a row: two vectors of 16 bytes

CachedKernel& KernelOf(DTypeTag dtype, DTypeTag kv_dtype) {
  const auto make = [](DTypeTag type, const char* kv) { return new CachedKernel(std::string("rope_append_") + Suffix(type) + kv); };
  static CachedKernel* const kernels[2][3] = {
      {make(DTypeTag::kFloat16, ""), make(DTypeTag::kFloat16, "_e4m3"), make(DTypeTag::kFloat16, "_e5m2")},
      {make(DTypeTag::kBFloat16, ""), make(DTypeTag::kBFloat16, "_e4m3"), make(DTypeTag::kBFloat16, "_e5m2")}};
  const int kv = IsScaled(kv_dtype) ? 1 + (kv_dtype == DTypeTag::kFloat8E5M2) : 0;
  return *kernels[dtype == DTypeTag::kBFloat16][kv];
}

}  // namespace

void CheckRopeShape(int32_t head_dim, int32_t head_dim_vo, int32_t rotary_dim, const char* name) {
  if (head_dim != head_dim_vo) {
    TVM_INFER_THROW(ExecutorError) << "argument `" << name << "` has head_dim " << head_dim << " beside head_dim_vo " << head_dim_vo
                                   << "; the cuda executor rotates on the way to the cache where they are equal. Rotate queries and keys "
                                      "first, then append, or pass host tensors (the cpu executor takes any head_dim_vo up to head_dim)";
  }
  if (head_dim % kLaneElements != 0) {
    TVM_INFER_THROW(ExecutorError) << "argument `" << name << "` has head_dim " << head_dim
                                   << "; the cuda executor rotates heads of a multiple of " << kLaneElements
                                   << ". Pad the heads with zeros, or pass host tensors (the cpu executor takes multiples of 8)";
  }
  if (rotary_dim % kLaneElements != 0) {
    TVM_INFER_THROW(ExecutorError) << "argument `inv_freq` has " << rotary_dim / 2 << " entries, a rotary_dim of " << rotary_dim
                                   << "; the cuda executor rotates a multiple of " << kLaneElements
                                   << " elements of a head. Pass host tensors (the cpu executor takes any even rotary_dim)";
  }
}

void LaunchRopeAppend(int32_t device_id, void* stream, DTypeTag dtype, DTypeTag kv_dtype, const RopeAppendParams& params) {
  const AppendParams& append = params.append;
  const int64_t rows = append.num_qo_heads + int64_t{2} * append.num_kv_heads;
  if (append.max_tokens == 0 || rows == 0) return;
  // Steps of a warp over the rows of all tokens: the most warps that find work.
  const int64_t step_rows = kWarp / (append.head_dim / kLaneElements);
  const int64_t steps = append.max_tokens * ((rows + step_rows - 1) / step_rows);
  if (steps > INT32_MAX) {
    TVM_INFER_THROW(ArgumentError) << "argument `q` has " << append.max_tokens << " tokens of " << rows
                                   << " heads (with those of k and v) and head_dim " << append.head_dim
                                   << ": more than 2^31 copies of 1024 bytes. Append them in several calls";
  }
  const Kernel& kernel = KernelOf(dtype, kv_dtype).Get(device_id, stream);
  const int64_t warps = kernel.info.threads / kWarp;
  const int64_t grid = std::min<int64_t>((steps + warps - 1) / warps, GetDevice(device_id).num_sms * kernel.info.ctas_per_sm);
  void* args[] = {const_cast<RopeAppendParams*>(&params)};
  LaunchKernel(kernel, static_cast<int32_t>(grid), stream, args);
}

}  // namespace tvm_infer::cuda
