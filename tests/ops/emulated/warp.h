// Runs a kernel's source on the host, a CTA at a time: a fiber for each thread, which meet at warp-wide operations and at barriers. Enough
// of CUDA for the kernels that only copy, compare and merge.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

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
struct int2 {
  int32_t x, y;
};
struct int4 {
  int32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline int2 make_int2(int32_t x, int32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
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
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint32_t chosen = 0;
  for (int i = 0; i < 4; ++i) chosen |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return chosen;
}
inline int32_t atomicAdd(int32_t* address, int32_t value) { return (*address += value) - value; }  // fibers take turns
inline int32_t __float2int_rd(float x) { return static_cast<int32_t>(std::floor(x)); }
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

// One CTA; threads run one after the other, each up to the next operation that others take part in.
class Cta {
 public:
  static Cta& Get() {
    static Cta cta;
    return cta;
  }

  void Run(const std::function<void()>& kernel, uint32_t num_threads) {
    kernel_ = &kernel;
    num_threads_ = num_threads;
    barrier_ = {};
    warps_.assign(num_threads / 32, {});
    while (threads_.size() < num_threads) threads_.push_back(std::make_unique<Thread>());
    for (uint32_t t = 0; t < num_threads; ++t) {
      Thread& thread = *threads_[t];
      thread.is_done = false;
      thread.turn = 0;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      thread.context.uc_link = &scheduler_;
      makecontext(&thread.context, &Cta::Start, 0);
    }
    for (uint32_t num_done = 0; num_done < num_threads;) {
      const int64_t before = steps_;
      num_done = 0;
      for (uint32_t t = 0; t < num_threads; ++t) {
        if (!threads_[t]->is_done) {
          threadIdx.x = t;
          swapcontext(&scheduler_, &threads_[t]->context);
        }
        num_done += threads_[t]->is_done;
      }
      if (steps_ == before && num_done < num_threads) Fail("threads part before an operation that all of a warp or CTA take part in");
    }
  }

  void SyncThreads() { Meet(barrier_, num_threads_); }

  // What each lane of the warp brought; the lanes before it may already be at the next such operation.
  template <typename T>
  std::vector<T> Exchange(const T& value) {
    static_assert(sizeof(T) <= kBytes);
    Warp& warp = warps_[threadIdx.x / 32];
    Slots& slots = warp.slots[threads_[threadIdx.x]->turn++ % 2];
    std::memcpy(slots.bytes[threadIdx.x % 32], &value, sizeof(T));
    Meet(warp.meeting, 32);
    std::vector<T> values(32);
    for (int lane = 0; lane < 32; ++lane) std::memcpy(&values[lane], slots.bytes[lane], sizeof(T));
    return values;
  }

 private:
  static constexpr size_t kBytes = 32;
  struct Thread {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(128 * 1024);
    bool is_done = false;
    uint32_t turn = 0;
  };
  struct Meeting {
    uint32_t num_arrived = 0, number = 0;
  };
  struct Slots {
    char bytes[32][kBytes];
  };
  struct Warp {
    Meeting meeting;
    Slots slots[2];
  };

  void Meet(Meeting& meeting, uint32_t num_threads) {
    ++steps_;
    if (++meeting.num_arrived == num_threads) {
      meeting.num_arrived = 0;
      ++meeting.number;
      return;
    }
    const uint32_t number = meeting.number, thread = threadIdx.x;
    while (meeting.number == number) swapcontext(&threads_[thread]->context, &scheduler_);
  }
  static void Start() {
    Cta& cta = Get();
    (*cta.kernel_)();
    ++cta.steps_;
    cta.threads_[threadIdx.x]->is_done = true;
  }

  const std::function<void()>* kernel_ = nullptr;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Warp> warps_;
  ucontext_t scheduler_;
  Meeting barrier_;
  uint32_t num_threads_ = 0;
  int64_t steps_ = 0;  // arrivals and ends
};

// kernel<<<grid, threads>>>(), CTA by CTA, the last first.
inline void Launch(uint32_t grid, uint32_t threads, const std::function<void()>& kernel) {
  gridDim.x = grid;
  for (uint32_t cta = grid; cta-- > 0;) {
    blockIdx.x = cta;
    Cta::Get().Run(kernel, threads);
  }
}

// Lanes whose value is true.
template <typename F>
uint32_t LanesWhere(const F& is_true) {
  uint32_t lanes = 0;
  for (int lane = 0; lane < 32; ++lane) lanes |= static_cast<uint32_t>(is_true(lane)) << lane;
  return lanes;
}

}  // namespace emulated

inline void __syncthreads() { emulated::Cta::Get().SyncThreads(); }
inline void __syncwarp() { emulated::Cta::Get().Exchange(0); }
inline uint32_t __ballot_sync(uint32_t, bool vote) {
  const std::vector<int> votes = emulated::Cta::Get().Exchange(static_cast<int>(vote));
  return emulated::LanesWhere([&](int lane) { return votes[lane] != 0; });
}
inline bool __any_sync(uint32_t all, bool vote) { return __ballot_sync(all, vote) != 0; }
inline bool __all_sync(uint32_t all, bool vote) { return __ballot_sync(all, vote) == 0xffffffff; }
inline uint32_t __match_any_sync(uint32_t, uint32_t value) {
  const std::vector<uint32_t> values = emulated::Cta::Get().Exchange(value);
  return emulated::LanesWhere([&](int lane) { return values[lane] == value; });
}
template <typename T>
T __shfl_xor_sync(uint32_t, T value, int32_t mask) {
  return emulated::Cta::Get().Exchange(value)[threadIdx.x % 32 ^ mask];
}
template <typename T>
T __shfl_sync(uint32_t, T value, int32_t lane) {
  return emulated::Cta::Get().Exchange(value)[lane % 32];
}
template <typename T>
T __shfl_up_sync(uint32_t, T value, int32_t offset) {
  const auto lane = static_cast<int32_t>(threadIdx.x % 32);
  return emulated::Cta::Get().Exchange(value)[lane >= offset ? lane - offset : lane];
}
