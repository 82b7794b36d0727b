// A few rows times a large matrix that lies transposed, [m, k] x [n, k]^T for m <= 8: a decode step's projections. All that counts is that
// the matrix is read once and that reading never stops.
//
// A CTA takes 16 rows of the matrix at a time, a stage is 512 columns of them. One warp copies stages to a ring in shared memory, which
// keeps up to 200 KiB of reads in flight on an SM whatever the others do. Where the matrix is constant it begins before the kernel ahead
// has ended: memory stays busy across the small kernels between two products.
//
// Eight warps share the columns of a stage and multiply on tensor cores, where one row of `a` costs as much as eight do. The order of sums
// depends on k alone: neither m nor the grid changes a bit of a row's result.
//
// NOTE: fetching the first rows of the next product to the L2 from here made a step of an 8B model slower (docs/kernels.md).
#pragma once

#include <cstdint>

#include "tvm_infer/cuda/params.h"
#include "tvm_infer/ptx/address.cuh"
#include "tvm_infer/ptx/bulk.cuh"
#include "tvm_infer/ptx/element.cuh"
#include "tvm_infer/ptx/load_store.cuh"
#include "tvm_infer/ptx/mbarrier.cuh"
#include "tvm_infer/ptx/mma.cuh"
#include "tvm_infer/ptx/sync.cuh"

namespace tvm_infer::kernels {

inline constexpr uint32_t kGemvWarps = 8;  // that multiply; one more copies
inline constexpr int32_t kGemvThreads = 32 * (kGemvWarps + 1);
inline constexpr uint32_t kGemvRows = cuda::kGemvGroupRows;       // of the matrix in a stage: those of a tensor core's operand
inline constexpr uint32_t kGemvStageK = 512;                      // columns in a stage: 1 KiB of each row at a time
inline constexpr uint32_t kGemvWarpK = kGemvStageK / kGemvWarps;  // of these a warp's
inline constexpr uint32_t kGemvRowBytes = kGemvStageK * 2;        // of a stage
inline constexpr uint32_t kGemvStageBytes = kGemvRows * kGemvRowBytes;
inline constexpr uint32_t kGemvMaxStages = 16;
inline constexpr int kGemvBarrier = 1;  // of the warps that multiply

// Fixed head of shared memory; behind it `a`, then the ring.
struct GemvShared {
  float partial[2][kGemvWarps][cuda::kGemvMaxRows][kGemvRows];  // two groups' sums, so that one barrier a group is enough
  uint64_t full[kGemvMaxStages], empty[kGemvMaxStages];
};
static_assert(sizeof(GemvShared) == cuda::kGemvFixedSharedBytes);
static_assert(kGemvStageBytes == cuda::kGemvStageBytes);

// A position in the ring, whose number of stages the launch decides.
struct GemvCursor {
  uint32_t stage = 0, parity = 0;
  __device__ __forceinline__ void Advance(uint32_t num_stages) {
    if (++stage == num_stages) stage = 0, parity ^= 1;
  }
};

// The copying warp: lane l copies row l of each stage.
__device__ __forceinline__ void GemvProduce(const cuda::GemvParams& p, GemvShared& shared, uint32_t ring, uint32_t lane) {
  const uint32_t row_bytes = static_cast<uint32_t>(p.k) * 2;
  const uint32_t num_groups = (p.n + kGemvRows - 1) / kGemvRows;
  if (!p.b_is_constant) ptx::WaitForPriorGrid();
  GemvCursor at;
  for (uint32_t group = blockIdx.x; group < num_groups; group += gridDim.x) {
    const uint32_t rows = min(kGemvRows, p.n - group * kGemvRows);
    const char* from = static_cast<const char*>(p.b) + (int64_t{group} * kGemvRows + lane) * p.ldb * 2;
    for (uint32_t begin = 0; begin < row_bytes; begin += kGemvRowBytes) {
      const uint32_t bytes = min(kGemvRowBytes, row_bytes - begin);
      const uint32_t full = ptx::SharedAddress(&shared.full[at.stage]);
      ptx::MbarrierWait(ptx::SharedAddress(&shared.empty[at.stage]), at.parity ^ 1);
      if (lane == 0) ptx::MbarrierArriveExpectTx(full, rows * bytes);
      if (lane < rows) ptx::BulkLoad(ring + at.stage * kGemvStageBytes + lane * kGemvRowBytes, from + begin, bytes, full, ptx::kEvictFirst);
      at.Advance(p.num_stages);
    }
  }
}

template <typename Element>
__device__ __forceinline__ void GemvStore(const cuda::GemvParams& p, int64_t row, int64_t column, float sum) {
  if (p.out_is_fp32) {
    if (p.c != nullptr) sum += static_cast<const float*>(p.c)[row * p.ldc + column];
    static_cast<float*>(p.out)[row * p.ldo + column] = sum;
    return;
  }
  if (p.c != nullptr) sum += ptx::Unpack<Element>(static_cast<const uint16_t*>(p.c)[row * p.ldc + column]).x;
  static_cast<uint16_t*>(p.out)[row * p.ldo + column] = static_cast<uint16_t>(ptx::Pack<Element>(sum, 0.0f));
}

// A warp's share of a stage: c[16 rows of the matrix, 8 rows of a] += . Lane 4 g + t holds 16 bytes of rows g and g + 8 of the matrix and
// of row g of a, 8 columns that begin at 8 t of 32. Which column is called which does not matter to a sum, as long as both sides agree: so
// the four words of 16 bytes serve as the operands of two mma, and no ldmatrix is needed.
template <typename Element>
__device__ __forceinline__ void GemvMultiply(const cuda::GemvParams& p, uint32_t stage, uint32_t a_row, uint32_t first_k, bool has_row,
                                             float (&c)[2][4]) {
  const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t warp_k = threadIdx.x / 32 * kGemvWarpK;
#pragma unroll
  for (uint32_t step = 0; step < kGemvWarpK / 32; ++step) {
    const uint32_t stage_k = warp_k + 32 * step + 8 * t, k = first_k + stage_k;
    const uint32_t address = stage + g * kGemvRowBytes + stage_k * 2;
    uint4 x = ptx::LoadShared16(address), y = ptx::LoadShared16(address + 8 * kGemvRowBytes), v = make_uint4(0, 0, 0, 0);
    const bool is_inside = k < static_cast<uint32_t>(p.k);  // k is a multiple of 8; what lies behind in the stage may be any bits
    if (!is_inside) x = y = v;
    if (is_inside && has_row) v = ptx::LoadShared16(a_row + k * 2);
    const uint32_t low[4] = {x.x, y.x, x.y, y.y}, high[4] = {x.z, y.z, x.w, y.w};
    ptx::Mma16x8x16<Element>(c[0], low, v.x, v.y);
    ptx::Mma16x8x16<Element>(c[1], high, v.z, v.w);
  }
}

template <typename Element>
__device__ __forceinline__ void GemvConsume(const cuda::GemvParams& p, GemvShared& shared, uint32_t a_shared, uint32_t ring) {
  const uint32_t thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const uint32_t num_groups = (p.n + kGemvRows - 1) / kGemvRows;
  const uint32_t vectors = p.k / 8;
  ptx::WaitForPriorGrid();  // a and c may be the prior grid's, and out may still be read by it
  for (uint32_t row = 0; row < static_cast<uint32_t>(p.m); ++row) {
    const uint4* from = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.a) + row * p.lda);
    for (uint32_t i = thread; i < vectors; i += 32 * kGemvWarps) ptx::StoreShared16(a_shared + (row * vectors + i) * 16, __ldcg(from + i));
  }
  ptx::BarrierSync(kGemvBarrier, 32 * kGemvWarps);

  const uint32_t a_row = a_shared + g * vectors * 16;
  const bool has_row = g < static_cast<uint32_t>(p.m);
  GemvCursor at;
  uint32_t buffer = 0;
  for (uint32_t group = blockIdx.x; group < num_groups; group += gridDim.x, buffer ^= 1) {
    float c[2][4] = {};
    for (uint32_t first_k = 0; first_k < static_cast<uint32_t>(p.k); first_k += kGemvStageK) {
      ptx::MbarrierWait(ptx::SharedAddress(&shared.full[at.stage]), at.parity);
      GemvMultiply<Element>(p, ring + at.stage * kGemvStageBytes, a_row, first_k, has_row, c);
      __syncwarp();
      if (lane == 0) ptx::MbarrierArrive(ptx::SharedAddress(&shared.empty[at.stage]));
      at.Advance(p.num_stages);
    }
    float(&sums)[cuda::kGemvMaxRows][kGemvRows] = shared.partial[buffer][warp];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) sums[2 * t + i % 2][g + i / 2 * 8] = c[0][i] + c[1][i];
    ptx::BarrierSync(kGemvBarrier, 32 * kGemvWarps);
    const uint32_t column = group * kGemvRows + thread % kGemvRows, row = thread / kGemvRows;
    if (row < static_cast<uint32_t>(p.m) && column < static_cast<uint32_t>(p.n)) {
      float sum = 0.0f;
#pragma unroll
      for (uint32_t i = 0; i < kGemvWarps; ++i) sum += shared.partial[buffer][i][row][thread % kGemvRows];
      GemvStore<Element>(p, row, column, sum);
    }
  }
}

