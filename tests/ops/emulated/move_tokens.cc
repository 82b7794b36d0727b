// kernels/move_tokens.cuh on the host (compiled with -include warp.h): moves of all layers and heads, one after the other, nothing else
// touched. Prints how many cases it ran.
#include "tvm_infer/kernels/move_tokens.cuh"

#include <vector>

TVM_INFER_MOVE_TOKENS(move_tokens);

namespace {

using tvm_infer::cuda::MoveTokensParams;

constexpr int32_t kPages = 3, kPageSize = 5;

// Every slot's first word is its number; a chain of moves reads what earlier ones wrote.
void RunCase(int32_t layers, int32_t planes, int32_t row_vectors, int32_t num_moves, uint32_t grid) {
  MoveTokensParams p{};
  p.row_bytes = row_vectors * 16;
  p.plane_bytes = int64_t{p.row_bytes} * kPageSize;
  p.page_bytes = p.plane_bytes * planes;
  p.layer_bytes = p.page_bytes * kPages;
  p.num_layers = layers;
  p.num_planes = planes;
  p.num_moves = num_moves;
  for (int32_t i = 0; i < num_moves; ++i) p.moves[i] = {(i + 1) % kPages, (2 * i + 1) % kPageSize, i % kPages, i * 3 % kPageSize};
  std::vector<uint4> memory(p.layer_bytes / 16 * layers);
  for (size_t i = 0; i < memory.size(); ++i) memory[i] = {static_cast<uint32_t>(i), 1, 2, static_cast<uint32_t>(~i)};
  std::vector<uint4> expected = memory;
  for (int32_t i = 0; i < num_moves; ++i) {
    const auto& m = p.moves[i];
    for (int32_t plane = 0; plane < layers * planes; ++plane) {
      const int64_t base = (plane / planes * p.layer_bytes + plane % planes * p.plane_bytes) / 16;
      for (int32_t v = 0; v < row_vectors; ++v) {
        expected[base + m.dst_page * p.page_bytes / 16 + m.dst_slot * row_vectors + v] =
            expected[base + m.src_page * p.page_bytes / 16 + m.src_slot * row_vectors + v];
      }
    }
  }
  p.pages = memory.data();
  emulated::Launch(grid, tvm_infer::kernels::kMoveTokensThreads, [&] { move_tokens(p); });
  for (size_t i = 0; i < memory.size(); ++i) {
    if (memory[i].x != expected[i].x || memory[i].w != expected[i].w) emulated::Fail("a slot holds another token than it should");
  }
}

}  // namespace

int main() {
  int32_t cases = 0;
  for (int32_t layers : {1, 3}) {
    for (int32_t planes : {2, 6}) {
      for (int32_t row_vectors : {1, 8, 16}) {
        for (int32_t num_moves : {1, 2, 31, tvm_infer::cuda::kMovesPerLaunch}) {
          for (uint32_t grid : {1u, 2u, 5u}) {
            RunCase(layers, planes, row_vectors, num_moves, grid);
            ++cases;
          }
        }
      }
    }
  }
  std::printf("%d\n", cases);
}
