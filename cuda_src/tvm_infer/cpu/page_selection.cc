#include "tvm_infer/cpu/page_selection.h"

#include <algorithm>
#include <vector>

#include "tvm_infer/cpu/kernels.h"
#include "tvm_infer/cpu/thread_pool.h"

namespace tvm_infer::cpu {
namespace {

// A unit is a request and one of its KV heads.
struct Unit {
  int32_t request, head;
  Unit(int64_t unit, int32_t num_kv_heads)
      : request(static_cast<int32_t>(unit / num_kv_heads)), head(static_cast<int32_t>(unit % num_kv_heads)) {}
};

template <typename Args>
void RunUnits(const Args& args, ThreadPool::Task task, int num_threads) {
  if (num_threads <= 0) num_threads = DefaultNumThreads();
  ThreadPool::Get().Run(num_threads, int64_t{args.num_requests} * args.num_kv_heads, task, const_cast<Args*>(&args));
}

char* BoundsOf(const PageBounds& bounds, int64_t page, int64_t side, int64_t head) {
  const int64_t elements = page * bounds.page_stride + side * bounds.side_stride + head * bounds.head_stride;
  return static_cast<char*>(bounds.data) + elements * (ElementBits(bounds.dtype) / 8);
}

void UpdateUnit(void* context, int64_t unit, ThreadScratch*) {
  const auto& args = *static_cast<const UpdatePageBoundsArgs*>(context);
  const Unit at(unit, args.num_kv_heads);
  const KVSource& cache = args.cache;
  const int32_t kv_len = args.kv_len[at.request], num_new = args.qo_indptr[at.request + 1] - args.qo_indptr[at.request];
  if (num_new == 0) return;
  const int64_t element = ElementBits(cache.dtype) / 8;
  const auto run = ChosenKernels().page_bounds[static_cast<int>(cache.dtype)][static_cast<int>(args.bounds.dtype)];
  for (int32_t i = (kv_len - num_new) / cache.page_size; i * int64_t{cache.page_size} < kv_len; ++i) {
    const int64_t page = cache.page_indices[cache.page_indptr[at.request] + i];
    run({args.head_dim, std::min(cache.page_size, kv_len - i * cache.page_size),
         static_cast<const char*>(cache.k) + (page * cache.k_page_stride + at.head * cache.k_head_stride) * element,
         cache.k_token_stride * element, BoundsOf(args.bounds, page, 0, at.head), BoundsOf(args.bounds, page, 1, at.head)});
  }
}

void ScoreUnit(void* context, int64_t unit, ThreadScratch* scratch) {
  const auto& args = *static_cast<const PageScoresArgs*>(context);
  const Unit at(unit, args.num_kv_heads);
  const int32_t num_pages = PageBudget{args.page_size, 0, 0, 0}.PagesOf(args.kv_len[at.request]);
  if (num_pages <= args.min_pages) return;
  const KernelTable& kernels = ChosenKernels();
  const int32_t group = args.num_qo_heads / args.num_kv_heads, type = static_cast<int>(args.dtype);
  auto* const queries = reinterpret_cast<float*>(scratch->tile.Reserve(sizeof(float) * 2 * kMaxHeadDim * group));
  for (int32_t g = 0; g < group; ++g) {
    const int64_t q = at.request * args.q_token_stride + (at.head * group + g) * args.q_head_stride;
    float* const above = queries + g * 2 * kMaxHeadDim;
    kernels.split_query[type](
        {args.head_dim, static_cast<const char*>(args.q) + q * (ElementBits(args.dtype) / 8), above, above + kMaxHeadDim});
  }
  float* const scores = args.scores + at.request * args.score_request_stride + at.head * args.score_head_stride;
  for (int32_t i = 0; i < num_pages; ++i) {
    const int64_t page = args.page_indices[args.page_indptr[at.request] + i];
    scores[i] = kernels.page_score[type](
        {args.head_dim, group, args.is_sum, queries, BoundsOf(args.bounds, page, 0, at.head), BoundsOf(args.bounds, page, 1, at.head)});
  }
}

// The pages that a list takes, as numbers in the request's table, ascending.
void Choose(const PageBudget& budget, int32_t num_pages, const float* scores, std::vector<int32_t>* chosen) {
  chosen->clear();
  const auto take = [&](int32_t begin, int32_t end) {
    for (int32_t i = begin; i < end; ++i) chosen->push_back(i);
  };
  if (num_pages <= budget.num_pages) return take(0, num_pages);
  take(0, num_pages - budget.num_recent);
  const auto best = chosen->begin() + budget.num_sink;
  const auto goes_first = [&](int32_t a, int32_t b) {
    const uint32_t of_a = ScoreOrder(scores[a]), of_b = ScoreOrder(scores[b]);
    return of_a != of_b ? of_a > of_b : a < b;
  };
  std::nth_element(best, best + budget.num_best(), chosen->end(), goes_first);
  std::sort(best, best + budget.num_best());
  chosen->resize(budget.num_sink + budget.num_best());
  take(num_pages - budget.num_recent, num_pages);
}

void SelectUnit(void* context, int64_t unit, ThreadScratch* scratch) {
  const auto& args = *static_cast<const SelectPagesArgs*>(context);
  const Unit at(unit, args.num_kv_heads);
  std::vector<int32_t>& chosen = scratch->tokens;
  Choose(args.budget, args.budget.PagesOf(args.kv_len[at.request]),
         args.scores + at.request * args.score_request_stride + at.head * args.score_head_stride, &chosen);
  const int32_t* const pages = args.page_indices + args.page_indptr[at.request];
  int32_t* const list = args.lists + unit * args.budget.num_pages;
  for (size_t i = 0; i < chosen.size(); ++i) list[i] = pages[chosen[i]];
}

// Lengths of the lists, and where works end.
void SetLengths(const SelectPagesArgs& args) {
  const PlanView planned(args.planned), plan(args.plan);
  const auto list_len = [&](int32_t list) { return args.budget.ListLen(args.kv_len[list / args.num_kv_heads]); };
  const auto set = [&](const Work* from, const Work* to, int32_t count) {
    for (int32_t i = 0; i < count; ++i) {
      if (from[i].num_rows == 0) continue;  // a CTA without works
      const int32_t list = from[i].kv_list;
      const_cast<Work*>(to)[i] = WithListLen(from[i], list_len(list), planned.kv_len()[list]);
    }
  };
  set(planned.first_works(), plan.first_works(), planned.header->num_ctas);
  set(planned.works(), plan.works(), planned.header->num_works);
  for (int32_t l = 0; l < planned.header->num_kv_lists; ++l) const_cast<int32_t*>(plan.kv_len())[l] = list_len(l);
}

}  // namespace

void UpdatePageBounds(const UpdatePageBoundsArgs& args, int num_threads) { RunUnits(args, UpdateUnit, num_threads); }

void PageScores(const PageScoresArgs& args, int num_threads) { RunUnits(args, ScoreUnit, num_threads); }

void SelectPages(const SelectPagesArgs& args, int num_threads) {
  RunUnits(args, SelectUnit, num_threads);
  SetLengths(args);
}

}  // namespace tvm_infer::cpu
