// Plain loads and stores whose width must not be left to the compiler: it splits what it cannot prove aligned.
#pragma once

#include <cstdint>

namespace tvm_infer::ptx {

__device__ __forceinline__ uint32_t LoadShared4(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ uint2 LoadShared8(uint32_t address) {
  uint2 x;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ uint4 LoadShared16(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ void StoreShared16(uint32_t address, const uint4& x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// Of global memory, in the order of the program: neither compiler nor assembler moves it over a barrier or a wait.
__device__ __forceinline__ int4 LoadInOrder(const int4* address) {
  int4 x;
  asm volatile("ld.global.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(address) : "memory");
  return x;
}
// Where `is_wanted`; no branch.
__device__ __forceinline__ void StoreGlobal16(void* address, const uint4& x, bool is_wanted) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p st.global.v4.b32 [%0], {%1, %2, %3, %4};\n}" ::"l"(address), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w), "r"(static_cast<int>(is_wanted))
               : "memory");
}

}  // namespace tvm_infer::ptx
