// Shared-memory tiles of 16-bit elements in the swizzles that TMA writes and wgmma and ldmatrix read.
//
// A panel is 64 elements (128 bytes) wide; the 16-byte chunk c of row r lies at chunk c ^ (r % 8), so that 8 rows of one column hit all
// banks. Rows of head_dim 128 are two panels, those of 80 and 96 as well. Panels start on 1024-byte boundaries.
//
// Rows of 8-bit heads of 64 and 192 are panels of 64 bytes: nothing of a stage is empty. Two rows share 128 bytes, and chunk c of row r
// lies at chunk c ^ (r / 2 % 4) of its half: of 8 rows of one column those at even r have the four places of one half, those at odd r of
// the other.
#pragma once

#include <cstdint>

namespace tvm_infer::tile {

inline constexpr int kPanelElements = 64;
inline constexpr int kPanelRowBytes = 128;
inline constexpr int kSwizzleRows = 8;
inline constexpr int kSwizzleAtomBytes = kSwizzleRows * kPanelRowBytes;

__host__ __device__ constexpr int Panels(int head_dim) { return (head_dim + kPanelElements - 1) / kPanelElements; }

// Lanes that copy a row by 16-byte chunks: a power of two.
__host__ __device__ constexpr int RowLanes(int head_dim) { return Panels(head_dim) == 1 ? 8 : Panels(head_dim) == 2 ? 16 : 32; }

// Byte offset of 16-byte chunk `chunk` (0 … 7) of row `row` within a panel.
__device__ __forceinline__ uint32_t SwizzledOffset(uint32_t row, uint32_t chunk) {
  return row * kPanelRowBytes + ((chunk ^ (row % kSwizzleRows)) << 4);
}

// kTileKeys keys of one head, as the copies of whole pages leave them: page after page, each page its panels, each panel its tokens.
// kRowBytes: of a panel, 128 or 64.
template <int kPageSize, int kHeadDim, int kRowBytes = kPanelRowBytes>
struct PageBoxes {
  static_assert(kRowBytes == kPanelRowBytes || kRowBytes == kPanelRowBytes / 2);
  static constexpr int kColumns = kRowBytes / 2, kChunks = kRowBytes / 16;  // of a panel
  static constexpr int kRowsOfLine = kPanelRowBytes / kRowBytes;
  static constexpr int kPanelBytes = kPageSize * kRowBytes;
  static constexpr int kPageBytes = kPanelBytes * ((kHeadDim + kColumns - 1) / kColumns);

  // Byte offset of 16-byte chunk `chunk` (0 … head_dim / 8 - 1) of key `key`.
  __device__ __forceinline__ static uint32_t Offset(uint32_t key, uint32_t chunk) {
    const uint32_t token = key % kPageSize;
    const uint32_t place = chunk % kChunks ^ key / kRowsOfLine % kChunks;
    return key / kPageSize * kPageBytes + chunk / kChunks * kPanelBytes + token * kRowBytes + (place << 4);
  }
  // From the address of chunk 0 or 1 of a key (a page box starts on 1024 bytes) to the chunk `columns` / 8 further on; `columns` is a
  // multiple of 16. Two instructions where the offset would be ten.
  __device__ __forceinline__ static uint32_t Columns(uint32_t address, uint32_t columns) {
    return (address ^ (columns % kColumns * 2)) + columns / kColumns * kPanelBytes;
  }
};

}  // namespace tvm_infer::tile
