// Stands in for ptx/mma.cuh on the host: the product, in float, and what loads its operands.
#pragma once

#include "tvm_infer/ptx/element.cuh"
#include "tvm_infer/ptx/load_store.cuh"

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

// The addresses of all lanes: of the eight rows of four matrices.
inline std::vector<uint32_t> MatrixRows(uint32_t address) {
  std::vector<uint32_t> rows = emulated::Cta::Get().Exchange(address);
  for (int i = 0; i < 32; i += 8) {
    if (emulated::MeetInBank(&rows[i])) emulated::Fail("rows of a matrix meet in a bank");
  }
  return rows;
}
inline void LoadMatrixX4(uint32_t (&r)[4], uint32_t address) {
  const std::vector<uint32_t> rows = MatrixRows(address);
  const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (uint32_t i = 0; i < 4; ++i) r[i] = LoadShared4(rows[8 * i + g] + 4 * t);
}
inline void LoadMatrixX4Transposed(uint32_t (&r)[4], uint32_t address) {
  const std::vector<uint32_t> rows = MatrixRows(address);
  const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const auto element = [&](uint32_t row) { return LoadShared4(rows[row] + g / 2 * 4) >> g % 2 * 16 & 0xffff; };
  for (uint32_t i = 0; i < 4; ++i) r[i] = element(8 * i + 2 * t) | element(8 * i + 2 * t + 1) << 16;
}

}  // namespace tvm_infer::ptx
