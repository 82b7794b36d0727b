// kernels/merge_states.cuh on the host (compiled with -include warp.h), against float64; outputs over their inputs, NaN where a state saw
// no key. Prints how many it ran.
#include "tvm_infer/kernels/merge_states.cuh"

#include <algorithm>
#include <limits>
#include <random>

TVM_INFER_MERGE_STATES(merge_states_bf16, Bf16);
TVM_INFER_MERGE_STATES(merge_states_fp32, Fp32);

namespace {

using tvm_infer::cuda::MergeStatesParams;
constexpr float kNothing = -std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::mt19937 random_bits(2);
int32_t Random(int32_t low, int32_t high) { return low + static_cast<int32_t>(random_bits() % (high - low + 1)); }

// [rows, heads + 1, head_dim] of which the last head is never touched.
template <typename Element>
struct States {
  int32_t rows, heads, head_dim;
  std::vector<uint4> memory;
  std::vector<float> lse;

  States(int32_t rows, int32_t heads, int32_t head_dim)
      : rows(rows), heads(heads), head_dim(head_dim), memory(Elements() * sizeof(Element) / 16 + 1), lse(rows * (heads + 1), kNan) {
    for (int64_t i = 0; i < Elements(); ++i) Set(i, kNan);
  }
  int64_t Elements() const { return static_cast<int64_t>(rows) * (heads + 1) * head_dim; }
  int64_t At(int32_t row, int32_t head, int32_t column) const {
    return (static_cast<int64_t>(row) * (heads + 1) + head) * head_dim + column;
  }
  int32_t LseAt(int32_t row, int32_t head) const { return head * rows + row; }  // [heads + 1, rows]: not the strides of O
  float Get(int64_t i) const {
    if constexpr (sizeof(Element) == 4) return reinterpret_cast<const float*>(memory.data())[i];
    return __uint_as_float(static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(memory.data())[i]) << 16);
  }
  void Set(int64_t i, float x) {
    if constexpr (sizeof(Element) == 4) {
      reinterpret_cast<float*>(memory.data())[i] = x;
    } else {
      reinterpret_cast<uint16_t*>(memory.data())[i] = static_cast<uint16_t>(tvm_infer::ptx::RoundToBf16(x));
    }
  }
  void Fill() {
    for (int32_t row = 0; row < rows; ++row) {
      for (int32_t head = 0; head < heads; ++head) {
        const bool is_nothing = Random(0, 3) == 0;
        lse[LseAt(row, head)] = is_nothing ? kNothing : Random(-4000, 4000) * 0.01f;
        for (int32_t c = 0; c < head_dim; ++c) Set(At(row, head, c), is_nothing ? kNan : Random(-1000, 1000) * 0.001f);
      }
    }
  }
};

template <typename Element, typename Kernel>
void RunCase(int32_t number, Kernel kernel) {
  const int32_t rows = Random(1, 20), heads = Random(1, 9), head_dim = 8 * Random(1, 32);
  States<Element> a(rows, heads, head_dim), b(rows, heads, head_dim), out(rows, heads, head_dim);
  a.Fill();
  b.Fill();
  const States<Element> old_a = a, old_b = b;
  States<Element>& to = number % 3 == 0 ? a : number % 3 == 1 ? b : out;
  MergeStatesParams p{};
  p.o_a = a.memory.data();
  p.o_b = b.memory.data();
  p.o = to.memory.data();
  p.lse_a = a.lse.data();
  p.lse_b = b.lse.data();
  p.lse = number % 5 == 4 ? nullptr : to.lse.data();
  p.o_a_stride_row = p.o_b_stride_row = p.o_stride_row = (heads + 1) * head_dim;
  p.o_a_stride_head = p.o_b_stride_head = p.o_stride_head = head_dim;
  p.lse_a_stride_row = p.lse_b_stride_row = p.lse_stride_row = 1;
  p.lse_a_stride_head = p.lse_b_stride_head = p.lse_stride_head = rows;
  p.num_rows = rows;
  p.num_heads = heads;
  p.head_dim = head_dim;
  emulated::Launch(Random(1, 5), tvm_infer::kernels::kMergeStatesThreads, [&] { kernel(p); });

  const double tolerance = sizeof(Element) == 4 ? 1e-5 : 1e-2;
  for (int32_t row = 0; row < rows; ++row) {
    for (int32_t head = 0; head < heads; ++head) {
      const double la = old_a.lse[a.LseAt(row, head)], lb = old_b.lse[b.LseAt(row, head)], max = std::max(la, lb);
      const double wa = max == kNothing ? 0 : std::exp(la - max), wb = max == kNothing ? 0 : std::exp(lb - max), sum = wa + wb;
      for (int32_t c = 0; c < head_dim; ++c) {
        const int64_t i = a.At(row, head, c);
        const double x = wa == 0 ? 0 : wa * old_a.Get(i), y = wb == 0 ? 0 : wb * old_b.Get(i);
        if (!(std::fabs(to.Get(i) - (sum == 0 ? 0 : (x + y) / sum)) <= tolerance)) emulated::Fail("O is not the weighted sum");
      }
      const float lse = to.lse[to.LseAt(row, head)];
      const double expected = sum == 0 ? kNothing : max + std::log(sum);
      if (p.lse != nullptr && !(lse == expected || std::fabs(lse - expected) <= 1e-5 * std::max(1.0, std::fabs(expected)))) {
        emulated::Fail("LSE is not that of the union");
      }
    }
    for (int32_t c = 0; c < head_dim; ++c) {
      if (!std::isnan(to.Get(to.At(row, heads, c)))) emulated::Fail("a head that is none was written");
    }
  }
}

}  // namespace

int main() {
  constexpr int32_t kCases = 60;
  for (int32_t number = 0; number < kCases; ++number) {
    RunCase<tvm_infer::ptx::Bf16>(number, merge_states_bf16);
    RunCase<tvm_infer::ptx::Fp32>(number, merge_states_fp32);
  }
  std::printf("%d\n", 2 * kCases);
}
