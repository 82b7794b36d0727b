#include "tvm_infer/cuda/move_tokens.h"

#include <algorithm>

#include "tvm_infer/cuda/driver.h"
#include "tvm_infer/cuda/kernels.h"

namespace tvm_infer::cuda {

void LaunchMoveTokens(int32_t device_id, void* stream, const MoveTokensParams& params) {
  if (params.num_moves == 0) return;
  static auto* const cached = new CachedKernel("move_tokens");
  const Kernel& kernel = cached->Get(device_id, stream);
  const int64_t columns = int64_t{params.num_layers} * params.num_planes * (params.row_bytes / 16);
  const int64_t ctas = (columns + kernel.info.threads - 1) / kernel.info.threads;
  const int64_t grid = std::min<int64_t>(ctas, GetDevice(device_id).num_sms * kernel.info.ctas_per_sm);
  void* args[] = {const_cast<MoveTokensParams*>(&params)};
  LaunchKernel(kernel, static_cast<int32_t>(grid), stream, args);
}

}  // namespace tvm_infer::cuda
