// The executor for x86-64 with AVX-512 F, BW, VL and DQ (compiled for them: cmake/CMakeLists.txt).
#include "tvm_infer/cpu/kernels.h"

#if defined(TVM_INFER_CPU_X86)
#define TVM_INFER_ISA avx512
// clang-format off: the vectors come first
#include "tvm_infer/cpu/vec_avx512.h"
#include "tvm_infer/cpu/kernel_table.h"
// clang-format on

namespace tvm_infer::cpu {

const KernelTable& Avx512Kernels() {
  static constexpr KernelTable kTable = avx512::MakeTable("avx512");
  return kTable;
}

}  // namespace tvm_infer::cpu

#endif
