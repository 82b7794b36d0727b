// kernels/page_scores.cuh on the host (compiled with -include warp.h): random requests against double; NaN in all bounds and queries that
// nobody may read, and where a score is to be NaN. Prints how many batches it ran.
#include "tvm_infer/kernels/page_scores.cuh"

#include <algorithm>
#include <random>

TVM_INFER_PAGE_SCORES(page_scores_bf16, Bf16);

namespace {

using tvm_infer::cuda::PageScoresParams;

constexpr float kLeft = 12345;  // what was there before
std::mt19937 random_bits(3);
int32_t Random(int32_t low, int32_t high) { return low + static_cast<int32_t>(random_bits() % (high - low + 1)); }
float ToFloat(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

// A tensor of 16-bit elements on a 16-byte boundary, NaN.
struct Memory {
  std::vector<uint4> vectors;
  explicit Memory(int64_t elements) : vectors(static_cast<size_t>(elements) / 8 + 1, uint4{~0u, ~0u, ~0u, ~0u}) {}
  uint16_t* data() { return reinterpret_cast<uint16_t*>(vectors.data()); }
};

void RunCase(int32_t number) {
  PageScoresParams p{};
  p.num_requests = Random(1, 4);
  p.num_kv_heads = Random(1, 3);
  p.group_size = number % 3 ? Random(1, 8) : Random(9, 20);
  p.head_dim = 8 * Random(1, 32);
  p.page_size = Random(1, 20);
  p.is_sum = Random(0, 1);
  p.min_pages = number % 2 ? Random(0, 20) : 0;
  p.max_pages = 70;
  p.ctas_per_list = Random(1, 3);
  std::vector<int32_t> kv_len, indptr{0}, indices;
  for (int32_t r = 0; r < p.num_requests; ++r) {
    kv_len.push_back(Random(0, 60 * p.page_size));
    const bool is_refused = number % 10 == 9;  // one page too few
    indptr.push_back(indptr.back() + std::max(0, (kv_len[r] + p.page_size - 1) / p.page_size + (is_refused ? -1 : Random(0, 2))));
  }
  for (int32_t i = 0; i < indptr.back(); ++i) indices.push_back(i);
  std::shuffle(indices.begin(), indices.end(), random_bits);
  p.kv_len = kv_len.data();
  p.kv_page_indptr = indptr.data();
  p.kv_page_indices = indices.data();
  const int32_t q_heads = p.num_kv_heads * p.group_size;
  Memory q(int64_t{p.num_requests} * (q_heads + 1) * p.head_dim);
  p.q = q.data();
  p.q_stride_token = (q_heads + 1) * p.head_dim;
  p.q_stride_head = p.head_dim;
  const int64_t side = p.num_kv_heads * p.head_dim, page = 2 * side + 16;
  Memory bounds(page * std::max(1, indptr.back()));
  p.bounds = {bounds.data(), page, side, p.head_dim};
  const auto number_of = [&] { return static_cast<uint16_t>(tvm_infer::ptx::RoundToBf16(Random(-1000, 1000) * 0.01f)); };
  for (int32_t r = 0; r < p.num_requests; ++r) {
    for (int32_t i = 0; i < q_heads * p.head_dim; ++i) q.data()[r * p.q_stride_token + i] = number_of();
    for (int32_t i = 0; i < std::min((kv_len[r] + p.page_size - 1) / p.page_size, indptr[r + 1] - indptr[r]); ++i) {
      for (int64_t c = 0; c < side; ++c) {
        uint16_t least = number_of(), greatest = number_of();
        if (ToFloat(least) > ToFloat(greatest)) std::swap(least, greatest);
        bounds.data()[indices[indptr[r] + i] * page + c] = least;
        bounds.data()[indices[indptr[r] + i] * page + side + c] = greatest;
      }
      if (Random(0, 30) == 0) bounds.data()[indices[indptr[r] + i] * page + Random(0, static_cast<int32_t>(2 * side) - 1)] = 0x7fc0;
    }
  }
  std::vector<float> scores(static_cast<size_t>(p.num_requests) * p.num_kv_heads * p.max_pages, kLeft);
  p.scores = scores.data();
  p.scores_stride_request = p.num_kv_heads * p.max_pages;
  p.scores_stride_head = p.max_pages;
  emulated::Launch(p.num_requests * p.num_kv_heads * p.ctas_per_list, tvm_infer::kernels::kPageScoresThreads, [&] { page_scores_bf16(p); });
  for (int32_t r = 0; r < p.num_requests; ++r) {
    const int32_t num_pages = (kv_len[r] + p.page_size - 1) / p.page_size;
    const bool has_scores = num_pages > p.min_pages && num_pages <= indptr[r + 1] - indptr[r];
    for (int32_t h = 0; h < p.num_kv_heads; ++h) {
      for (int32_t i = 0; i < p.max_pages; ++i) {
        double expected = p.is_sum != 0 ? 0 : -INFINITY, size = 0;
        for (int32_t g = 0; g < p.group_size; ++g) {
          double score = 0;
          for (int32_t d = 0; has_scores && i < num_pages && d < p.head_dim; ++d) {
            const uint16_t* of = bounds.data() + indices[indptr[r] + i] * page + h * p.head_dim + d;
            const double x = ToFloat(q.data()[r * p.q_stride_token + (h * p.group_size + g) * p.head_dim + d]);
            const double a = x * ToFloat(of[0]), b = x * ToFloat(of[side]);
            score += a != a || b != b ? NAN : std::max(a, b);
            size += std::abs(a) + std::abs(b);
          }
          expected = score != score || expected != expected ? NAN : p.is_sum != 0 ? expected + score : std::max(expected, score);
        }
        const float got = scores[r * p.scores_stride_request + h * p.scores_stride_head + i];
        if (!has_scores || i >= num_pages) expected = kLeft;
        if (expected != expected ? got != got : std::abs(got - expected) <= size * 1e-6) continue;
        std::fprintf(stderr, "case %d: head_dim %d group %d: request %d head %d page %d of %d: %g instead of %g\n", number, p.head_dim,
                     p.group_size, r, h, i, num_pages, got, expected);
        emulated::Fail("the scores are not what the definition says");
      }
    }
  }
}

}  // namespace

int main() {
  constexpr int32_t kCases = 60;
  for (int32_t number = 0; number < kCases; ++number) RunCase(number);
  std::printf("%d\n", kCases);
}
