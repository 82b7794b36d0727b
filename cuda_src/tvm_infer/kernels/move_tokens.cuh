// Tokens of a cache that go to other slots, in every layer: the accepted nodes of a token tree close up before the others are popped. Few
// and rare, a launch's latency and no more.
#pragma once

#include <cstdint>

#include "tvm_infer/cuda/params.h"
#include "tvm_infer/ptx/sync.cuh"

namespace tvm_infer::kernels {

inline constexpr int32_t kMoveTokensThreads = 256;
inline constexpr int32_t kMoveTokensCtasPerSm = 4;

// NOTE: a thread has 16 bytes of every token of one plane, and makes all its moves one after the other: a slot may be read by one move and
// written by a later one.
__device__ __forceinline__ void MoveTokens(const cuda::MoveTokensParams& p) {
  ptx::AllowDependentGrid();
  ptx::WaitForPriorGrid();  // which may have written the tokens
  const int32_t row_vectors = p.row_bytes / 16;
  const int64_t num_columns = int64_t{p.num_layers} * p.num_planes * row_vectors;
  const int64_t step = int64_t{gridDim.x} * kMoveTokensThreads;
  for (int64_t column = int64_t{blockIdx.x} * kMoveTokensThreads + threadIdx.x; column < num_columns; column += step) {
    const int64_t plane = column / row_vectors;
    char* base = static_cast<char*>(p.pages) + plane / p.num_planes * p.layer_bytes + plane % p.num_planes * p.plane_bytes +
                 column % row_vectors * 16;
    for (int32_t i = 0; i < p.num_moves; ++i) {
      const cuda::MoveTokensParams::Move& move = p.moves[i];
      const auto* from = reinterpret_cast<const uint4*>(base + move.src_page * p.page_bytes + move.src_slot * p.row_bytes);
      *reinterpret_cast<uint4*>(base + move.dst_page * p.page_bytes + move.dst_slot * p.row_bytes) = __ldcg(from);
    }
  }
}

}  // namespace tvm_infer::kernels

#define TVM_INFER_MOVE_TOKENS(NAME)                                                                                              \
  extern "C" __global__ void __launch_bounds__(tvm_infer::kernels::kMoveTokensThreads, tvm_infer::kernels::kMoveTokensCtasPerSm) \
      NAME(const __grid_constant__ tvm_infer::cuda::MoveTokensParams params) {                                                   \
    tvm_infer::kernels::MoveTokens(params);                                                                                      \
  }                                                                                                                              \
  extern "C" __device__ const tvm_infer::cuda::KernelInfo NAME##_info = {                                                        \
      tvm_infer::cuda::kKernelAbi, tvm_infer::kernels::kMoveTokensThreads, 0, tvm_infer::kernels::kMoveTokensCtasPerSm}
