// New tokens' keys and values to the pages of their requests: a copy with a lookup, or a conversion to 8 bits (kv_cells.cuh). Long appends
// are bound by bandwidth; short ones by the chain of dependent loads plan -> request -> page, beside which the copied rows are loaded.
#pragma once

#include <cstdint>

#include "tvm_infer/attention/plan_check.cuh"
#include "tvm_infer/cuda/params.h"
#include "tvm_infer/kernels/kv_cells.cuh"
#include "tvm_infer/ptx/sync.cuh"
#include "tvm_infer/schedule/plan.h"

namespace tvm_infer::kernels {

inline constexpr int32_t kAppendThreads = 256;
inline constexpr int32_t kAppendCtasPerSm = 3;        // 80 registers, 96 KiB in flight on an SM
inline constexpr int32_t kAppendFloat8CtasPerSm = 2;  // 80 registers spill
inline constexpr uint32_t kAppendLoads = 8;  // 16-byte vectors that a lane has in flight: K and V of a token, 8 heads of 128, are 8 a lane

// Where requests begin and end, and how many there are: none where the plan is refused.
struct AppendLengths {
  const int32_t* qo_indptr;  // [num_requests + 1]
  const int32_t* kv_len;     // [num_requests]
  int32_t num_requests;
  bool is_refused;
};

// By a whole warp.
__device__ __forceinline__ AppendLengths LoadLengths(const cuda::AppendParams& p) {
  if (p.plan == nullptr) return {p.qo_indptr, p.kv_len, p.num_requests, false};
  const PlanView plan(p.plan);
  // The attention kernel of the same call checks too, and says why it refused. How many CTAs that one has is its own business.
  const attention::PlanCheck check(plan, p.expected, INT32_MAX);
  const auto* base = static_cast<const char*>(p.plan);
  const AppendLengths lengths = {reinterpret_cast<const int32_t*>(base + plan.header->qo_indptr_offset),
                                 reinterpret_cast<const int32_t*>(base + plan.header->kv_len_offset), plan.header->num_requests, false};
  const bool is_refused = __any_sync(0xffffffff, check.Stops(-1));
  return {lengths.qo_indptr, lengths.kv_len, is_refused ? 0 : lengths.num_requests, is_refused};
}

// The request that `token` belongs to: how many of qo_indptr[1 … num_requests] are <= token; num_requests for padding. By a whole warp,
// 128 entries a trip to memory: one trip for 128 requests, two for 16,512. Of other things that requests have in order, `begin_of(r,
// qo_indptr[r])` is the first of request r's; the last one's end is begin_of(num_requests, …).
template <typename BeginOf>
__device__ __forceinline__ int32_t RequestOf(const AppendLengths& lengths, int32_t token, const BeginOf& begin_of) {
  constexpr int32_t kProbes = 4;
  const int32_t lane = threadIdx.x % 32;
  int32_t low = 0, open = lengths.num_requests;  // the answer is in [low, low + open]
  while (open > 0) {
    const int32_t stride = (open + 32 * kProbes - 1) / (32 * kProbes);
    int32_t entries[kProbes], passed = 0;
#pragma unroll
    for (int32_t i = 0; i < kProbes; ++i) {
      const int32_t request = low + min((32 * i + lane + 1) * stride, open);
      entries[i] = begin_of(request, __ldg(lengths.qo_indptr + request));
    }
#pragma unroll
    for (int32_t i = 0; i < kProbes; ++i) passed += __popc(__ballot_sync(0xffffffff, entries[i] <= token));
    const int32_t step = min(passed * stride, open);
    low += step;
    open = min(stride, open - step) - 1;  // -1 where every entry passed
  }
  return low;
}
__device__ __forceinline__ int32_t RequestOf(const AppendLengths& lengths, int32_t token) {
  return RequestOf(lengths, token, [](int32_t, int32_t first_token) { return first_token; });
}

// A request's lengths and pages, kept while a warp walks its tokens.
struct AppendRequest {
  int32_t end = 0;  // its last token, exclusive
  int32_t kv_len = 0;
  int32_t first_page = 0;  // its entries of kv_page_indices
  int32_t end_page = 0;

