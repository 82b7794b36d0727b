// kernels/append.cuh on the host (compiled with -include warp.h): random batches against the definition, whole caches compared. Prints how
// many batches it ran.
#include "tvm_infer/kernels/append.cuh"

#include "append_batch.h"
#include "float8.h"

TVM_INFER_APPEND(append_b16, uint16_t);
TVM_INFER_APPEND_FLOAT8(append_bf16_e4m3, Bf16, E4m3);
TVM_INFER_APPEND_VO(append_b16_h192_v128, 192, 128);

namespace {

using append_batch::AppendParams;
using append_batch::Batch;
using append_batch::MakeBatch;
using append_batch::Random;
using append_batch::random_bits;
using append_batch::SetLengths;

// The same call into a cache of 8 bits, whose elements are x / scale. `spoiled`: nothing is appended.
void RunFloat8(int32_t number, const Batch& batch, AppendParams p, int32_t spoiled, uint32_t grid) {
  const int64_t plane = static_cast<int64_t>(p.num_kv_heads) * p.page_size * p.head_dim, elements = 2 * plane * batch.page_indptr.back();
  std::vector<uint4> memory(elements / 16 + 1), expected_memory(elements / 16 + 1);
  auto *cache = reinterpret_cast<uint8_t*>(memory.data()), *expected = reinterpret_cast<uint8_t*>(expected_memory.data());
  std::memset(cache, 0x7f, elements);
  std::memset(expected, 0x7f, elements);
  p.k_cache = cache;
  p.v_cache = cache + plane;
  std::vector<float> k_scales, v_scales;
  for (int32_t h = 0; h < p.num_kv_heads; ++h) {
    k_scales.push_back(static_cast<float>(std::exp(Random(-700, 300) / 100.0)));
    v_scales.push_back(static_cast<float>(std::exp(Random(-700, 300) / 100.0)));
    // The quotient of one element lies between two codes, where the last bit of a float decides.
    const uint16_t bits = static_cast<const uint16_t*>(p.v)[h * p.head_dim] & 0x7fff;
    if (bits > 0x3000 && bits < 0x5000)
      v_scales[h] = __uint_as_float(static_cast<uint32_t>(bits) << 16) / static_cast<float>(2 * Random(8, 15) + 1);
  }
  p.k_scale = k_scales[0];
  p.v_scale = v_scales[0];
  if (number % 4 > 1) p.k_scales = k_scales.data();
  if (number % 4) p.v_scales = v_scales.data();
  const auto quantise = [&](const void* from, int64_t at, float scale, uint8_t* to) {
    for (int32_t d = 0; d < p.head_dim; ++d)
      to[d] = float8::Nearest(__uint_as_float(static_cast<uint32_t>(static_cast<const uint16_t*>(from)[at + d]) << 16) / scale);
  };
  for (size_t r = 0; spoiled == 0 && r < batch.kv_len.size(); ++r) {
    for (int32_t t = batch.qo_indptr[r]; t < batch.qo_indptr[r + 1]; ++t) {
      const int32_t position = batch.kv_len[r] - (batch.qo_indptr[r + 1] - t);
      const int64_t page = batch.page_indices[batch.page_indptr[r] + position / p.page_size];
      for (int32_t h = 0; h < p.num_kv_heads; ++h) {
        const int64_t to = page * p.k_cache_stride_page + h * p.k_cache_stride_head + position % p.page_size * p.k_cache_stride_token;
        const int64_t from = t * p.k_stride_token + h * p.head_dim;
        quantise(p.k, from, p.k_scales == nullptr ? p.k_scale : k_scales[h], expected + to);
        quantise(p.v, from, p.v_scales == nullptr ? p.v_scale : v_scales[h], expected + plane + to);
      }
    }
  }
  p.o = nullptr;
  emulated::Launch(grid, tvm_infer::kernels::kAppendThreads, [&] { append_bf16_e4m3(p); });
  if (std::memcmp(cache, expected, elements) != 0) {
    std::fprintf(stderr, "case %d: heads %d head_dim %d page_size %d\n", number, p.num_kv_heads, p.head_dim, p.page_size);
    emulated::Fail("the cache of 8 bits is not what the definition says");
  }
}

// Keys of 192 beside values of 128, in tensors of their own; padding rows of the output become 0.
void RunUnequal(int32_t number, const Batch& batch, AppendParams p, int32_t spoiled, uint32_t grid) {
  constexpr int32_t kWidths[2] = {192, 128};
  const int64_t heads = p.num_kv_heads, num_pages = batch.page_indptr.back();
  std::vector<uint4> from[2], cache[2], expected[2];
  for (int32_t i = 0; i < 2; ++i) {
    from[i].resize(p.max_tokens * (heads + 1) * kWidths[i] / 8);
    auto* elements = reinterpret_cast<uint16_t*>(from[i].data());
    for (size_t e = 0; e < from[i].size() * 8; ++e) elements[e] = static_cast<uint16_t>(random_bits());
    cache[i].assign(num_pages * heads * p.page_size * kWidths[i] / 8 + 1, uint4{7, 7, 7, 7});
    expected[i] = cache[i];
  }
  const bool is_nhd = number % 5 == 0;
  p.head_dim = kWidths[0];
  p.k = from[0].data();
  p.v = from[1].data();
  p.k_cache = cache[0].data();
  p.v_cache = cache[1].data();
  int64_t* const strides[2][5] = {
      {&p.k_stride_token, &p.k_stride_head, &p.k_cache_stride_page, &p.k_cache_stride_head, &p.k_cache_stride_token},
      {&p.v_stride_token, &p.v_stride_head, &p.v_cache_stride_page, &p.v_cache_stride_head, &p.v_cache_stride_token}};
  for (int32_t i = 0; i < 2; ++i) {
    const int64_t width = kWidths[i], page = heads * p.page_size * width;
    const int64_t values[5] = {(heads + 1) * width, width, page, is_nhd ? width : p.page_size * width, is_nhd ? heads * width : width};
    for (int32_t s = 0; s < 5; ++s) *strides[i][s] = values[s];
    for (size_t r = 0; spoiled == 0 && r < batch.kv_len.size(); ++r) {
      for (int32_t t = batch.qo_indptr[r]; t < batch.qo_indptr[r + 1]; ++t) {
        const int32_t position = batch.kv_len[r] - (batch.qo_indptr[r + 1] - t);
        const int64_t first = batch.page_indices[batch.page_indptr[r] + position / p.page_size] * page;
        for (int64_t h = 0; h < heads; ++h) {
          const int64_t to = first + h * values[3] + position % p.page_size * values[4];
          std::memcpy(expected[i].data() + to / 8, from[i].data() + (t * values[0] + h * width) / 8, width * 2);
        }
      }
    }
  }
  const int32_t o_heads = 3 * p.num_kv_heads;
  std::vector<uint4> o(p.max_tokens * o_heads * kWidths[1] / 8, uint4{7, 7, 7, 7}), o_expected = o;
  p.o = o.data();
  p.o_stride_token = o_heads * kWidths[1];
  p.o_stride_head = kWidths[1];
  p.num_qo_heads = o_heads;
  const int64_t padding = spoiled == 0 ? batch.qo_indptr.back() * p.o_stride_token / 8 : static_cast<int64_t>(o.size());
  std::fill(o_expected.begin() + padding, o_expected.end(), uint4{0, 0, 0, 0});
  emulated::Launch(grid, tvm_infer::kernels::kAppendThreads, [&] { append_b16_h192_v128(p); });
  const auto same = [](const std::vector<uint4>& a, const std::vector<uint4>& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(uint4)) == 0;
  };
  if (same(cache[0], expected[0]) && same(cache[1], expected[1]) && same(o, o_expected)) return;
  std::fprintf(stderr, "case %d: heads %d page_size %d spoiled %d\n", number, p.num_kv_heads, p.page_size, spoiled);
  emulated::Fail("keys wider than values: caches or output are not what the definition says");
}

