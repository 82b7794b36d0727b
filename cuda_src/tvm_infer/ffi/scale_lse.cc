#include "tvm_infer/ffi/scale_lse.h"

#include <cmath>
#include <limits>

#include "tvm_infer/cuda/scale_lse.h"
#include "tvm_infer/ffi/common.h"
#include "tvm_infer/ffi/cuda_scope.h"

namespace tvm_infer::ffi_api {
namespace {

void ScaleOnHost(const cuda::ScaleLseParams& p, double factor) {
  for (int64_t row = 0; row < p.num_rows; ++row) {
    for (int64_t head = 0; head < p.num_heads; ++head) {
      float& value = p.lse[row * p.stride_row + head * p.stride_head];
      value = static_cast<float>(value * factor);
    }
  }
}

}  // namespace

void ScaleLse(TensorView lse, double factor) {
  Guarded([&] {
    const Place place = PlaceOf(lse, "lse");
    CheckRank(lse, "lse", 2, "[num_rows, num_heads]");
    CheckDType(lse, "lse", DLDataType{kDLFloat, 32, 1}, "an LSE is float32");
    if (!std::isfinite(factor) || factor <= 0) {
      TVM_INFER_THROW(ArgumentError) << "argument `factor` is " << factor << "; it must be finite and above 0";
    }
    constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
    if (lse.size(0) > kMax || lse.size(1) > kMax) {
      TVM_INFER_THROW(ArgumentError) << "argument `lse` has shape " << ShapeString(lse) << "; rows and heads must be below 2^31";
    }
    if (lse.numel() == 0) return;
    cuda::ScaleLseParams params{};
    params.lse = DataPtr<float>(lse);
    params.stride_row = Stride(lse, 0);
    params.stride_head = Stride(lse, 1);
    params.num_rows = static_cast<int32_t>(lse.size(0));
    params.num_heads = static_cast<int32_t>(lse.size(1));
    params.factor = static_cast<float>(factor);
    if (!place.is_cuda()) return ScaleOnHost(params, factor);
    const CudaScope scope(place.device);
    cuda::LaunchScaleLse(scope.device_id(), scope.stream(), params);
  });
}

}  // namespace tvm_infer::ffi_api
