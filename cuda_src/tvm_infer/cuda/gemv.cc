#include "tvm_infer/cuda/gemv.h"

#include <algorithm>
#include <string>

#include "tvm_infer/cuda/driver.h"
#include "tvm_infer/cuda/kernels.h"

namespace tvm_infer::cuda {
namespace {

constexpr int64_t kVector = 8;      // elements in 16 bytes, the unit of copies
constexpr int32_t kMaxStages = 13;  // what one row of k = 4096 leaves room for; more are not faster
// Below, too few bytes are in flight on an SM.
constexpr int32_t kMinStages = 4;
// A CTA has 16 rows of b, so few rows leave SMs idle. What those at work then read should be soon done;
// longer rows are better divided, as cuBLASLt does.
constexpr int64_t kMinColumnsOfLongRows = 512;
constexpr int64_t kMaxKOfFewColumns = 8192;

CachedKernel& KernelOf(DTypeTag dtype) {
  static auto* const bf16 = new CachedKernel(std::string("gemv_") + Suffix(DTypeTag::kBFloat16));
  static auto* const fp16 = new CachedKernel(std::string("gemv_") + Suffix(DTypeTag::kFloat16));
  return dtype == DTypeTag::kBFloat16 ? *bf16 : *fp16;
}

int64_t BytesOfA(const MatmulArgs& x) { return x.m * x.k * 2; }

int64_t NumStages(const MatmulArgs& x) {
  return std::min<int64_t>(kMaxStages, (kGemvSharedBytes - kGemvFixedSharedBytes - BytesOfA(x)) / kGemvStageBytes);
}

bool HasWholeVectors(const void* data, int64_t row_stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride % kVector == 0;
}

}  // namespace

bool IsGemv(const MatmulArgs& x) {
  return x.transpose_b && x.m <= kGemvMaxRows && (x.n >= kMinColumnsOfLongRows || x.k <= kMaxKOfFewColumns) &&
         x.dtype != DTypeTag::kFloat32 && x.k % kVector == 0 && HasWholeVectors(x.a, x.lda) && HasWholeVectors(x.b, x.ldb) &&
         NumStages(x) >= kMinStages;
}

void LaunchGemv(int32_t device_id, void* stream, const MatmulArgs& x) {
  const Kernel& kernel = KernelOf(x.dtype).Get(device_id, stream);
  GemvParams params{};
  params.a = x.a;
  params.lda = x.lda;
  params.b = x.b;
  params.ldb = x.ldb;
  params.c = x.c;
  params.ldc = x.ldc;
  params.out = x.out;
  params.ldo = x.ldo;
  params.m = static_cast<int32_t>(x.m);
  params.n = static_cast<int32_t>(x.n);
  params.k = static_cast<int32_t>(x.k);
  params.a_shared_bytes = static_cast<int32_t>(BytesOfA(x));
  params.num_stages = static_cast<int32_t>(NumStages(x));
  params.out_is_fp32 = x.out_dtype == DTypeTag::kFloat32;
  params.b_is_constant = x.b_is_constant;
  const int64_t groups = (x.n + kGemvGroupRows - 1) / kGemvGroupRows;
  void* arguments[] = {&params};
  LaunchKernel(kernel, static_cast<int32_t>(std::min<int64_t>(groups, GetDevice(device_id).num_sms)), stream, arguments);
}

}  // namespace tvm_infer::cuda
