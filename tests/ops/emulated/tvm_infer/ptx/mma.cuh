// Stands in for ptx/mma.cuh on the host: the product, in float.
#pragma once

#include "tvm_infer/ptx/element.cuh"

namespace tvm_infer::ptx {

template <typename Element>
void Mma16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragments {
    uint32_t a[4], b[2];
  };
  const std::vector<Fragments> of = emulated::Cta::Get().Exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const auto element = [](uint32_t pair, int32_t index) {
    const float2 x = Unpack<Element>(pair);
    return index % 2 == 0 ? x.x : x.y;
  };
  const auto lane = static_cast<int32_t>(threadIdx.x % 32);
  for (int32_t i = 0; i < 4; ++i) {
    const int32_t row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int32_t k = 0; k < 16; ++k) {
      const float x = element(of[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k), y = element(of[column * 4 + k % 8 / 2].b[k / 8], k);
      c[i] += x * y;
    }
  }
}

}  // namespace tvm_infer::ptx
