// The pages that each KV head of each request reads next, by their scores, and the plan for lists of these lengths. A CTA for each list:
// the last of the best scores is found 8 bits at a time, from the top (a radix select: counts are sums of ones, so that it does not matter
// who adds first), then the pages at or above it are written in order. No host has a part in it, and every step of a captured graph makes
// its own lists.
#pragma once

#include <cstdint>

#include "tvm_infer/cuda/params.h"
#include "tvm_infer/ptx/sync.cuh"
#include "tvm_infer/schedule/page_budget.h"
#include "tvm_infer/schedule/plan.h"

namespace tvm_infer::kernels {

inline constexpr int32_t kSelectPagesThreads = 256;
inline constexpr int32_t kSelectPagesCtasPerSm = 4;
inline constexpr int32_t kSelectPagesHeld = 8192;  // scores that stay in shared memory, 131072 tokens in pages of 16; the L2 has the others

struct SelectPagesShared {
  uint32_t order[kSelectPagesHeld];          // ScoreOrder of the candidates
  int32_t counts[256];                       // candidates by digit
  int32_t digit;                             // of the last one that is taken
  int32_t rest;                              // of the candidates with that digit so many are taken
  int2 before[2][kSelectPagesThreads / 32];  // of each warp, in turns: candidates above the last one, candidates equal to it
};

// A request's pages.
struct RequestPages {
  const int32_t* pages;
  int32_t num_pages;
  int32_t list_len;  // keys in each of its lists
  bool is_refused;   // more pages than its table has, or than scores have room for: its lists are empty

  __device__ __forceinline__ RequestPages(const cuda::SelectPagesParams& p, int32_t request) {
    const int32_t kv_len = __ldcg(p.kv_len + request);
    const int32_t first = __ldcg(p.kv_page_indptr + request), end = __ldcg(p.kv_page_indptr + request + 1);
    pages = p.kv_page_indices + first;
    num_pages = p.budget.PagesOf(kv_len);
    is_refused = num_pages > end - first || (num_pages > p.budget.num_pages && num_pages > p.max_pages);
    list_len = is_refused ? 0 : p.budget.ListLen(kv_len);
  }
};

// Whether both plans are for lists of these requests and heads, and in their memory. By one thread of the grid it is said in the plan, if
// that is one. A `planned` whose magic is 0 says that this step selects nothing: the plan is another's then, and none of this kernel's
// business (a captured graph has this launch in every step).
//
// NOTE: the plan is read past the L1, here and below: lines of it in the L1 would be old when the attention behind this kernel, which may
// be on the SM already, reads the works that stand in them.
__device__ __forceinline__ bool AreForTheseLists(const cuda::SelectPagesParams& p) {
  const PlanHeader &planned = *PlanView(p.planned).header, &plan = *PlanView(p.plan).header;
  if (__ldcg(&planned.magic) == kNothingPlanned) return false;
  const auto is_plan = [&](const PlanHeader& x) {
    return __ldcg(&x.magic) == kPlanMagic && __ldcg(&x.version) == kPlanVersion && __ldcg(&x.bytes_used) <= p.plan_bytes;
  };
  const auto is_same = [&](const int32_t& x, const int32_t& y) { return __ldcg(&x) == __ldcg(&y); };
  const bool is_right = is_plan(planned) && is_plan(plan) && is_same(planned.bytes_used, plan.bytes_used) &&
                        is_same(planned.num_works, plan.num_works) && is_same(planned.num_kv_lists, plan.num_kv_lists) &&
                        __ldcg(&plan.num_kv_lists) == p.num_requests * p.num_kv_heads;
  if (!is_right && is_plan(plan) && blockIdx.x == 0 && threadIdx.x == 0) {
    int32_t* const tickets = reinterpret_cast<int32_t*>(static_cast<char*>(p.plan) + __ldcg(&plan.tickets_offset));
    tickets[kRefusalTicket] = kOtherLists;
  }
  return is_right;
}

// Where works end, and how long lists are, by a few CTAs of their own, of which this is number `cta`.
__device__ __forceinline__ void SetLengths(const cuda::SelectPagesParams& p, int32_t cta) {
  const PlanView planned(p.planned);
  const PlanHeader& header = *planned.header;
  const int32_t num_lists = p.num_requests * p.num_kv_heads;
  char* const plan = static_cast<char*>(p.plan);
  const auto set = [&](const Work* works, int32_t i) {
    const Work& from = works[i];
    if (from.num_rows == 0) return;  // a CTA without works
    const RequestPages request(p, from.kv_list / p.num_kv_heads);
    const Work work = WithListLen(from, request.list_len, planned.kv_len()[from.kv_list]);
    Work& to = *reinterpret_cast<Work*>(plan + (reinterpret_cast<const char*>(&from) - static_cast<const char*>(p.planned)));
    to.kv_end = work.kv_end;
    to.qo_pos_base = work.qo_pos_base;
  };
  for (int32_t i = cta * kSelectPagesThreads + threadIdx.x; i < header.num_ctas + header.num_works + num_lists;
       i += cuda::kSelectPagesPlanCtas * kSelectPagesThreads) {
    if (i < header.num_ctas) {
      set(planned.first_works(), i);
    } else if (i < header.num_ctas + header.num_works) {
      set(planned.works(), i - header.num_ctas);
    } else {
      const int32_t list = i - header.num_ctas - header.num_works;
      const RequestPages request(p, list / p.num_kv_heads);
      reinterpret_cast<int32_t*>(plan + header.kv_len_offset)[list] = request.list_len;
    }
  }
  if (cta != 0 || threadIdx.x >= 32) return;
  // What is said of this step: the plan is the same in all of them.
  bool is_refused = false;
  for (int32_t request = threadIdx.x; request < p.num_requests; request += 32) is_refused |= RequestPages(p, request).is_refused;
  is_refused = __any_sync(0xffffffff, is_refused);
  if (threadIdx.x == 0)
    reinterpret_cast<int32_t*>(plan + header.tickets_offset)[kRefusalTicket] = is_refused ? kTooManyPages : kPlanAccepted;
}

// Scores of a list's candidates, which stand between the sinks and the recent pages.
class Candidates {
 public:
  __device__ __forceinline__ Candidates(SelectPagesShared& shared, const float* scores, int32_t count)
      : shared_(shared), scores_(scores), count_(count) {
    for (int32_t i = threadIdx.x; i < min(count, kSelectPagesHeld); i += kSelectPagesThreads) {
      shared.order[i] = ScoreOrder(__ldcg(scores + i));
    }
  }
  __device__ __forceinline__ int32_t count() const { return count_; }
  // After a barrier.
  __device__ __forceinline__ uint32_t operator[](int32_t i) const {
    return i < kSelectPagesHeld ? shared_.order[i] : ScoreOrder(__ldcg(scores_ + i));
  }

