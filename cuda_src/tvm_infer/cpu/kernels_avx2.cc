// The executor for x86-64 with AVX2, FMA and F16C (compiled for them: cmake/CMakeLists.txt).
#include "tvm_infer/cpu/kernels.h"

#if defined(TVM_INFER_CPU_X86)
#define TVM_INFER_ISA avx2
// clang-format off: the vectors come first
#include "tvm_infer/cpu/vec_avx2.h"
#include "tvm_infer/cpu/kernel_table.h"
// clang-format on

namespace tvm_infer::cpu {

const KernelTable& Avx2Kernels() {
  static constexpr KernelTable kTable = avx2::MakeTable("avx2");
  return kTable;
}

}  // namespace tvm_infer::cpu

#endif
