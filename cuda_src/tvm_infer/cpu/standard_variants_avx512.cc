// The standard variants for x86-64 with AVX-512 F, BW, VL and DQ (compiled for them: cmake/CMakeLists.txt).
#include "tvm_infer/cpu/kernels.h"

#if defined(TVM_INFER_CPU_X86)
#define TVM_INFER_ISA avx512
#include "tvm_infer/cpu/standard_variants.h"
#endif
