// Bounds of the pages that new tokens went to: of each channel the least and the greatest element over all keys of the page, exactly. From
// the stored keys and whole, so that the result depends on nothing that was there before, and no two warps write one page; a decode step
// reads a page of keys for each request and KV head, half a per cent of what its attention reads at 4096 keys.
#pragma once

#include <cstdint>

#include "tvm_infer/cuda/params.h"
#include "tvm_infer/kernels/append.cuh"
#include "tvm_infer/ptx/element.cuh"
#include "tvm_infer/ptx/float8.cuh"
#include "tvm_infer/ptx/sync.cuh"

namespace tvm_infer::kernels {

inline constexpr int32_t kPageBoundsThreads = 256;
inline constexpr int32_t kPageBoundsCtasPerSm = 4;
inline constexpr int32_t kPageBoundsLoads = 4;  // vectors that a lane has in flight: pages of 16 keys, head_dim 128, are 8 a lane

// Cached keys, eight elements as four pairs of Compared.
template <typename Element>
struct PlainKeys {
  using Compared = Element;
  using Vector = uint4;
  static constexpr int64_t kElementBytes = 2;
  __device__ __forceinline__ static uint4 Pairs(const Vector& x) { return x; }
};
// Of 8 bits, which float16 holds.
template <typename Float8>
struct Float8Keys {
  using Compared = ptx::Fp16;
  using Vector = uint2;
  static constexpr int64_t kElementBytes = 1;
  __device__ __forceinline__ static uint4 Pairs(const Vector& x) {
    uint4 pairs;
    Float8::ToHalves(x.x, pairs.x, pairs.y);
    Float8::ToHalves(x.y, pairs.z, pairs.w);
    return pairs;
  }
};

// A lane's eight channels.
template <typename Keys>
struct ChannelBounds {
  using Compared = typename Keys::Compared;
  static constexpr uint32_t kInfinity = Compared::kIsBf16 ? 0x7f807f80u : 0x7c007c00u;
  uint32_t least[4] = {kInfinity, kInfinity, kInfinity, kInfinity};
  uint32_t greatest[4] = {kInfinity | 0x80008000u, kInfinity | 0x80008000u, kInfinity | 0x80008000u, kInfinity | 0x80008000u};

  __device__ __forceinline__ void Add(const uint4& pairs) {
    const uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      least[i] = ptx::PairMin<Compared>(least[i], words[i]);
      greatest[i] = ptx::PairMax<Compared>(greatest[i], words[i]);
    }
  }
  // With the lanes that hold the same channels, every `lanes`th.
  __device__ __forceinline__ void Merge(int32_t lanes) {
    for (int32_t offset = lanes; offset < 32; offset *= 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        least[i] = ptx::PairMin<Compared>(least[i], __shfl_xor_sync(0xffffffff, least[i], offset));
        greatest[i] = ptx::PairMax<Compared>(greatest[i], __shfl_xor_sync(0xffffffff, greatest[i], offset));
      }
    }
  }
};

