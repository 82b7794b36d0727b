// Runs a kernel that TVM generated on the host, a block at a time: a std::thread for each of its threads. All of them must reach the same
// barriers and warp-wide operations in the same order.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx;
inline Index blockIdx;

using uint = unsigned;
struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};

struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  explicit nv_bfloat16(float value) {  // to nearest, ties to even; no NaN
    uint32_t word;
    std::memcpy(&word, &value, 4);
    bits = static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
  operator float() const {
    const uint32_t word = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
};
struct nv_bfloat162 {
  nv_bfloat16 x, y;
};
struct nv_bfloat164 {
  nv_bfloat16 x, y, z, w;
};

namespace emulated {
inline std::unique_ptr<std::barrier<>> barrier;
inline float exchanged[1024];
}  // namespace emulated

inline void __syncthreads() { emulated::barrier->arrive_and_wait(); }
inline unsigned __activemask() { return 0xffffffffu; }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }

// Value of the lane `source`, or the thread's own where that is in another warp.
inline float Exchange(float value, unsigned source) {
  emulated::exchanged[threadIdx.x] = value;
  __syncthreads();
  const float other = source / 32 == threadIdx.x / 32 ? emulated::exchanged[source] : value;
  __syncthreads();
  return other;
}
inline float __shfl_down_sync(unsigned, float value, unsigned delta, int) { return Exchange(value, threadIdx.x + delta); }
inline float __shfl_sync(unsigned, float value, unsigned lane, int) {
  return Exchange(value, threadIdx.x / 32 * 32 + lane);
}

namespace emulated {

template <typename F>
void Launch(unsigned blocks, unsigned threads, const F& kernel) {
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    barrier = std::make_unique<std::barrier<>>(threads);
    std::vector<std::jthread> running;
    for (unsigned t = 0; t < threads; ++t) {
      running.emplace_back([&, t] {
        threadIdx.x = t;
        kernel();
      });
    }
  }
}

template <typename T>
std::vector<T> Read(const char* path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  std::vector<T> values(static_cast<size_t>(file.tellg()) / sizeof(T));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(T)));
  return values;
}

template <typename T>
void Write(const char* path, const std::vector<T>& values) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(T)));
}

}  // namespace emulated
