// Warpgroup matrix products (wgmma), m64 n{64, 128} k16, 16-bit operands, fp32 accumulators.
//
// Accumulator fragment: warp w of the warpgroup, lane = 4 * g + t. c[4 * j + 2 * i + e] is row 16 * w + g + 8 * i, column 8 * j + 2 * t +
// e. An A operand in registers has the layout of mma.cuh's A, 16 rows a warp.
#pragma once

#include <cstdint>

#include "tvm_infer/ptx/element.cuh"

namespace tvm_infer::ptx {

// A matrix in shared memory (tile/descriptor.cuh). Two words, only the lower of which changes within a kernel: 32-bit arithmetic.
struct Descriptor {
  uint32_t low;
  uint32_t high;
};

// Before the first wgmma of a batch: registers written by this thread become visible to the tensor cores.
__device__ __forceinline__ void WgmmaFence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void WgmmaCommit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// At most `kPending` committed groups are still running afterwards.
template <int kPending>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// NOTE: the compiler does not know that a running wgmma writes its accumulators. This keeps reads and writes on their side of it.
template <int kCount>
__device__ __forceinline__ void PinRegisters(float (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(r[i])::"memory");
}
// What they held is not needed any more.
template <int kCount>
__device__ __forceinline__ void DefineRegisters(float (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "=f"(r[i]));
}
template <int kCount>
__device__ __forceinline__ void PinRegisters(uint32_t (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(r[i])::"memory");
}

#define TVM_INFER_C8(i) \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define TVM_INFER_C32(i) TVM_INFER_C8(i), TVM_INFER_C8(i + 8), TVM_INFER_C8(i + 16), TVM_INFER_C8(i + 24)
#define TVM_INFER_LIST64                                                   \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TVM_INFER_LIST128                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// clang-format off
#define TVM_INFER_WGMMA_SS128(TYPE) \
  asm volatile("{\n.reg .pred p;\n.reg .b64 a, b;\nmov.b64 a, {%64, %65};\nmov.b64 b, {%66, %67};\nsetp.ne.b32 p, %68, 0;\n" \
               "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" TVM_INFER_LIST128 "}, a, b, p, 1, 1, 0, 0;\n" "}" \
               : TVM_INFER_C32(0), TVM_INFER_C32(32) : "r"(a.low), "r"(a.high), "r"(b.low), "r"(b.high), "r"(accumulate))
#define TVM_INFER_WGMMA_RS128(TYPE) \
  asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nmov.b64 b, {%68, %69};\nsetp.ne.b32 p, %70, 0;\n" \
               "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" TVM_INFER_LIST128 "}, {%64, %65, %66, %67}, b, p, 1, 1, 1;\n" "}" \
               : TVM_INFER_C32(0), TVM_INFER_C32(32) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.low), "r"(b.high), "r"(accumulate))
#define TVM_INFER_WGMMA_RS64(TYPE) \
  asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nmov.b64 b, {%36, %37};\nsetp.ne.b32 p, %38, 0;\n" \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" TVM_INFER_LIST64 "}, {%32, %33, %34, %35}, b, p, 1, 1, 1;\n" "}" \
               : TVM_INFER_C32(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.low), "r"(b.high), "r"(accumulate))
// clang-format on

// c[64, 128] (+)= A[64, 16] @ B[128, 16]^T, both in shared memory, K-major.
template <typename Element>
__device__ __forceinline__ void Wgmma64x128x16(float (&c)[64], Descriptor a, Descriptor b, int accumulate) {
  if constexpr (Element::kIsBf16) {
    TVM_INFER_WGMMA_SS128("bf16");
  } else {
    TVM_INFER_WGMMA_SS128("f16");
  }
}

// c[64, N] (+)= A[64, 16] @ B[16, N], A in registers, B in shared memory with N contiguous.
template <typename Element>
__device__ __forceinline__ void WgmmaRegisterA(float (&c)[64], const uint32_t* a, Descriptor b, int accumulate) {
  if constexpr (Element::kIsBf16) {
    TVM_INFER_WGMMA_RS128("bf16");
  } else {
    TVM_INFER_WGMMA_RS128("f16");
  }
}
template <typename Element>
__device__ __forceinline__ void WgmmaRegisterA(float (&c)[32], const uint32_t* a, Descriptor b, int accumulate) {
  if constexpr (Element::kIsBf16) {
    TVM_INFER_WGMMA_RS64("bf16");
  } else {
    TVM_INFER_WGMMA_RS64("f16");
  }
}
#undef TVM_INFER_WGMMA_SS128
#undef TVM_INFER_WGMMA_RS128
#undef TVM_INFER_WGMMA_RS64
#undef TVM_INFER_LIST64
#undef TVM_INFER_LIST128
#undef TVM_INFER_C32
#undef TVM_INFER_C8

}  // namespace tvm_infer::ptx
