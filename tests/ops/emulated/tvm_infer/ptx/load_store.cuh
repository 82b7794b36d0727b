// Stands in for ptx/load_store.cuh on the host: shared memory is an array, whose offsets are its addresses.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulated {

inline uint8_t shared_memory[256 * 1024];
// Addresses of the 16-byte accesses of each thread, in its order.
inline std::vector<uint32_t> accesses[1024];

// Eight lanes at a time have 16 bytes each; those in the same 16 of 128 bytes go one after the other.
inline bool MeetInBank(const uint32_t* addresses, int count = 8) {
  uint32_t places = 0;
  for (int i = 0; i < count; ++i) places |= 1u << addresses[i] / 16 % 8;
  return __popc(places) < count;
}

inline void CountAccess(uint32_t address) {
  if (address % 16 != 0) Fail("16 bytes that are not aligned");
  accesses[threadIdx.x].push_back(address);
}

}  // namespace emulated

namespace tvm_infer::ptx {

inline uint32_t LoadShared4(uint32_t address) {
  uint32_t x;
  std::memcpy(&x, emulated::shared_memory + address, sizeof(x));
  return x;
}
inline uint2 LoadShared8(uint32_t address) { return make_uint2(LoadShared4(address), LoadShared4(address + 4)); }
inline uint4 LoadShared16(uint32_t address) {
  emulated::CountAccess(address);
  return make_uint4(LoadShared4(address), LoadShared4(address + 4), LoadShared4(address + 8), LoadShared4(address + 12));
}
inline void StoreShared16(uint32_t address, const uint4& x) {
  emulated::CountAccess(address);
  std::memcpy(emulated::shared_memory + address, &x, sizeof(x));
}
inline int4 LoadInOrder(const int4* address) { return *address; }
inline void StoreGlobal16(void* address, const uint4& x, bool is_wanted) {
  if (is_wanted) std::memcpy(address, &x, sizeof(x));
}

}  // namespace tvm_infer::ptx
