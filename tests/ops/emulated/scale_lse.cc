// kernels/scale_lse.cuh on the host (compiled with -include warp.h): every element once, and nothing between them. Prints how many it ran.
#include "tvm_infer/kernels/scale_lse.cuh"

#include <cmath>
#include <limits>
#include <vector>

TVM_INFER_SCALE_LSE(scale_lse);

namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

// [rows, heads] as the transposed part of a larger array, where the rest must stay as it is.
void RunCase(int32_t rows, int32_t heads, uint32_t grid) {
  const int64_t stride_row = 1, stride_head = rows + 3;
  std::vector<float> before(stride_head * (heads + 1));
  for (size_t i = 0; i < before.size(); ++i) before[i] = i % 5 == 0 ? kNothing : static_cast<float>(i) - 40.f;
  std::vector<float> after = before;
  const tvm_infer::cuda::ScaleLseParams params{after.data(), stride_row, stride_head, rows, heads, 1.5f};
  emulated::Launch(grid, tvm_infer::kernels::kScaleLseThreads, [&] { scale_lse(params); });
  for (int64_t head = 0; head <= heads; ++head) {
    for (int64_t row = 0; row < stride_head; ++row) {
      const float x = before[head * stride_head + row], y = after[head * stride_head + row];
      if (y != (row < rows && head < heads ? x * 1.5f : x)) emulated::Fail("an element is not scaled once, or another one was");
    }
  }
}

}  // namespace

int main() {
  int32_t cases = 0;
  for (int32_t rows : {1, 3, 64, 257}) {
    for (int32_t heads : {1, 2, 5, 32}) {
      for (uint32_t grid : {1u, 2u, 7u, 40u}) {
        RunCase(rows, heads, grid);
        ++cases;
      }
    }
  }
  std::printf("%d\n", cases);
}
