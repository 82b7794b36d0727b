// Who merges what, where several warps could: a merge's word in the plan's tickets, counted in by those whose partials it takes.
//
// The parts of shared keys end at about the same time, and the CTA that is last would merge the rows of all requests alone, while the
// others have nothing left to do. So a warp that has no work behind this one may offer to help: it looks at the word until all have
// arrived, and then takes its share. Nobody depends on a helper: who has waited for long leaves, and says so, unless all have arrived
// meanwhile; then its share counts on it. Where someone has left, the last to arrive merges everything. (CTAs of a grid need not run at
// the same time, so waiting without an end could wait for one that waits for this CTA's place.)
//
//   arrive   word += kArrived, + kHelps of who offers to help; of what was there `helpers` is its place among them
//   leave    compare and swap: word += kLeft while not all have arrived
//   seen     word += kSeen by each helper that finds all arrived; the last of them leaves 0 for the next launch
#pragma once

#include <cstdint>

namespace tvm_infer::kernels {

struct Arrivals {
  static constexpr uint32_t kArrived = 1, kHelps = 1 << 8, kLeft = 1 << 16, kSeen = 1 << 24;
  static constexpr int32_t kMost = 255;  // to arrive where there may be helpers; of more the word is the number that has

  uint32_t word;
  int32_t count;  // that arrive

  __device__ __forceinline__ bool MayHaveHelpers() const { return count <= kMost; }
  __device__ __forceinline__ int32_t Helpers() const { return word >> 8 & 0xff; }
  __device__ __forceinline__ bool AreAll() const { return static_cast<int32_t>(MayHaveHelpers() ? word & 0xff : word) == count; }
  // Once all are here: nobody else will look at the word.
  __device__ __forceinline__ bool AreDone() const { return !MayHaveHelpers() || static_cast<int32_t>(word >> 24) == Helpers() - Left(); }
  // Once all are here: into how many shares the merge is divided, of which a helper has that of its place; 0: the caller has none.
  __device__ __forceinline__ int32_t Shares(bool helps, bool is_last) const {
    if (!MayHaveHelpers() || Left() > 0) return is_last ? 1 : 0;
    if (helps) return Helpers();
    return is_last && Helpers() == 0 ? 1 : 0;
  }
  // Of a merge's chunks of rows the share of `place` has this and every `shares`-th behind it, if there are so many. Those of the `turn`-th
  // of a warp's merges, of as many chunks each, begin where those of the one before have ended: which may be fewer than shares.
  static __device__ __forceinline__ int32_t FirstChunk(int32_t place, int32_t shares, int32_t turn, int32_t chunks) {
    return shares > 1 ? (place + shares - turn * chunks % shares) % shares : 0;
  }

 private:
  __device__ __forceinline__ int32_t Left() const { return word >> 16 & 0xff; }
};

}  // namespace tvm_infer::kernels
