// Prints what the executors' tables say of every type that keys may have, those without kernels too: "<executor> <type> <head_dim> <class>
// …", a class as rows,kv_granule,fixed,row,kv. Then sizes: "bytes <type> <elements> <bytes>".
#include <cstdio>
#include <initializer_list>

#include "tvm_infer/cpu/attention.h"
#include "tvm_infer/cuda/tile_table.h"
#include "tvm_infer/element_type.h"

using tvm_infer::ElementRow;
using tvm_infer::ElementType;
using tvm_infer::TileClass;
using tvm_infer::TileCosts;

namespace {

void Print(const char* executor, const ElementRow& row, int head_dim, const TileCosts& costs) {
  std::printf("%s %s %d", executor, row.name, head_dim);
  for (int i = 0; i < costs.num_classes; ++i) {
    const TileClass& c = costs.classes[i];
    std::printf(" %d,%d,%lld,%lld,%lld", c.rows, c.kv_granule, static_cast<long long>(c.fixed), static_cast<long long>(c.row),
                static_cast<long long>(c.kv));
  }
  std::printf("\n");
}

}  // namespace

int main() {
  for (const ElementRow& row : tvm_infer::kElementRows) {
    for (int head_dim : {64, 80, 96, 128, 192, 256}) {
      Print("cpu", row, head_dim, tvm_infer::cpu::TileTable(ElementType::kBFloat16, row.type, head_dim, head_dim));
      if (row.type == ElementType::kFloat32) continue;
      Print("cuda", row, head_dim, tvm_infer::cuda::TileTable(ElementType::kBFloat16, row.type, head_dim, head_dim));
    }
    for (int elements : {0, 1, 7, 8, 128}) {
      std::printf("bytes %s %d %lld\n", row.name, elements, static_cast<long long>(tvm_infer::BytesOf(elements, row.bits)));
    }
  }
}
