// The executor for any machine: the compiler's own vectors.
#include "tvm_infer/cpu/kernels.h"

#define TVM_INFER_ISA portable
// clang-format off: the vectors come first
#include "tvm_infer/cpu/vec_portable.h"
#include "tvm_infer/cpu/kernel_table.h"
// clang-format on

namespace tvm_infer::cpu {

const KernelTable& PortableKernels() {
  static constexpr KernelTable kTable = portable::MakeTable("portable");
  return kTable;
}

}  // namespace tvm_infer::cpu
