// kernels/page_bounds.cuh on the host (compiled with -include warp.h): random batches against the definition, all bounds compared. Prints
// how many batches it ran.
#include "tvm_infer/kernels/page_bounds.cuh"

#include "append_batch.h"

TVM_INFER_PAGE_BOUNDS(page_bounds_bf16, Bf16);
TVM_INFER_PAGE_BOUNDS_FLOAT8(page_bounds_bf16_e4m3, Bf16, E4m3);

namespace {

using append_batch::Batch;
using append_batch::MakeBatch;
using append_batch::Random;
using append_batch::random_bits;
using append_batch::SetLengths;
using tvm_infer::cuda::PageBoundsParams;

constexpr uint16_t kPoison = 0x7fff;  // NaN

float ToFloat(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

void RunCase(int32_t number) {
  const bool is_float8 = number % 4 == 3;
  const int32_t heads = Random(1, 5), head_dim = 8 * Random(1, number % 3 ? 8 : 32), page_size = Random(1, 20);
  const int32_t num_requests = number % 15 == 14 ? Random(129, 200) : Random(1, 24);
  const Batch batch = MakeBatch(num_requests, page_size, number % 2);
  const int32_t num_pages = batch.page_indptr.back();
  PageBoundsParams params{};
  tvm_infer::cuda::AppendParams& p = params.append;
  p.max_tokens = batch.qo_indptr.back();
  p.num_kv_heads = heads;
  p.head_dim = head_dim;
  p.page_size = page_size;
  const bool is_nhd = number % 5 == 0;
  p.k_cache_stride_page = 2 * heads * page_size * head_dim;
  p.k_cache_stride_head = is_nhd ? head_dim : page_size * head_dim;
  p.k_cache_stride_token = is_nhd ? heads * head_dim : head_dim;
  p.kv_page_indptr = batch.page_indptr.data();
  p.kv_page_indices = batch.page_indices.data();
  std::vector<uint4> plan;
  const int32_t spoiled = SetLengths(batch, number, &p, &plan);

  const int32_t bytes = is_float8 ? 1 : 2;
  std::vector<uint4> memory(static_cast<size_t>(p.k_cache_stride_page) * num_pages * bytes / 16 + 1);
  auto* const cache16 = reinterpret_cast<uint16_t*>(memory.data());
  auto* const cache8 = reinterpret_cast<uint8_t*>(memory.data());
  std::memset(memory.data(), 0x7f, memory.size() * sizeof(uint4));
  p.k_cache = memory.data();
  const int64_t row_elements = heads * head_dim, bounds_elements = (2 * row_elements + 8) * num_pages;  // a gap behind each page
  std::vector<uint4> bounds_memory(bounds_elements / 8 + 1), expected_memory;
  auto* const bounds = reinterpret_cast<uint16_t*>(bounds_memory.data());
  std::fill_n(bounds, bounds_elements, kPoison);
  params.bounds = {bounds, 2 * row_elements + 8, row_elements, head_dim};
  std::vector<uint16_t> expected(bounds, bounds + bounds_elements);
  for (int32_t r = 0; r < num_requests; ++r) {
    const int32_t num_new = batch.qo_indptr[r + 1] - batch.qo_indptr[r], first_new = batch.kv_len[r] - num_new;
    for (int32_t j = 0; j < batch.kv_len[r]; ++j) {
      const int64_t page = batch.page_indices[batch.page_indptr[r] + j / page_size];
      const bool is_touched = spoiled == 0 && num_new > 0 && j / page_size >= first_new / page_size;
      for (int32_t h = 0; h < heads; ++h) {
        for (int32_t d = 0; d < head_dim; ++d) {
          const int64_t at = page * p.k_cache_stride_page + h * p.k_cache_stride_head + j % page_size * p.k_cache_stride_token + d;
          uint16_t bits = static_cast<uint16_t>(random_bits());
          if (is_float8) {
            cache8[at] = static_cast<uint8_t>(bits);
            uint32_t low, high;
            tvm_infer::ptx::E4m3::ToHalves(cache8[at], low, high);
            bits = static_cast<uint16_t>(tvm_infer::ptx::RoundToBf16(tvm_infer::ptx::HalfToFloat(low & 0xffff)));
          } else {
            if (number % 7 != 0 && ToFloat(bits) != ToFloat(bits)) bits &= 0x3fff;
            cache16[at] = bits;
          }
          if (!is_touched) continue;
          for (int32_t side = 0; side < 2; ++side) {
            uint16_t& bound = expected[page * params.bounds.stride_page + side * row_elements + h * head_dim + d];
            const float x = ToFloat(bits), old = ToFloat(bound);
            const bool is_first = j % page_size == 0;
            if (is_first || x != x || (old == old && (side == 0 ? x < old : x > old))) bound = bits;
          }
        }
      }
    }
  }
  for (int32_t again = 0; again < 2; ++again) {
    emulated::Launch(Random(1, 4), tvm_infer::kernels::kPageBoundsThreads,
                     [&] { is_float8 ? page_bounds_bf16_e4m3(params) : page_bounds_bf16(params); });
    for (int64_t i = 0; i < bounds_elements; ++i) {
      const float x = ToFloat(bounds[i]), y = ToFloat(expected[i]);
      if (x == y || (x != x && y != y)) continue;
      std::fprintf(stderr, "case %d: heads %d head_dim %d page_size %d requests %d: %g instead of %g at %ld\n", number, heads, head_dim,
                   page_size, num_requests, x, y, static_cast<long>(i));
      emulated::Fail("the bounds are not what the definition says");
    }
  }
}

}  // namespace

int main() {
  constexpr int32_t kCases = 60;
  for (int32_t number = 0; number < kCases; ++number) RunCase(number);
  std::printf("%d\n", kCases);
}
