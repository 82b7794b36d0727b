// What the logits of a page's keys can be, at most (Quest, arXiv 2406.10774): sum over channels of max(q * least, q * greatest). As that is
// max(q, 0) * greatest + min(q, 0) * least, the pages' scores are a matrix product: bounds [pages, 2 * head_dim] by the two parts of the
// queries [2 * head_dim, heads]. Bound by reading the bounds, a sixteenth of the bytes that pages of 16 tokens hold.
//
// A warp takes 16 pages. Its operands come straight from memory, 16 bytes a lane: the channels of a product may stand in any order that is
// the same on both sides.
#pragma once

#include <cstdint>

#include "tvm_infer/cuda/params.h"
#include "tvm_infer/ptx/element.cuh"
#include "tvm_infer/ptx/mma.cuh"
#include "tvm_infer/ptx/sync.cuh"

namespace tvm_infer::kernels {

inline constexpr int32_t kPageScoresThreads = 128;
inline constexpr int32_t kPageScoresCtasPerSm = 4;  // 128 registers; 128 KiB in flight on an SM
inline constexpr int32_t kPageScoresWarpPages = 16;
inline constexpr int32_t kPageScoresBatch = 4;  // times 32 channels of both bounds that a warp has in flight

// Four lanes share a row, 8 of each 32 channels a lane; zeros behind the last channel.
__device__ __forceinline__ uint4 LoadChannels(const uint16_t* row, int32_t vector, int32_t row_vectors) {
  if (vector >= row_vectors) return make_uint4(0, 0, 0, 0);
  return __ldcg(reinterpret_cast<const uint4*>(row) + vector);
}

// c += 32 channels of pages g and g + 8 by those of head g, of which kIsAbove the part above 0 counts, else that below.
template <typename Element, bool kIsAbove>
__device__ __forceinline__ void MultiplyChannels(float (&c)[4], const uint4& page, const uint4& page8, const uint4& query) {
  const auto part = [](uint32_t pair) { return kIsAbove ? ptx::PairMax<Element>(pair, 0) : ptx::PairMin<Element>(pair, 0); };
  const uint32_t first[4] = {page.x, page8.x, page.y, page8.y}, second[4] = {page.z, page8.z, page.w, page8.w};
  ptx::Mma16x8x16<Element>(c, first, part(query.x), part(query.y));
  ptx::Mma16x8x16<Element>(c, second, part(query.z), part(query.w));
}

// Scores of pages g and g + 8, in all four lanes of a row.
template <typename Element>
__device__ __forceinline__ float2 ScorePages(const cuda::PageScoresParams& p, const uint16_t* page, const uint16_t* page8,
                                             const uint16_t* queries) {
  const int32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int32_t row_vectors = p.head_dim / 8;
  const float nothing = p.is_sum != 0 ? 0.f : -__builtin_inff();
  float best[2] = {nothing, nothing};
  const auto add = [&](float& to, float score) { to = p.is_sum != 0 ? to + score : ptx::MaxNan(to, score); };
  // NOTE: groups of more than 8 heads read the bounds again, from the L2.
#pragma unroll 1
  for (int32_t first_head = 0; first_head < p.group_size; first_head += 8) {
    // Heads behind the last repeat it, and are left out below.
    const uint16_t* const query = queries + min(first_head + g, p.group_size - 1) * p.q_stride_head;
    float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
    for (int32_t first = t; first < row_vectors + t; first += 4 * kPageScoresBatch) {
      uint4 least[kPageScoresBatch][2], greatest[kPageScoresBatch][2];
#pragma unroll
      for (int32_t i = 0; i < kPageScoresBatch; ++i) {
        least[i][0] = LoadChannels(page, first + 4 * i, row_vectors);
        least[i][1] = LoadChannels(page8, first + 4 * i, row_vectors);
        greatest[i][0] = LoadChannels(page + p.bounds.stride_side, first + 4 * i, row_vectors);
        greatest[i][1] = LoadChannels(page8 + p.bounds.stride_side, first + 4 * i, row_vectors);
      }
#pragma unroll
      for (int32_t i = 0; i < kPageScoresBatch; ++i) {
        const uint4 channels = LoadChannels(query, first + 4 * i, row_vectors);
        MultiplyChannels<Element, false>(c, least[i][0], least[i][1], channels);
        MultiplyChannels<Element, true>(c, greatest[i][0], greatest[i][1], channels);
      }
    }
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) {
      if (first_head + 2 * t + i >= p.group_size) continue;
      add(best[0], c[i]);
      add(best[1], c[2 + i]);
    }
  }
#pragma unroll
  for (int32_t offset = 1; offset < 4; offset *= 2) {
    add(best[0], __shfl_xor_sync(0xffffffff, best[0], offset));
    add(best[1], __shfl_xor_sync(0xffffffff, best[1], offset));
  }
  return make_float2(best[0], best[1]);
}