  __device__ __forceinline__ void Load(const cuda::AppendParams& p, const AppendLengths& lengths, int32_t request) {
    end = __ldg(lengths.qo_indptr + request + 1);
    kv_len = __ldg(lengths.kv_len + request);
    first_page = __ldg(p.kv_page_indptr + request);
    end_page = __ldg(p.kv_page_indptr + request + 1);
  }
};

// Where a head's keys or values of a token lie in the cache.
template <typename Cells>
__device__ __forceinline__ char* CachedRow(const cuda::AppendParams& p, bool is_v, int64_t head, int64_t page, int64_t slot) {
  const int64_t elements = page * (is_v ? p.v_cache_stride_page : p.k_cache_stride_page) +
                           head * (is_v ? p.v_cache_stride_head : p.k_cache_stride_head) +
                           slot * (is_v ? p.v_cache_stride_token : p.k_cache_stride_token);
  return static_cast<char*>(is_v ? p.v_cache : p.k_cache) + elements * Cells::kElementBytes;
}
// What they are multiplied by when they are read; 1 where nothing is.
template <typename Cells>
__device__ __forceinline__ float CachedScale(const cuda::AppendParams& p, bool is_v, int64_t head) {
  if constexpr (Cells::kElementBytes == 2) return 1.f;
  const float* scales = is_v ? p.v_scales : p.k_scales;
  return scales == nullptr ? (is_v ? p.v_scale : p.k_scale) : __ldg(scales + head);
}

// A lane's vectors of a token: every 32nd of its rows, the K heads' and then the V heads'.
struct AppendVector {
  uint32_t row, column;  // column in vectors

  __device__ __forceinline__ static uint32_t TokenVectors(const cuda::AppendParams& p, uint32_t row_vectors) {
    return 2 * p.num_kv_heads * row_vectors;
  }
  __device__ __forceinline__ static uint32_t OutputVectors(const cuda::AppendParams& p) { return p.head_dim / 8; }
  AppendVector() = default;
  __device__ __forceinline__ AppendVector(uint32_t index, uint32_t row_vectors) : row(index / row_vectors), column(index % row_vectors) {}
  __device__ __forceinline__ void Advance(uint32_t row_vectors, uint32_t step_rows, uint32_t step_columns) {
    row += step_rows;
    column += step_columns;
    if (column >= row_vectors) column -= row_vectors, ++row;
  }
  __device__ __forceinline__ const uint4* From(const cuda::AppendParams& p, int64_t token) const {
    const bool is_v = static_cast<int32_t>(row) >= p.num_kv_heads;
    const int64_t head = is_v ? row - p.num_kv_heads : row;
    const uint16_t* from = static_cast<const uint16_t*>(is_v ? p.v : p.k) + token * (is_v ? p.v_stride_token : p.k_stride_token) +
                           head * (is_v ? p.v_stride_head : p.k_stride_head);
    return reinterpret_cast<const uint4*>(from) + column;
  }
  template <typename Cells>
  __device__ __forceinline__ void Store(const cuda::AppendParams& p, int64_t page, int64_t slot, const uint4& value) const {
    const bool is_v = static_cast<int32_t>(row) >= p.num_kv_heads;
    const int64_t head = is_v ? row - p.num_kv_heads : row;
    char* row_begin = CachedRow<Cells>(p, is_v, head, page, slot);
    reinterpret_cast<typename Cells::Vector*>(row_begin)[column] = Cells(CachedScale<Cells>(p, is_v, head)).Convert(value);
  }
};

// The same where keys are wider than values.
template <int kHeadDim, int kHeadDimVo>
struct UnequalVector {
  static constexpr uint32_t kKeyVectors = kHeadDim / 8, kValueVectors = kHeadDimVo / 8;
  uint32_t index;

