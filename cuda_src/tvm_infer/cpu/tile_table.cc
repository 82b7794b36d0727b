// What a tile costs on one thread of this executor: measured, see docs/cpu.md.
#include "tvm_infer/cpu/attention.h"

namespace tvm_infer::cpu {

const TileClass* TileTable(DType dtype, int32_t head_dim, int32_t* count) {
  (void)dtype;
  (void)head_dim;
  static constexpr TileClass kTable[] = {
      {16, 64, 500'000, 60'000, 60'000},
      {64, 64, 2'000'000, 100'000, 80'000},
      {128, 64, 2'000'000, 100'000, 160'000},
  };
  *count = 3;
  return kTable;
}

}  // namespace tvm_infer::cpu
