// Warpgroup matrix products (wgmma), m64 n{64, 80, 96, 128, 192, 256} k16, 16-bit operands, fp32 accumulators.
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
// Accumulators that the first product overwrites. NOTE: by an instruction for each: registers that are read, by a product, and never
// written before are taken to live from the kernel's begin on, through all code of other tile classes.
template <int kCount>
__device__ __forceinline__ void ZeroRegisters(float (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("mov.f32 %0, 0f00000000;" : "=f"(r[i]));
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
// Operands of C32, C40, C48, C64, C96 and C128, and their names in the text: each list goes on where the one before ends.
#define TVM_INFER_REGISTERS_32 TVM_INFER_C32(0)
#define TVM_INFER_REGISTERS_40 TVM_INFER_REGISTERS_32, TVM_INFER_C8(32)
#define TVM_INFER_REGISTERS_48 TVM_INFER_REGISTERS_40, TVM_INFER_C8(40)
#define TVM_INFER_REGISTERS_64 TVM_INFER_REGISTERS_32, TVM_INFER_C32(32)
#define TVM_INFER_REGISTERS_96 TVM_INFER_REGISTERS_64, TVM_INFER_C32(64)
#define TVM_INFER_REGISTERS_128 TVM_INFER_REGISTERS_96, TVM_INFER_C32(96)
#define TVM_INFER_LIST_32                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TVM_INFER_LIST_40 \
  TVM_INFER_LIST_32       \
  ", %32, %33, %34, %35, %36, %37, %38, %39"
#define TVM_INFER_LIST_48 \
  TVM_INFER_LIST_40       \
  ", %40, %41, %42, %43, %44, %45, %46, %47"
#define TVM_INFER_LIST_64                                                            \
  TVM_INFER_LIST_32                                                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TVM_INFER_LIST_96                                                            \
  TVM_INFER_LIST_64                                                                  \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define TVM_INFER_LIST_128                                                                       \
  TVM_INFER_LIST_96                                                                              \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// clang-format off
// COUNT accumulators a thread, so N = 2 * COUNT. A0 … are the operands behind them.
#define TVM_INFER_WGMMA_SS(COUNT, N, TYPE, A0, A1, B0, B1, ACC) \
  asm volatile("{\n.reg .pred p;\n.reg .b64 a, b;\nmov.b64 a, {" A0 ", " A1 "};\nmov.b64 b, {" B0 ", " B1 "};\nsetp.ne.b32 p, " ACC ", 0;\n" \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" TVM_INFER_LIST_##COUNT "}, a, b, p, 1, 1, 0, 0;\n" "}" \
               : TVM_INFER_REGISTERS_##COUNT : "r"(a.low), "r"(a.high), "r"(b.low), "r"(b.high), "r"(accumulate))
#define TVM_INFER_WGMMA_RS(COUNT, N, TYPE, A0, A1, A2, A3, B0, B1, ACC) \
  asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nmov.b64 b, {" B0 ", " B1 "};\nsetp.ne.b32 p, " ACC ", 0;\n" \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" TVM_INFER_LIST_##COUNT "}, {" A0 ", " A1 ", " A2 ", " A3 "}, b, p, 1, 1, 1;\n" "}" \
               : TVM_INFER_REGISTERS_##COUNT : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.low), "r"(b.high), "r"(accumulate))
// One function for each COUNT.
#define TVM_INFER_WGMMA_SHARED_A(COUNT, N, ...) \
  template <typename Element> \
  __device__ __forceinline__ void WgmmaSharedA(float (&c)[COUNT], Descriptor a, Descriptor b, int accumulate) { \
    if constexpr (Element::kIsBf16) { \
      TVM_INFER_WGMMA_SS(COUNT, N, "bf16", __VA_ARGS__); \
    } else { \
      TVM_INFER_WGMMA_SS(COUNT, N, "f16", __VA_ARGS__); \
    } \
  }
#define TVM_INFER_WGMMA_REGISTER_A(COUNT, N, ...) \
  template <typename Element> \
  __device__ __forceinline__ void WgmmaRegisterA(float (&c)[COUNT], const uint32_t* a, Descriptor b, int accumulate) { \
    if constexpr (Element::kIsBf16) { \
      TVM_INFER_WGMMA_RS(COUNT, N, "bf16", __VA_ARGS__); \
    } else { \
      TVM_INFER_WGMMA_RS(COUNT, N, "f16", __VA_ARGS__); \
    } \
  }

// c[64, N] (+)= A[64, 16] @ B[N, 16]^T, both in shared memory, K-major.
TVM_INFER_WGMMA_SHARED_A(32, 64, "%32", "%33", "%34", "%35", "%36")
TVM_INFER_WGMMA_SHARED_A(64, 128, "%64", "%65", "%66", "%67", "%68")
// c[64, N] (+)= A[64, 16] @ B[16, N], A in registers, B in shared memory with N contiguous.
TVM_INFER_WGMMA_REGISTER_A(32, 64, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
TVM_INFER_WGMMA_REGISTER_A(40, 80, "%40", "%41", "%42", "%43", "%44", "%45", "%46")
TVM_INFER_WGMMA_REGISTER_A(48, 96, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
TVM_INFER_WGMMA_REGISTER_A(64, 128, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
TVM_INFER_WGMMA_REGISTER_A(96, 192, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
TVM_INFER_WGMMA_REGISTER_A(128, 256, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
// clang-format on
#undef TVM_INFER_WGMMA_SHARED_A
#undef TVM_INFER_WGMMA_REGISTER_A
#undef TVM_INFER_WGMMA_SS
#undef TVM_INFER_WGMMA_RS
#undef TVM_INFER_LIST_32
#undef TVM_INFER_LIST_40
#undef TVM_INFER_LIST_48
#undef TVM_INFER_LIST_64
#undef TVM_INFER_LIST_96
#undef TVM_INFER_LIST_128
#undef TVM_INFER_REGISTERS_32
#undef TVM_INFER_REGISTERS_40
#undef TVM_INFER_REGISTERS_48
#undef TVM_INFER_REGISTERS_64
#undef TVM_INFER_REGISTERS_96
#undef TVM_INFER_REGISTERS_128
#undef TVM_INFER_C32
#undef TVM_INFER_C8

}  // namespace tvm_infer::ptx