  __device__ __forceinline__ static uint32_t TokenVectors(const cuda::AppendParams& p, uint32_t) {
    return p.num_kv_heads * (kKeyVectors + kValueVectors);
  }
  __device__ __forceinline__ static uint32_t OutputVectors(const cuda::AppendParams&) { return kValueVectors; }
  __device__ __forceinline__ UnequalVector(uint32_t first, uint32_t) : index(first) {}
  __device__ __forceinline__ void Advance(uint32_t, uint32_t, uint32_t) { index += 32; }
  __device__ __forceinline__ AppendVector InRow(const cuda::AppendParams& p) const {
    const uint32_t first_value = p.num_kv_heads * kKeyVectors;
    AppendVector vector;
    if (index < first_value) {
      vector.row = index / kKeyVectors;
      vector.column = index % kKeyVectors;
    } else {
      vector.row = p.num_kv_heads + (index - first_value) / kValueVectors;
      vector.column = (index - first_value) % kValueVectors;
    }
    return vector;
  }
  __device__ __forceinline__ const uint4* From(const cuda::AppendParams& p, int64_t token) const { return InRow(p).From(p, token); }
  template <typename Cells>
  __device__ __forceinline__ void Store(const cuda::AppendParams& p, int64_t page, int64_t slot, const uint4& value) const {
    InRow(p).template Store<Cells>(p, page, slot, value);
  }
};

// The output rows of a padding token.
template <typename Vector>
__device__ __forceinline__ void ZeroOutput(const cuda::AppendParams& p, int64_t token) {
  const uint32_t row_vectors = Vector::OutputVectors(p), token_vectors = p.num_qo_heads * row_vectors;
  auto* o = static_cast<uint16_t*>(p.o) + token * p.o_stride_token;
  for (uint32_t i = threadIdx.x % 32; i < token_vectors; i += 32) {
    reinterpret_cast<uint4*>(o + i / row_vectors * p.o_stride_head)[i % row_vectors] = uint4{0, 0, 0, 0};
  }
}

// A task is a token's K and V, or a part of them where there are more warps than tokens. Each warp takes a run of tasks, so that it looks
// for a request only where the run begins and where a request ends.
template <typename Cells, typename Vector>
__device__ __forceinline__ void Append(const cuda::AppendParams& p) {
  ptx::AllowDependentGrid();
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t warp = blockIdx.x * (kAppendThreads / 32) + threadIdx.x / 32, num_warps = gridDim.x * (kAppendThreads / 32);
  const uint32_t row_vectors = p.head_dim / 8, step_rows = 32 / row_vectors, step_columns = 32 % row_vectors;
  const uint32_t token_vectors = Vector::TokenVectors(p, row_vectors);
  const uint32_t token_loads = (token_vectors + 31) / 32;  // of a warp; max_tokens of these are below 2^31: cuda/append.cc
  const uint32_t loads = min(kAppendLoads, (p.max_tokens * token_loads + num_warps - 1) / num_warps);
  const uint32_t parts = (token_loads + loads - 1) / loads;  // tasks of a token
  const uint32_t num_tasks = p.max_tokens * parts;
  const uint32_t run = num_tasks / num_warps, rest = num_tasks % num_warps;
  const uint32_t first_task = warp * run + min(warp, rest), end_task = first_task + run + (warp < rest);
  int32_t token = first_task / parts;
  uint32_t part = first_task % parts;

  // Lengths, k and v may be the prior grid's, and the cache may still be read by it. Lengths that are ready are read meanwhile.
  if (p.plan_is_ready == 0) ptx::WaitForPriorGrid();
  const AppendLengths lengths = LoadLengths(p);
  AppendRequest request;
  bool is_padding = false;
  const auto find_request = [&] {
    if (is_padding || token < request.end) return;
    const int32_t index = RequestOf(lengths, token);
    is_padding = index >= lengths.num_requests;  // as are all tokens behind
    if (!is_padding) request.Load(p, lengths, index);
  };
  if (p.plan_is_ready != 0) {
    if (first_task < end_task) find_request();
    ptx::WaitForPriorGrid();
  }
  for (uint32_t task = first_task; task < end_task; ++task) {
    const uint32_t first = part * loads * 32 + lane, end = min(token_vectors, (part + 1) * loads * 32);
    uint4 values[kAppendLoads];
    Vector vector(first, row_vectors);
#pragma unroll
    for (uint32_t i = 0; i < kAppendLoads; ++i) {
      if (first + 32 * i < end) values[i] = __ldcg(vector.From(p, token));
      vector.Advance(row_vectors, step_rows, step_columns);
    }
    find_request();
    if (is_padding) {
      if (p.o == nullptr || lengths.is_refused) return;
      for (; task < end_task; ++task) {
        if (part == 0) ZeroOutput<Vector>(p, token);
        if (++part == parts) part = 0, ++token;
      }
      return;
    }
    const int32_t position = request.kv_len - (request.end - token);
    const int32_t page_entry = request.first_page + position / p.page_size;
    // A token before its request's first position or behind its last page goes nowhere, rather than to another request's page.
    if (position >= 0 && page_entry < request.end_page) {
      const int64_t page = __ldg(p.kv_page_indices + page_entry), slot = position % p.page_size;
      vector = Vector(first, row_vectors);
#pragma unroll
      for (uint32_t i = 0; i < kAppendLoads; ++i) {
        if (first + 32 * i < end) vector.template Store<Cells>(p, page, slot, values[i]);
        vector.Advance(row_vectors, step_rows, step_columns);
      }
    }
    if (++part == parts) part = 0, ++token;
  }
}

}  // namespace tvm_infer::kernels

