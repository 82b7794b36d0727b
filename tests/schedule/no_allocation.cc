// Plans random batches and counts the calls of malloc and operator new. Prints "<while growing> <in the steady state>".
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <numeric>
#include <random>
#include <vector>

#include "tvm_infer/schedule/planner.h"

static long g_allocations = 0;

// glibc's own malloc, under the name that it exports for wrappers.
extern "C" void* __libc_malloc(size_t size);
extern "C" void* malloc(size_t size) {
  ++g_allocations;
  return __libc_malloc(size);
}
void* operator new(size_t size) { return malloc(size); }
void* operator new[](size_t size) { return malloc(size); }
void operator delete(void* p) noexcept { free(p); }
void operator delete[](void* p) noexcept { free(p); }
void operator delete(void* p, size_t) noexcept { free(p); }
void operator delete[](void* p, size_t) noexcept { free(p); }

namespace {

struct Lengths {
  std::vector<int32_t> qo_indptr, kv_len;
};

Lengths MakeLengths(std::mt19937* random, int num_requests, int longest_query, int longest_kv) {
  Lengths batch;
  batch.qo_indptr.push_back(0);
  for (int r = 0; r < num_requests; ++r) {
    const int qo_len = static_cast<int>((*random)() % (longest_query + 1));
    batch.qo_indptr.push_back(batch.qo_indptr.back() + qo_len);
    batch.kv_len.push_back(qo_len + static_cast<int>((*random)() % longest_kv));
  }
  return batch;
}

}  // namespace

int main() {
  using namespace tvm_infer;
  const TileClass classes[] = {{64, 64, 1'500'000, 5'000, 15'300}, {128, 128, 2'500'000, 10'000, 11'000}};
  std::mt19937 random(0);
  std::vector<Lengths> batches;
  for (int i = 0; i < 40; ++i) {
    batches.push_back(MakeLengths(&random, 1 + i % 9, 1, 100'000));
    batches.push_back(MakeLengths(&random, 200, 1, 8192));
    batches.push_back(MakeLengths(&random, 16, 2000, 4096));
  }
  std::vector<int32_t> out(8 << 20), order(300);
  std::iota(order.begin(), order.end(), 0);
  Planner planner;
  long before = g_allocations, counts[2];
  for (long& count : counts) {  // the first round grows the scratch
    for (const int32_t fixed_split_size : {kSplitAuto, kSplitNever, 256}) {
      for (const MaskBand& band : {MaskBand{kUnbounded, 0}, MaskBand{2000, 0, 4}, MaskBand{kUnbounded, 0, 0, 1024}}) {
        const PlanParams params{132, 32, 8, band, fixed_split_size, classes, 2, SharedMergeCost{2'700'000, 9'000'000}};
        for (const Lengths& batch : batches) {
          planner.Plan(params, batch.qo_indptr.data(), batch.kv_len.data(), static_cast<int32_t>(batch.kv_len.size()), out.data(),
                       static_cast<int64_t>(out.size() * sizeof(int32_t)), int64_t{1} << 31);
          if (band == MaskBand{kUnbounded, 0}) {  // the same lengths as lists of two heads, of half the requests
            const auto num_requests = static_cast<int32_t>(batch.kv_len.size() / 2);
            PlanParams of_two = params;
            of_two.num_kv_heads = 2;
            of_two.band.right = kUnbounded;
            planner.PlanHeadLists(of_two, batch.qo_indptr.data(), batch.kv_len.data(), num_requests, out.data(),
                                  static_cast<int64_t>(out.size() * sizeof(int32_t)), int64_t{1} << 31);
          }
          if (!band.IsSharable() || fixed_split_size != kSplitAuto) continue;
          // Longest common keys of all, and more of its first half: what these are decides no size.
          const auto num_requests = static_cast<int32_t>(batch.kv_len.size());
          const SharedRun runs[] = {{0, num_requests, 1 << 28}, {0, num_requests / 2, 1 << 29}};
          planner.Plan(params, batch.qo_indptr.data(), batch.kv_len.data(), num_requests, out.data(),
                       static_cast<int64_t>(out.size() * sizeof(int32_t)), int64_t{1} << 31, {order.data(), runs, 2});
        }
      }
    }
    count = g_allocations - before;
    before = g_allocations;
  }
  std::printf("%ld %ld\n", counts[0], counts[1]);
  return 0;
}