// Pairs of the type that they were compared in as pairs of the bounds' type.
template <typename Element, typename Compared>
__device__ __forceinline__ uint4 AsElements(const uint32_t (&pairs)[4]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = pairs[i];
    if constexpr (Element::kIsBf16 != Compared::kIsBf16) {
      const float2 x = ptx::Unpack<Compared>(pairs[i]);
      words[i] = ptx::Pack<Element>(x.x, x.y);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Keys 0 … num_keys - 1 of a page and head, by a warp.
template <typename Element, typename Keys>
__device__ __forceinline__ void BoundPage(const cuda::PageBoundsParams& p, int64_t page, int64_t head, int32_t num_keys) {
  using Vector = typename Keys::Vector;
  const int32_t lane = threadIdx.x % 32, row_vectors = p.append.head_dim / 8;
  int32_t row_lanes = 1;  // a power of 2
  while (row_lanes < row_vectors) row_lanes *= 2;
  const int32_t column = lane % row_lanes, step = 32 / row_lanes;
  const int64_t keys = page * p.append.k_cache_stride_page + head * p.append.k_cache_stride_head;
  const char* const base = static_cast<const char*>(p.append.k_cache) + (keys + 8 * column) * Keys::kElementBytes;
  const int64_t stride = p.append.k_cache_stride_token * Keys::kElementBytes;
  ChannelBounds<Keys> bounds;
  const int32_t end = column < row_vectors ? num_keys : 0;
  for (int32_t first = lane / row_lanes; first < end; first += kPageBoundsLoads * step) {
    Vector values[kPageBoundsLoads];
#pragma unroll
    for (int32_t i = 0; i < kPageBoundsLoads; ++i) {  // behind the last key that key again
      values[i] = __ldcg(reinterpret_cast<const Vector*>(base + min(first + i * step, end - 1) * stride));
    }
#pragma unroll
    for (int32_t i = 0; i < kPageBoundsLoads; ++i) bounds.Add(Keys::Pairs(values[i]));
  }
  bounds.Merge(row_lanes);
  if (lane >= row_vectors) return;
  uint16_t* const to = static_cast<uint16_t*>(p.bounds.data) + page * p.bounds.stride_page + head * p.bounds.stride_head + 8 * lane;
  *reinterpret_cast<uint4*>(to) = AsElements<Element, typename Keys::Compared>(bounds.least);
  *reinterpret_cast<uint4*>(to + p.bounds.stride_side) = AsElements<Element, typename Keys::Compared>(bounds.greatest);
}

// A request with n new tokens has n / page_size + 2 slots, in order, of which its pages take the first: so many are enough wherever in a
// page the tokens begin. A task is a slot and a KV head.
template <typename Element, typename Keys>
__device__ __forceinline__ void UpdatePageBounds(const cuda::PageBoundsParams& p) {
  ptx::AllowDependentGrid();
  ptx::WaitForPriorGrid();  // the keys, and perhaps the lengths, are the prior grid's
  const cuda::AppendParams& a = p.append;
  const AppendLengths lengths = LoadLengths(a);
  if (lengths.num_requests == 0) return;
  const auto begin_of = [&](int32_t request, int32_t first_token) { return first_token / a.page_size + 2 * request; };
  const int64_t num_slots = begin_of(lengths.num_requests, __ldg(lengths.qo_indptr + lengths.num_requests));
  const int64_t warp = blockIdx.x * (kPageBoundsThreads / 32) + threadIdx.x / 32, num_warps = gridDim.x * (kPageBoundsThreads / 32);
  for (int64_t task = warp; task < num_slots * a.num_kv_heads; task += num_warps) {
    const auto slot = static_cast<int32_t>(task / a.num_kv_heads);
    const int32_t request = RequestOf(lengths, slot, begin_of);
    if (request >= lengths.num_requests) continue;
    const int32_t begin = __ldg(lengths.qo_indptr + request), end = __ldg(lengths.qo_indptr + request + 1);
    const int32_t kv_len = __ldg(lengths.kv_len + request);
    if (begin == end) continue;
    // As in Append: tokens before a request's first position go nowhere.
    const int32_t position = kv_len < end - begin ? 0 : kv_len - (end - begin);
    const int32_t index = position / a.page_size + slot - begin_of(request, begin);
    const int32_t num_keys = min(a.page_size, kv_len - index * a.page_size);
    const int32_t entry = __ldg(a.kv_page_indptr + request) + index;
    if (num_keys <= 0 || entry >= __ldg(a.kv_page_indptr + request + 1)) continue;
    BoundPage<Element, Keys>(p, __ldg(a.kv_page_indices + entry), task % a.num_kv_heads, num_keys);
  }
}

}  // namespace tvm_infer::kernels

// A kernel by name; the last argument is what the cache's keys are.
#define TVM_INFER_PAGE_BOUNDS_OF(NAME, ELEMENT, ...)                                                                             \
  extern "C" __global__ void __launch_bounds__(tvm_infer::kernels::kPageBoundsThreads, tvm_infer::kernels::kPageBoundsCtasPerSm) \
      NAME(const __grid_constant__ tvm_infer::cuda::PageBoundsParams params) {                                                   \
    tvm_infer::kernels::UpdatePageBounds<tvm_infer::ptx::ELEMENT, __VA_ARGS__>(params);                                          \
  }                                                                                                                              \
  extern "C" __device__ const tvm_infer::cuda::KernelInfo NAME##_info = {                                                        \
      tvm_infer::cuda::kKernelAbi, tvm_infer::kernels::kPageBoundsThreads, 0, tvm_infer::kernels::kPageBoundsCtasPerSm}

// ELEMENT is Bf16 or Fp16, of the bounds and of the keys.
#define TVM_INFER_PAGE_BOUNDS(NAME, ELEMENT) TVM_INFER_PAGE_BOUNDS_OF(NAME, ELEMENT, tvm_infer::kernels::PlainKeys<tvm_infer::ptx::ELEMENT>)
// Keys of 8 bits, E4m3 or E5m2.
#define TVM_INFER_PAGE_BOUNDS_FLOAT8(NAME, ELEMENT, FLOAT8) \
  TVM_INFER_PAGE_BOUNDS_OF(NAME, ELEMENT, tvm_infer::kernels::Float8Keys<tvm_infer::ptx::FLOAT8>)