// A kernel by name; the last arguments are the cache's cells and a lane's vectors. Rows of k, v and the cache start on 16-byte boundaries
// (the bindings check that).
#define TVM_INFER_APPEND_CELLS(NAME, CTAS_PER_SM, ...)                                                                                    \
  extern "C" __global__ void __launch_bounds__(tvm_infer::kernels::kAppendThreads, CTAS_PER_SM)                                           \
      NAME(const __grid_constant__ tvm_infer::cuda::AppendParams params) {                                                                \
    tvm_infer::kernels::Append<__VA_ARGS__>(params);                                                                                      \
  }                                                                                                                                       \
  extern "C" __device__ const tvm_infer::cuda::KernelInfo NAME##_info = {tvm_infer::cuda::kKernelAbi, tvm_infer::kernels::kAppendThreads, \
                                                                         0, CTAS_PER_SM}

// The cache's elements are the new ones', of 16 bits.
#define TVM_INFER_APPEND(NAME, ELEMENT)                                                  \
  static_assert(sizeof(ELEMENT) == 2, "append.cuh copies 16-bit elements, 8 at a time"); \
  TVM_INFER_APPEND_CELLS(NAME, tvm_infer::kernels::kAppendCtasPerSm, tvm_infer::kernels::CopiedCells, tvm_infer::kernels::AppendVector)

// The same where keys are wider than values.
#define TVM_INFER_APPEND_VO(NAME, HEAD_DIM, HEAD_DIM_VO)                                              \
  TVM_INFER_APPEND_CELLS(NAME, tvm_infer::kernels::kAppendCtasPerSm, tvm_infer::kernels::CopiedCells, \
                         tvm_infer::kernels::UnequalVector<HEAD_DIM, HEAD_DIM_VO>)

// ELEMENT is Bf16 or Fp16, FLOAT8 E4m3 or E5m2.
#define TVM_INFER_APPEND_FLOAT8(NAME, ELEMENT, FLOAT8)                                                        \
  TVM_INFER_APPEND_CELLS(NAME, tvm_infer::kernels::kAppendFloat8CtasPerSm,                                    \
                         tvm_infer::kernels::QuantisedCells<tvm_infer::ptx::ELEMENT, tvm_infer::ptx::FLOAT8>, \
                         tvm_infer::kernels::AppendVector)
