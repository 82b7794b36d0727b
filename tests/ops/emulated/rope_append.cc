// kernels/rope_append.cuh on the host (compiled with -include warp.h): random batches against the definition in double, whole caches and
// outputs compared; and the angles alone, far out. Prints how many batches it ran.
#include "tvm_infer/kernels/rope_append.cuh"

#include "append_batch.h"
#include "float8.h"

TVM_INFER_ROPE_APPEND(rope_append_bf16, Bf16);
TVM_INFER_ROPE_APPEND_FLOAT8(rope_append_bf16_e4m3, Bf16, E4m3);

namespace {

using append_batch::Batch;
using append_batch::MakeBatch;
using append_batch::Random;
using append_batch::random_bits;
using append_batch::SetLengths;
using tvm_infer::cuda::RopeAppendParams;

constexpr uint16_t kPoison = 0x7fc0;

float ToFloat(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

// A tensor of 16-bit elements on a 16-byte boundary.
struct Memory {
  std::vector<uint4> vectors;
  explicit Memory(int64_t elements) : vectors(static_cast<size_t>(elements) / 8 + 1) {}
  uint16_t* data() { return reinterpret_cast<uint16_t*>(vectors.data()); }
};

// One head turned in double, element by element; -1 for one that passes.
struct Expected {
  std::vector<double> values;

  Expected(const RopeAppendParams& p, const uint16_t* from, int32_t position) : values(p.append.head_dim) {
    for (size_t d = 0; d < values.size(); ++d) values[d] = ToFloat(from[d]);
    const int32_t pairs = p.rotary_dim / 2;
    for (int32_t i = 0; i < pairs; ++i) {
      const int32_t first = p.is_interleaved ? 2 * i : i, second = p.is_interleaved ? first + 1 : i + pairs;
      const double angle = static_cast<double>(position) * p.inv_freq[i], x = values[first], y = values[second];
      values[first] = p.magnitude * (x * std::cos(angle) - y * std::sin(angle));
      values[second] = p.magnitude * (y * std::cos(angle) + x * std::sin(angle));
    }
  }
  // Rounded once: half a unit in the last place, and what float arithmetic adds. What passes is not even rounded.
  bool IsClose(const RopeAppendParams& p, const uint16_t* got, const uint16_t* from) const {
    for (size_t d = 0; d < values.size(); ++d) {
      if (static_cast<int32_t>(d) >= p.rotary_dim ? got[d] != from[d]
                                                  : !(std::abs(ToFloat(got[d]) - values[d]) <= std::abs(values[d]) * 0x1.01p-8 + 2e-6)) {
        return false;
      }
    }
    return true;
  }
};

// The same call into a cache of 8 bits: a key that turns is rounded once, what passes is the nearest to x / scale. `q_out` is what the call
// with 16 bits wrote, and must be again. `spoiled`: nothing is appended.
bool IsRightFloat8(int32_t number, const Batch& batch, RopeAppendParams p, int32_t spoiled, uint32_t grid, Memory* q_out,
                   int64_t q_elements) {
  tvm_infer::cuda::AppendParams& a = p.append;
  const int64_t plane = int64_t{a.num_kv_heads} * a.page_size * a.head_dim, elements = 2 * plane * batch.page_indptr.back();
  Memory memory(elements);
  auto* cache = reinterpret_cast<uint8_t*>(memory.data());
  std::memset(cache, 0x7f, elements);
  a.k_cache = cache;
  a.v_cache = cache + plane;
  a.o = nullptr;
  std::vector<float> k_scales, v_scales;
  for (int32_t h = 0; h < a.num_kv_heads; ++h) {
    k_scales.push_back(0.01f + 0.003f * h);
    v_scales.push_back(0.02f + 0.001f * h);
  }
  a.k_scale = k_scales[0];
  a.v_scale = v_scales[0];
  if (number % 2) a.k_scales = k_scales.data();
  if (number % 3) a.v_scales = v_scales.data();
  const std::vector<uint4> before = q_out->vectors;
  std::fill_n(q_out->data(), q_elements, kPoison);
  emulated::Launch(grid, tvm_infer::kernels::kRopeAppendThreads, [&] { rope_append_bf16_e4m3(p); });
  bool is_right = std::memcmp(before.data(), q_out->data(), q_elements * 2) == 0;
  std::vector<bool> is_written(elements);
  for (size_t r = 0; spoiled == 0 && r < batch.kv_len.size(); ++r) {
    for (int32_t t = batch.qo_indptr[r]; t < batch.qo_indptr[r + 1]; ++t) {
      const int32_t position = batch.kv_len[r] - (batch.qo_indptr[r + 1] - t);
      const int64_t page = batch.page_indices[batch.page_indptr[r] + position / a.page_size];
      for (int32_t h = 0; h < a.num_kv_heads; ++h) {
        const int64_t to = page * a.k_cache_stride_page + h * a.k_cache_stride_head + position % a.page_size * a.k_cache_stride_token;
        const uint16_t* k = static_cast<const uint16_t*>(a.k) + t * a.k_stride_token + h * a.k_stride_head;
        const uint16_t* v = static_cast<const uint16_t*>(a.v) + t * a.v_stride_token + h * a.v_stride_head;
        const float k_scale = a.k_scales == nullptr ? a.k_scale : k_scales[h], v_scale = a.v_scales == nullptr ? a.v_scale : v_scales[h];
        const Expected turned(p, k, position);
        for (int32_t d = 0; d < a.head_dim; ++d) {
          const double want = turned.values[d] / k_scale, got = float8::Value(cache[to + d]);
          const bool is_close = std::abs(got - want) <= std::max(std::abs(want) * 0x1.001p-4, 0x1.001p-10) + 2e-4;
          is_right &= d >= p.rotary_dim ? cache[to + d] == float8::Nearest(ToFloat(k[d]) / k_scale) : is_close;
          is_right &= cache[plane + to + d] == float8::Nearest(ToFloat(v[d]) / v_scale);
          is_written[to + d] = is_written[plane + to + d] = true;
        }
      }
    }
  }
  for (int64_t i = 0; i < elements; ++i) is_right &= is_written[i] || cache[i] == 0x7f;
  return is_right;
}

void RunCase(int32_t number) {
  const int32_t kv_heads = Random(1, 5), qo_heads = kv_heads * 4, page_size = Random(1, 20);
  const int32_t head_dim = 16 * Random(1, number % 3 ? 8 : 16);
  const int32_t num_requests = number % 15 == 14 ? Random(129, 200) : Random(1, 24);
  const Batch batch = MakeBatch(num_requests, page_size, number % 2);
  RopeAppendParams p{};
  tvm_infer::cuda::AppendParams& a = p.append;
  const int32_t num_tokens = batch.qo_indptr.back();
  a.max_tokens = std::max(1, num_tokens + (number % 4 != 2 ? Random(1, 40) : 0));
  a.num_kv_heads = kv_heads;
  a.head_dim = head_dim;
  a.page_size = page_size;
  a.num_qo_heads = qo_heads;
  p.rotary_dim = number % 4 == 1 ? 16 * Random(0, head_dim / 16) : head_dim;
  p.is_interleaved = number / 2 % 2;
  p.magnitude = number % 7 ? 1.f : 1.25f;
  Memory inv_freq_memory(p.rotary_dim + 8);
  auto* inv_freq = reinterpret_cast<float*>(inv_freq_memory.data());
  for (int32_t i = 0; i < p.rotary_dim / 2; ++i) inv_freq[i] = static_cast<float>(std::pow(10000.0, -2.0 * i / p.rotary_dim));
  p.inv_freq = p.rotary_dim ? inv_freq : nullptr;
  // q, k and v in one tensor, one head more than they need; the output likewise
  const int32_t row_heads = qo_heads + 2 * kv_heads + 1, out_heads = qo_heads + 1;
  Memory qkv(int64_t{a.max_tokens} * row_heads * head_dim), out(int64_t{a.max_tokens} * out_heads * head_dim);
  for (int64_t i = 0; i < int64_t{a.max_tokens} * row_heads * head_dim; ++i) {
    qkv.data()[i] = static_cast<uint16_t>((random_bits() & 0x80ff) | 0x3f00);  // 0.5 … 2, either sign
  }
  std::fill_n(out.data(), int64_t{a.max_tokens} * out_heads * head_dim, kPoison);
  const int64_t row = int64_t{row_heads} * head_dim, out_row = int64_t{out_heads} * head_dim;
  p.q = qkv.data();
  a.k = qkv.data() + qo_heads * head_dim;
  a.v = qkv.data() + (qo_heads + kv_heads) * head_dim;
  p.q_stride_token = a.k_stride_token = a.v_stride_token = row;
  p.q_stride_head = a.k_stride_head = a.v_stride_head = p.q_out_stride_head = head_dim;
  p.q_out = out.data();
  p.q_out_stride_token = out_row;
  // the attention's output, of which padding rows alone are written
  Memory o(int64_t{a.max_tokens} * out_row);
  std::fill_n(o.data(), int64_t{a.max_tokens} * out_row, kPoison);
  if (number % 2) {
    a.o = o.data();
    a.o_stride_token = out_row;
    a.o_stride_head = head_dim;
  }
  const int64_t plane = int64_t{kv_heads} * page_size * head_dim, elements = 2 * plane * batch.page_indptr.back();
  Memory cache(elements), expected(elements);
  std::fill_n(cache.data(), elements, kPoison);
  std::fill_n(expected.data(), elements, kPoison);
  a.k_cache = cache.data();
  a.v_cache = cache.data() + plane;
  a.k_cache_stride_page = a.v_cache_stride_page = 2 * plane;
  const bool is_nhd = number % 5 == 0;
  a.k_cache_stride_head = a.v_cache_stride_head = is_nhd ? head_dim : page_size * head_dim;
  a.k_cache_stride_token = a.v_cache_stride_token = is_nhd ? kv_heads * head_dim : head_dim;
  a.kv_page_indptr = batch.page_indptr.data();
  a.kv_page_indices = batch.page_indices.data();
  std::vector<uint4> plan;
  const int32_t spoiled = SetLengths(batch, number, &a, &plan);

  const int32_t step_rows = 32 / (head_dim / 16), steps = (qo_heads + 2 * kv_heads + step_rows - 1) / step_rows;
  const int32_t most = (a.max_tokens * steps + 7) / 8;
  emulated::Launch(number % 2 ? most : Random(1, std::min(most, 6)), tvm_infer::kernels::kRopeAppendThreads, [&] { rope_append_bf16(p); });

  bool is_right = true;
  for (int32_t r = 0; spoiled == 0 && r < num_requests; ++r) {
    for (int32_t t = batch.qo_indptr[r]; t < batch.qo_indptr[r + 1]; ++t) {
      const int32_t position = batch.kv_len[r] - (batch.qo_indptr[r + 1] - t);
      const int64_t page = batch.page_indices[batch.page_indptr[r] + position / page_size];
      for (int32_t h = 0; h < qo_heads; ++h) {
        const uint16_t* from = qkv.data() + t * row + h * head_dim;
        is_right &= Expected(p, from, position).IsClose(p, out.data() + t * out_row + h * head_dim, from);
      }
      for (int32_t h = 0; h < kv_heads; ++h) {
        const int64_t to = page * a.k_cache_stride_page + h * a.k_cache_stride_head + position % page_size * a.k_cache_stride_token;
        const uint16_t* from = static_cast<const uint16_t*>(a.k) + t * row + h * head_dim;
        is_right &= Expected(p, from, position).IsClose(p, cache.data() + to, from);
        std::memcpy(expected.data() + to, cache.data() + to, head_dim * 2);
        std::memcpy(expected.data() + plane + to, static_cast<const uint16_t*>(a.v) + t * row + h * head_dim, head_dim * 2);
      }
    }
  }
  for (int32_t t = 0; t < a.max_tokens; ++t) {  // behind the heads nothing is written; padding is 0
    for (int32_t d = 0; d < head_dim; ++d) is_right &= out.data()[t * out_row + qo_heads * head_dim + d] == kPoison;
    const bool is_padding = spoiled != 0 || t >= num_tokens;
    for (int32_t d = 0; is_padding && d < qo_heads * head_dim; ++d) is_right &= out.data()[t * out_row + d] == 0;
    for (int32_t d = 0; d < out_row; ++d) {
      const bool is_zeroed = a.o != nullptr && spoiled == 0 && is_padding && d < qo_heads * head_dim;
      is_right &= o.data()[t * out_row + d] == (is_zeroed ? 0 : kPoison);
    }
  }
  is_right &= std::memcmp(cache.data(), expected.data(), elements * 2) == 0;
  is_right &= IsRightFloat8(number, batch, p, spoiled, Random(1, std::min(most, 6)), &out, int64_t{a.max_tokens} * out_row);
  if (!is_right) {
    std::fprintf(
        stderr, "case %d: heads %d/%d head_dim %d rotary_dim %d interleaved %d page_size %d requests %d tokens %d of %d spoiled %d\n",
        number, qo_heads, kv_heads, head_dim, p.rotary_dim, p.is_interleaved, page_size, num_requests, num_tokens, a.max_tokens, spoiled);
    emulated::Fail("the cache or the output is not what the definition says");
  }
}

// Angles at random positions below `end` against double, whose product of the two is exact.
void CheckAngles(int32_t end, double limit) {
  double largest = 0;
  for (int32_t i = 0; i < 200000; ++i) {
    const int32_t position = Random(0, end);
    const auto inv_freq = static_cast<float>(std::pow(10000.0, -Random(0, 1 << 20) / double{1 << 20}));
    const tvm_infer::kernels::CosSin got = tvm_infer::kernels::CosSinOf(static_cast<float>(position), inv_freq);
    const double angle = static_cast<double>(position) * inv_freq;
    largest = std::max({largest, std::abs(got.cos - std::cos(angle)), std::abs(got.sin - std::sin(angle))});
  }
  std::fprintf(stderr, "angles below position %d: off by %.2g at most\n", end, largest);
  if (!(largest < limit)) emulated::Fail("angles are not exact");
}

}  // namespace

int main() {
  for (const int32_t end : {1 << 7, 1 << 17, 1 << 20, 1 << 23}) CheckAngles(end, 3e-7);
  const tvm_infer::kernels::CosSin at_0 = tvm_infer::kernels::CosSinOf(0.f, 0.5f), back = tvm_infer::kernels::CosSinOf(-1.f, 2.f);
  if (at_0.cos != 1.f || at_0.sin != 0.f) emulated::Fail("position 0 turns");
  if (!(std::abs(back.cos - std::cos(2.0)) + std::abs(back.sin + std::sin(2.0)) < 3e-7)) emulated::Fail("negative angles");
  constexpr int32_t kCases = 60;
  for (int32_t number = 0; number < kCases; ++number) RunCase(number);
  std::printf("%d\n", kCases);
}
