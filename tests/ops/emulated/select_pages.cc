// kernels/select_pages.cuh on the host (compiled with -include warp.h): random requests, scores with ties, NaN and zeros of both signs,
// against a sort; and the plan's works. Prints how many batches it ran.
#include "tvm_infer/kernels/select_pages.cuh"

#include <algorithm>
#include <numeric>
#include <random>

TVM_INFER_SELECT_PAGES(select_pages);

namespace {

using tvm_infer::PlanHeader;
using tvm_infer::PlanView;
using tvm_infer::Work;
using tvm_infer::cuda::SelectPagesParams;

constexpr int32_t kLeft = -77;  // what was there before
std::mt19937 random_bits(4);
int32_t Random(int32_t low, int32_t high) { return low + static_cast<int32_t>(random_bits() % (high - low + 1)); }

// A plan for full lists, each in pieces, laid around the CTAs, of which the last has none.
std::vector<uint4> MakePlan(const SelectPagesParams& p, int32_t num_ctas) {
  const int32_t num_lists = p.num_requests * p.num_kv_heads, length = p.budget.num_pages * p.budget.page_size;
  std::vector<Work> works;
  for (int32_t l = 0; l < num_lists; ++l) {
    for (int32_t begin = 0; begin < length;) {
      const int32_t end = std::min(length, begin + Random(1, length));
      Work work{};
      work.num_rows = 4;
      work.kv_list = l;
      work.kv_begin = begin;
      work.kv_end = end;
      work.qo_pos_base = length - 1;
      works.push_back(work);
      begin = end;
    }
  }
  PlanHeader header{};
  header.magic = tvm_infer::kPlanMagic;
  header.version = tvm_infer::kPlanVersion;
  header.num_ctas = num_ctas;
  header.num_kv_lists = num_lists;
  header.num_works = static_cast<int32_t>(works.size());
  int32_t bytes = sizeof(PlanHeader) + num_ctas * sizeof(Work);
  const auto place = [&](int32_t size) {
    const int32_t at = bytes;
    bytes += (size + 15) / 16 * 16;
    return at;
  };
  header.works_offset = place(static_cast<int32_t>(works.size() * sizeof(Work)));
  header.kv_len_offset = place(num_lists * 4);
  header.tickets_offset = place(16);
  header.bytes_used = bytes;
  std::vector<uint4> plan(bytes / 16);
  auto* const base = reinterpret_cast<char*>(plan.data());
  std::memcpy(base, &header, sizeof(header));
  for (int32_t c = 0; c + 1 < num_ctas; ++c) std::memcpy(base + sizeof(header) + c * sizeof(Work), &works[c % works.size()], sizeof(Work));
  std::memcpy(base + header.works_offset, works.data(), works.size() * sizeof(Work));
  for (int32_t l = 0; l < num_lists; ++l) std::memcpy(base + header.kv_len_offset + 4 * l, &length, 4);
  return plan;
}

float RandomScore(int32_t kind) {
  switch (kind) {
    case 0:
      return static_cast<float>(Random(-3, 3));  // ties
    case 1:
      return Random(0, 20) == 0 ? (Random(0, 1) ? NAN : -NAN) : Random(0, 1) ? 0.f : -0.f;
    case 2:
      return static_cast<float>(Random(-1'000'000, 1'000'000)) * 1e-3f;
    default:
      return 100.f + static_cast<float>(Random(0, 1 << 20)) * 1e-4f;  // one first digit
  }
}

void Check(bool is_right, int32_t number, const char* what) {
  if (is_right) return;
  std::fprintf(stderr, "case %d: %s\n", number, what);
  emulated::Fail("the lists are not what the definition says");
}

void RunCase(int32_t number) {
  SelectPagesParams p{};
  p.num_requests = Random(1, 4);
  p.num_kv_heads = Random(1, 3);
  p.budget = {Random(1, 20), 0, Random(0, 4), Random(1, 4)};
  p.budget.num_pages = p.budget.num_sink + p.budget.num_recent + Random(0, 40);
  const bool is_long = number % 20 == 19;  // more scores than shared memory holds
  p.max_pages = is_long ? 9000 : 1000;
  std::vector<int32_t> kv_len, indptr{0}, indices;
  std::vector<bool> refused;
  for (int32_t r = 0; r < p.num_requests; ++r) {
    const int32_t most = is_long ? 9000 : number % 4 ? 100 : 1000;
    int32_t num_pages = Random(0, most);
    if (is_long && r == 0) num_pages = Random(8300, 9000);
    refused.push_back(number % 10 == 5 && r == 0);
    if (refused[r] && number % 20 == 5) num_pages = p.max_pages + 1;
    kv_len.push_back(num_pages == 0 ? 0 : num_pages * p.budget.page_size - Random(0, p.budget.page_size - 1));
    indptr.push_back(indptr.back() + std::max(0, num_pages + (refused[r] && number % 20 == 15 ? -1 : Random(0, 2))));
    refused[r] = num_pages > indptr[r + 1] - indptr[r] || (num_pages > p.max_pages && num_pages > p.budget.num_pages);
  }
  for (int32_t i = 0; i < indptr.back(); ++i) indices.push_back(i);
  std::shuffle(indices.begin(), indices.end(), random_bits);
  p.kv_len = kv_len.data();
  p.kv_page_indptr = indptr.data();
  p.kv_page_indices = indices.data();
  const int32_t num_lists = p.num_requests * p.num_kv_heads;
  std::vector<float> scores(static_cast<size_t>(num_lists) * p.max_pages);
  for (float& score : scores) score = RandomScore(number % 4);
  p.scores = scores.data();
  p.scores_stride_request = p.num_kv_heads * p.max_pages;
  p.scores_stride_head = p.max_pages;
  std::vector<int32_t> lists(num_lists * p.budget.num_pages, kLeft);
  p.lists = lists.data();
  const int32_t num_ctas = Random(1, 6);
  std::vector<uint4> planned = MakePlan(p, num_ctas);
  std::vector<uint4> plan = planned;
  p.planned = planned.data();
  p.plan = plan.data();
  p.plan_bytes = static_cast<int64_t>(plan.size() * 16);
  const bool is_other = number % 15 == 7;
  if (is_other) --const_cast<PlanHeader*>(PlanView(p.plan).header)->num_kv_lists;
  const bool is_nothing = number % 15 == 8;  // this step selects nothing, and the plan is another's
  if (is_nothing) reinterpret_cast<PlanHeader*>(planned.data())->magic = tvm_infer::kNothingPlanned;
  const std::vector<uint4> as_it_was = plan;
  // Twice: a step's ends are not those that the next one begins with.
  const std::vector<int32_t> lengths = kv_len;
  for (int32_t& length : kv_len) length = length / 2;
  emulated::Launch(num_lists + tvm_infer::cuda::kSelectPagesPlanCtas, tvm_infer::kernels::kSelectPagesThreads, [&] { select_pages(p); });
  kv_len = lengths;
  std::fill(lists.begin(), lists.end(), kLeft);
  emulated::Launch(num_lists + tvm_infer::cuda::kSelectPagesPlanCtas, tvm_infer::kernels::kSelectPagesThreads, [&] { select_pages(p); });

  const PlanView of(p.plan), before(p.planned);
  if (is_nothing) {
    Check(std::memcmp(plan.data(), as_it_was.data(), plan.size() * 16) == 0, number, "nothing is selected, and yet the plan is written");
    Check(std::all_of(lists.begin(), lists.end(), [](int32_t page) { return page == kLeft; }), number, "nothing selected, but lists");
    return;
  }
  if (is_other) {
    Check(of.tickets()[0] == tvm_infer::kOtherLists, number, "a plan for other lists is not refused");
    Check(std::all_of(lists.begin(), lists.end(), [](int32_t page) { return page == kLeft; }), number, "refused, and yet there are lists");
    return;
  }
  const bool any_refused = std::find(refused.begin(), refused.end(), true) != refused.end();
  Check(of.tickets()[0] == (any_refused ? tvm_infer::kTooManyPages : 0), number, "the plan does not say whether a request was refused");
  std::vector<int32_t> list_len(num_lists);
  for (int32_t l = 0; l < num_lists; ++l) {
    const int32_t r = l / p.num_kv_heads, num_pages = (kv_len[r] + p.budget.page_size - 1) / p.budget.page_size;
    std::vector<int32_t> expected;
    const float* score = scores.data() + static_cast<size_t>(l) * p.max_pages;
    if (num_pages <= p.budget.num_pages) {
      for (int32_t i = 0; i < num_pages; ++i) expected.push_back(i);
    } else if (!refused[r]) {
      std::vector<int32_t> between(num_pages - p.budget.num_sink - p.budget.num_recent);
      std::iota(between.begin(), between.end(), p.budget.num_sink);
      std::stable_sort(between.begin(), between.end(), [&](int32_t a, int32_t b) {
        const double x = score[a], y = score[b];
        return x != x ? y == y : x > y;
      });
      between.resize(p.budget.num_pages - p.budget.num_sink - p.budget.num_recent);
      for (int32_t i = 0; i < p.budget.num_sink; ++i) between.push_back(i);
      for (int32_t i = num_pages - p.budget.num_recent; i < num_pages; ++i) between.push_back(i);
      std::sort(between.begin(), between.end());
      expected = between;
    }
    if (refused[r]) expected.clear();
    const auto taken = static_cast<int32_t>(expected.size());
    list_len[l] = refused[r] ? 0 : kv_len[r] - (num_pages - taken) * p.budget.page_size;
    for (int32_t i = 0; i < p.budget.num_pages; ++i) {
      const int32_t page = i < taken ? indices[indptr[r] + expected[i]] : kLeft;
      Check(lists[l * p.budget.num_pages + i] == page, number, "another page");
    }
    Check(of.kv_len()[l] == list_len[l], number, "another length of a list");
  }
  const auto check_works = [&](const Work* works, const Work* full, int32_t count) {
    for (int32_t i = 0; i < count; ++i) {
      Work expected = full[i];
      if (expected.num_rows != 0) {
        const int32_t length = list_len[expected.kv_list];
        expected.kv_end = std::max(expected.kv_begin, std::min(expected.kv_end, length));
        expected.qo_pos_base = length - 1;
      }
      Check(std::memcmp(&expected, works + i, sizeof(Work)) == 0, number, "another work");
    }
  };
  check_works(of.works(), before.works(), of.header->num_works);
  check_works(of.first_works(), before.first_works(), num_ctas);
}

}  // namespace

int main() {
  constexpr int32_t kCases = 80;
  for (int32_t number = 0; number < kCases; ++number) RunCase(number);
  std::printf("%d\n", kCases);
}
