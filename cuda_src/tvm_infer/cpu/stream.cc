#include "tvm_infer/cpu/stream.h"

#include <thread>
#include <vector>

namespace tvm_infer::cpu {
namespace {

// Four running sums, so that loads and not one chain of additions set the pace.
uint64_t Sum(const uint64_t* begin, const uint64_t* end) {
  uint64_t a = 0, b = 0, c = 0, d = 0;
  for (const uint64_t* p = begin; p < end; p += 8) {
    a += p[0] ^ p[1];
    b += p[2] ^ p[3];
    c += p[4] ^ p[5];
    d += p[6] ^ p[7];
  }
  return a + b + c + d;
}

}  // namespace

uint64_t StreamRead(const void* data, int64_t bytes, int num_threads) {
  const uint64_t* words = static_cast<const uint64_t*>(data);
  const int64_t lines = bytes / 64;
  std::vector<uint64_t> sums(num_threads);
  std::vector<std::thread> threads;
  for (int t = 0; t < num_threads; ++t) {
    const uint64_t* begin = words + lines * t / num_threads * 8;
    const uint64_t* end = words + lines * (t + 1) / num_threads * 8;
    threads.emplace_back([&sums, t, begin, end] { sums[t] = Sum(begin, end); });
  }
  uint64_t total = 0;
  for (int t = 0; t < num_threads; ++t) {
    threads[t].join();
    total += sums[t];
  }
  return total;
}

}  // namespace tvm_infer::cpu
