// One warp's matrix product (mma.sync m16n8k16) and its operand loads (ldmatrix).
//
// Fragments, lane = 4 * g + t. A [16, 16]: a0 = (g, 2t), a1 = (g + 8, 2t), a2 = (g, 2t + 8), a3 = (g + 8, 2t + 8), two columns each.
// B [16, 8]: b0 = (2t, g), b1 = (2t + 8, g), two rows each. C [16, 8]: c0, c1 = (g, 2t + {0, 1}); c2, c3 = (g + 8, 2t + {0, 1}).
#pragma once

#include <cstdint>

#include "tvm_infer/ptx/element.cuh"

namespace tvm_infer::ptx {

// Lane l gives the address of row l % 8 of matrix l / 8; register i holds matrix i: (g, 2t + {0, 1}), or transposed (2t + {0, 1}, g).
__device__ __forceinline__ void LoadMatrixX4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void LoadMatrixX4Transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Lane l gives the address of row l % 8 of matrix l / 8; register i holds matrix i as an accumulator does: (g, 2t + {0, 1}).
__device__ __forceinline__ void StoreMatrixX4(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

#define TVM_INFER_MMA(TYPE)                                                           \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// c += a @ b
template <typename Element>
__device__ __forceinline__ void Mma16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (Element::kIsBf16) {
    TVM_INFER_MMA("bf16");
  } else {
    TVM_INFER_MMA("f16");
  }
}
#undef TVM_INFER_MMA

}  // namespace tvm_infer::ptx