void RunCase(int32_t number) {
  const int32_t heads = Random(1, 9), head_dim = 8 * Random(1, number % 3 ? 8 : 32), page_size = Random(1, 20);
  const int32_t num_requests = number % 15 == 14 ? Random(129, 200) : Random(1, 24);
  const Batch batch = MakeBatch(num_requests, page_size, number % 2);
  const int32_t num_pages = batch.page_indptr.back();
  AppendParams p{};
  p.max_tokens = batch.qo_indptr.back() + (number % 4 != 2 ? Random(1, 40) : 0);
  if (p.max_tokens == 0) p.max_tokens = 1;
  p.num_kv_heads = heads;
  p.head_dim = head_dim;
  p.page_size = page_size;
  // k and v in one tensor [token, 2 * heads + 1, head_dim]; caches HND in one tensor, or NHD
  const int32_t row_heads = 2 * heads + 1;
  std::vector<uint4> kv_memory((static_cast<size_t>(p.max_tokens) * row_heads * head_dim + 7) / 8);
  auto* kv = reinterpret_cast<uint16_t*>(kv_memory.data());
  for (int64_t i = 0; i < static_cast<int64_t>(p.max_tokens) * row_heads * head_dim; ++i) kv[i] = static_cast<uint16_t>(random_bits());
  p.k = kv + head_dim;
  p.v = kv + (heads + 1) * head_dim;
  p.k_stride_token = p.v_stride_token = row_heads * head_dim;
  p.k_stride_head = p.v_stride_head = head_dim;
  const int64_t plane = static_cast<int64_t>(heads) * page_size * head_dim;
  std::vector<uint4> cache_memory(2 * plane * num_pages / 8 + 1);
  auto* cache = reinterpret_cast<uint16_t*>(cache_memory.data());
  for (int64_t i = 0; i < 2 * plane * num_pages; ++i) cache[i] = 0x7fc0;
  p.k_cache = cache;
  p.v_cache = cache + plane;
  p.k_cache_stride_page = p.v_cache_stride_page = 2 * plane;
  const bool is_nhd = number % 5 == 0;
  p.k_cache_stride_head = p.v_cache_stride_head = is_nhd ? head_dim : page_size * head_dim;
  p.k_cache_stride_token = p.v_cache_stride_token = is_nhd ? heads * head_dim : head_dim;
  p.kv_page_indptr = batch.page_indptr.data();
  p.kv_page_indices = batch.page_indices.data();
  std::vector<uint4> plan;
  const int32_t spoiled = SetLengths(batch, number, &p, &plan);

  std::vector<uint4> expected_memory = cache_memory;
  auto* expected = reinterpret_cast<uint16_t*>(expected_memory.data());
  for (int32_t r = 0; spoiled == 0 && r < num_requests; ++r) {
    for (int32_t t = batch.qo_indptr[r]; t < batch.qo_indptr[r + 1]; ++t) {
      const int32_t position = batch.kv_len[r] - (batch.qo_indptr[r + 1] - t);
      const int64_t page = batch.page_indices[batch.page_indptr[r] + position / page_size];
      for (int32_t h = 0; h < heads; ++h) {
        const int64_t to = page * p.k_cache_stride_page + h * p.k_cache_stride_head + position % page_size * p.k_cache_stride_token;
        const int64_t from = t * p.k_stride_token + h * head_dim;
        std::memcpy(expected + to, static_cast<const uint16_t*>(p.k) + from, head_dim * 2);
        std::memcpy(expected + plane + to, static_cast<const uint16_t*>(p.v) + from, head_dim * 2);
      }
    }
  }
  // An output of strided heads, whose padding rows become 0 where a plan is obeyed.
  const int32_t o_heads = 4 * heads, o_token = (o_heads + 1) * head_dim;
  std::vector<uint4> o_memory(static_cast<size_t>(p.max_tokens) * o_token / 8, uint4{7, 7, 7, 7}), o_expected = o_memory;
  if (number % 2) {
    p.o = o_memory.data();
    p.o_stride_token = o_token;
    p.o_stride_head = head_dim;
    p.num_qo_heads = o_heads;
    for (int64_t t = batch.qo_indptr.back(); spoiled == 0 && t < p.max_tokens; ++t) {
      for (int64_t i = 0; i < o_heads * head_dim / 8; ++i) o_expected[t * (o_token / 8) + i] = uint4{0, 0, 0, 0};
    }
  }
  const int32_t token_loads = (2 * heads * head_dim / 8 + 31) / 32;
  const int32_t most = (p.max_tokens * token_loads + 7) / 8;
  emulated::Launch(number % 2 ? most : Random(1, std::min(most, 6)), tvm_infer::kernels::kAppendThreads, [&] { append_b16(p); });
  if (std::memcmp(cache_memory.data(), expected_memory.data(), cache_memory.size() * sizeof(uint4)) != 0) {
    std::fprintf(stderr, "case %d: heads %d head_dim %d page_size %d requests %d tokens %d of %d spoiled %d\n", number, heads, head_dim,
                 page_size, num_requests, batch.qo_indptr.back(), p.max_tokens, spoiled);
    emulated::Fail("the cache is not what the definition says");
  }
  RunFloat8(number, batch, p, spoiled, Random(1, std::min(most, 6)));
  RunUnequal(number, batch, p, spoiled, Random(1, std::min(most, 6)));
  if (std::memcmp(o_memory.data(), o_expected.data(), o_memory.size() * sizeof(uint4)) != 0) {
    std::fprintf(stderr, "case %d: tokens %d of %d spoiled %d\n", number, batch.qo_indptr.back(), p.max_tokens, spoiled);
    emulated::Fail("the output is not 0 where it is padding, or not left alone elsewhere");
  }
}

}  // namespace

int main() {
  constexpr int32_t kCases = 60;
  for (int32_t number = 0; number < kCases; ++number) RunCase(number);
  std::printf("%d\n", kCases);
}
