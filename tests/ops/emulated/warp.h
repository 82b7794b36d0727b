// Runs a kernel's source on the host, a warp at a time: 32 fibers that meet at warp-wide operations. Enough of CUDA for the kernels that
// only copy and merge: no shared memory, no barriers of a CTA, no atomics.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct Index {
  uint32_t x;
};
inline Index threadIdx, blockIdx, gridDim;

struct uint4 {
  uint32_t x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct float2 {
  float x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __uint_as_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}

namespace emulated {

[[noreturn]] inline void Fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

// One warp; lanes run one after the other up to the next warp-wide operation, which all 32 must reach together.
class Warp {
 public:
  static Warp& Get() {
    static Warp warp;
    return warp;
  }

  void Run(const std::function<void()>& kernel, uint32_t first_thread) {
    kernel_ = &kernel;
    for (int lane = 0; lane < 32; ++lane) {
      Lane& l = lanes_[lane];
      l.is_done = false;
      getcontext(&l.context);
      l.context.uc_stack.ss_sp = l.stack.data();
      l.context.uc_stack.ss_size = l.stack.size();
      l.context.uc_link = &scheduler_;
      makecontext(&l.context, &Warp::Start, 0);
    }
    for (int num_done = 0; num_done < 32;) {
      num_done = 0;
      votes_ = 0;
      for (lane_ = 0; lane_ < 32; ++lane_) {
        threadIdx.x = first_thread + lane_;
        swapcontext(&scheduler_, &lanes_[lane_].context);
        num_done += lanes_[lane_].is_done;
      }
      if (num_done != 0 && num_done != 32) Fail("lanes of a warp part before a warp-wide operation");
      result_ = votes_;
    }
  }

  uint32_t Ballot(bool vote) {
    votes_ |= static_cast<uint32_t>(vote) << lane_;
    swapcontext(&lanes_[lane_].context, &scheduler_);
    return result_;
  }

 private:
  struct Lane {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(128 * 1024);
    bool is_done;
  };
  static void Start() {
    Warp& warp = Get();
    (*warp.kernel_)();
    warp.lanes_[warp.lane_].is_done = true;
  }

  const std::function<void()>* kernel_ = nullptr;
  std::vector<Lane> lanes_ = std::vector<Lane>(32);
  ucontext_t scheduler_;
  int lane_ = 0;
  uint32_t votes_ = 0, result_ = 0;
};

// kernel<<<grid, threads>>>(), CTA by CTA, the last first.
inline void Launch(uint32_t grid, uint32_t threads, const std::function<void()>& kernel) {
  gridDim.x = grid;
  for (uint32_t cta = grid; cta-- > 0;) {
    blockIdx.x = cta;
    for (uint32_t first = 0; first < threads; first += 32) Warp::Get().Run(kernel, first);
  }
}

}  // namespace emulated

inline uint32_t __ballot_sync(uint32_t, bool vote) { return emulated::Warp::Get().Ballot(vote); }
inline bool __any_sync(uint32_t, bool vote) { return emulated::Warp::Get().Ballot(vote) != 0; }
inline void __syncwarp() { emulated::Warp::Get().Ballot(false); }