// ctas_per_list CTAs share the pages of a request and KV head, a warp 16 at a time.
template <typename Element>
__device__ __forceinline__ void PageScores(const cuda::PageScoresParams& p) {
  ptx::AllowDependentGrid();
  ptx::WaitForPriorGrid();  // everything may be the prior grid's
  const int32_t list = blockIdx.x / p.ctas_per_list, request = list / p.num_kv_heads, head = list % p.num_kv_heads;
  const int32_t first_entry = __ldg(p.kv_page_indptr + request), end_entry = __ldg(p.kv_page_indptr + request + 1);
  const int32_t num_pages = PageBudget{p.page_size, 0, 0, 0}.PagesOf(__ldg(p.kv_len + request));
  if (num_pages <= p.min_pages || num_pages > min(p.max_pages, end_entry - first_entry)) return;  // the latter select_pages reports
  const uint16_t* const queries =
      static_cast<const uint16_t*>(p.q) + request * p.q_stride_token + head * int64_t{p.group_size} * p.q_stride_head;
  const uint16_t* const bounds = static_cast<const uint16_t*>(p.bounds.data) + head * p.bounds.stride_head;
  float* const scores = p.scores + request * p.scores_stride_request + head * p.scores_stride_head;
  constexpr int32_t kWarps = kPageScoresThreads / 32;
  const int32_t warp = blockIdx.x % p.ctas_per_list * kWarps + threadIdx.x / 32;
  const int32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int32_t first = warp * kPageScoresWarpPages; first < num_pages; first += p.ctas_per_list * kWarps * kPageScoresWarpPages) {
    const auto bounds_of = [&](int32_t index) {  // behind the last page that page again
      return bounds + __ldg(p.kv_page_indices + first_entry + min(index, num_pages - 1)) * p.bounds.stride_page;
    };
    const float2 of = ScorePages<Element>(p, bounds_of(first + g), bounds_of(first + g + 8), queries);
    if (t < 2 && first + g + 8 * t < num_pages) scores[first + g + 8 * t] = t == 0 ? of.x : of.y;
  }
}

}  // namespace tvm_infer::kernels

// ELEMENT is Bf16 or Fp16, of queries and bounds. The grid is num_requests * num_kv_heads * ctas_per_list.
#define TVM_INFER_PAGE_SCORES(NAME, ELEMENT)                                                                                     \
  extern "C" __global__ void __launch_bounds__(tvm_infer::kernels::kPageScoresThreads, tvm_infer::kernels::kPageScoresCtasPerSm) \
      NAME(const __grid_constant__ tvm_infer::cuda::PageScoresParams params) {                                                   \
    tvm_infer::kernels::PageScores<tvm_infer::ptx::ELEMENT>(params);                                                             \
  }                                                                                                                              \
  extern "C" __device__ const tvm_infer::cuda::KernelInfo NAME##_info = {                                                        \
      tvm_infer::cuda::kKernelAbi, tvm_infer::kernels::kPageScoresThreads, 0, tvm_infer::kernels::kPageScoresCtasPerSm}