 private:
  SelectPagesShared& shared_;
  const float* scores_;
  int32_t count_;
};

// The digit of the num_taken-th greatest, by the first warp: lane l has digits 255 - 8l and the seven below.
__device__ __forceinline__ void FindDigit(SelectPagesShared& shared, int32_t num_taken) {
  const int32_t lane = threadIdx.x, top = 255 - 8 * lane;
  int32_t own = 0;
  for (int32_t i = 0; i < 8; ++i) own += shared.counts[top - i];
  int32_t up_to = own;
  for (int32_t offset = 1; offset < 32; offset *= 2) {
    const int32_t other = __shfl_up_sync(0xffffffff, up_to, offset);
    if (lane >= offset) up_to += other;
  }
  int32_t above = up_to - own;
  if (above >= num_taken || up_to < num_taken) return;
  for (int32_t digit = top;; --digit) {
    if (above + shared.counts[digit] >= num_taken) {
      shared.digit = digit;
      shared.rest = num_taken - above;
      return;
    }
    above += shared.counts[digit];
  }
}

// ScoreOrder of the last candidate that is taken; `rest` of the candidates equal to it are.
struct LastTaken {
  uint32_t order = 0;
  int32_t rest;

  __device__ __forceinline__ LastTaken(SelectPagesShared& shared, const Candidates& candidates, int32_t num_taken) : rest(num_taken) {
    const int32_t lane = threadIdx.x % 32;
#pragma unroll 1
    for (int32_t shift = 24; shift >= 0; shift -= 8) {
      shared.counts[threadIdx.x] = 0;
      __syncthreads();
      for (int32_t first = 0; first < candidates.count(); first += kSelectPagesThreads) {
        const int32_t i = first + threadIdx.x;
        const uint32_t of = i < candidates.count() ? candidates[i] : 0;
        const bool counts = i < candidates.count() && (shift == 24 || of >> (shift + 8) == order >> (shift + 8));
        const uint32_t digit = of >> shift & 0xff;
        // NOTE: the first digit is the same of most scores: one addition for all lanes that have it.
        const uint32_t same = __match_any_sync(0xffffffff, counts ? digit : 256);
        if (counts && __ffs(same) - 1 == lane) atomicAdd(shared.counts + digit, __popc(same));
      }
      __syncthreads();
      if (threadIdx.x < 32) FindDigit(shared, rest);
      __syncthreads();
      order |= static_cast<uint32_t>(shared.digit) << shift;
      rest = shared.rest;
    }
  }
};

// Candidates that are taken, in their order; `pages` are theirs.
__device__ __forceinline__ void WriteTaken(SelectPagesShared& shared, const Candidates& candidates, const LastTaken& last,
                                           const int32_t* pages, int32_t* list) {
  constexpr int32_t kWarps = kSelectPagesThreads / 32;
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t above = 0, equal = 0, turn = 0;  // of the candidates before
#pragma unroll 1
  for (int32_t first = 0; first < candidates.count(); first += kSelectPagesThreads, turn ^= 1) {
    const int32_t i = first + threadIdx.x;
    const uint32_t of = i < candidates.count() ? candidates[i] : 0;
    const bool is_above = i < candidates.count() && of > last.order, is_equal = i < candidates.count() && of == last.order;
    const uint32_t warp_above = __ballot_sync(0xffffffff, is_above), warp_equal = __ballot_sync(0xffffffff, is_equal);
    if (lane == 0) shared.before[turn][warp] = make_int2(__popc(warp_above), __popc(warp_equal));
    __syncthreads();  // NOTE: one a turn: who writes the other entries next has read these before the next barrier
    const uint32_t lanes_before = (1u << lane) - 1;
    int32_t my_above = above + __popc(warp_above & lanes_before), my_equal = equal + __popc(warp_equal & lanes_before);
#pragma unroll
    for (int32_t w = 0; w < kWarps; ++w) {
      const int2 of_warp = shared.before[turn][w];
      if (w < warp) my_above += of_warp.x, my_equal += of_warp.y;
      above += of_warp.x;
      equal += of_warp.y;
    }
    if (is_above || (is_equal && my_equal < last.rest)) list[my_above + min(my_equal, last.rest)] = __ldcg(pages + i);
  }
}

__device__ __forceinline__ void SelectPages(const cuda::SelectPagesParams& p) {
  __shared__ SelectPagesShared shared;
  ptx::AllowDependentGrid();
  ptx::WaitForPriorGrid();  // everything may be the prior grid's, and the attention before this one reads the plan and the lists
  if (!AreForTheseLists(p)) return;
  const int32_t num_lists = p.num_requests * p.num_kv_heads;
  if (static_cast<int32_t>(blockIdx.x) >= num_lists) return SetLengths(p, blockIdx.x - num_lists);
  const int32_t request = blockIdx.x / p.num_kv_heads, head = blockIdx.x % p.num_kv_heads;
  const RequestPages of(p, request);
  if (of.is_refused) return;
  int32_t* const list = p.lists + int64_t{blockIdx.x} * p.budget.num_pages;
  const auto copy = [&](int32_t from, int32_t to, int32_t count) {
    for (int32_t i = threadIdx.x; i < count; i += kSelectPagesThreads) list[to + i] = __ldcg(of.pages + from + i);
  };
  if (of.num_pages <= p.budget.num_pages) return copy(0, 0, of.num_pages);
  copy(0, 0, p.budget.num_sink);
  copy(of.num_pages - p.budget.num_recent, p.budget.num_pages - p.budget.num_recent, p.budget.num_recent);
  if (p.budget.num_best() == 0) return;
  const float* const scores = p.scores + request * p.scores_stride_request + head * p.scores_stride_head + p.budget.num_sink;
  const Candidates candidates(shared, scores, of.num_pages - p.budget.num_sink - p.budget.num_recent);
  const LastTaken last(shared, candidates, p.budget.num_best());
  WriteTaken(shared, candidates, last, of.pages + p.budget.num_sink, list + p.budget.num_sink);
}

}  // namespace tvm_infer::kernels

// The grid is num_requests * num_kv_heads and cuda::kSelectPagesPlanCtas.
#define TVM_INFER_SELECT_PAGES(NAME)                                                                                               \
  extern "C" __global__ void __launch_bounds__(tvm_infer::kernels::kSelectPagesThreads, tvm_infer::kernels::kSelectPagesCtasPerSm) \
      NAME(const __grid_constant__ tvm_infer::cuda::SelectPagesParams params) {                                                    \
    tvm_infer::kernels::SelectPages(params);                                                                                       \
  }                                                                                                                                \
  extern "C" __device__ const tvm_infer::cuda::KernelInfo NAME##_info = {                                                          \
      tvm_infer::cuda::kKernelAbi, tvm_infer::kernels::kSelectPagesThreads, 0, tvm_infer::kernels::kSelectPagesCtasPerSm}