template <typename Element>
__device__ __forceinline__ void Gemv(const cuda::GemvParams& p) {
  extern __shared__ __align__(128) uint8_t memory[];
  GemvShared& shared = *reinterpret_cast<GemvShared*>(memory);
  const uint32_t a_shared = ptx::SharedAddress(memory) + sizeof(GemvShared);
  const uint32_t ring = a_shared + p.a_shared_bytes;
  ptx::AllowDependentGrid();
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < static_cast<uint32_t>(p.num_stages); ++i) {
      ptx::MbarrierInit(ptx::SharedAddress(&shared.full[i]), 1);
      ptx::MbarrierInit(ptx::SharedAddress(&shared.empty[i]), kGemvWarps);
    }
    ptx::MbarrierInitFence();
  }
  __syncthreads();
  if (threadIdx.x / 32 == kGemvWarps) {
    GemvProduce(p, shared, ring, threadIdx.x % 32);
  } else {
    GemvConsume<Element>(p, shared, a_shared, ring);
  }
}

}  // namespace tvm_infer::kernels

// A kernel by name; ELEMENT is Bf16 or Fp16. cuda/gemv.cc says for which products, and sizes the shared memory.
#define TVM_INFER_GEMV(NAME, ELEMENT)                                                                                                   \
  extern "C" __global__ void __launch_bounds__(tvm_infer::kernels::kGemvThreads, 1)                                                     \
      NAME(const __grid_constant__ tvm_infer::cuda::GemvParams params) {                                                                \
    tvm_infer::kernels::Gemv<tvm_infer::ptx::ELEMENT>(params);                                                                          \
  }                                                                                                                                     \
  extern "C" __device__ const tvm_infer::cuda::KernelInfo NAME##_info = {tvm_infer::cuda::kKernelAbi, tvm_infer::kernels::kGemvThreads, \
                                                                         tvm_infer::cuda::kGemvSharedBytes, 1}
