// How functions of this folder and of generated code are marked: inlined wherever they are called. The CPU executor compiles one source for
// several instruction sets, and of an inline function that the compiler left out of line the linker keeps any one copy for all of them.
#pragma once

#if defined(__CUDACC__)
#define TVM_INFER_VARIANT __host__ __device__ __forceinline__
#else
#define TVM_INFER_VARIANT inline __attribute__((always_inline))
#endif
