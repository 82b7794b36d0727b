// Counts what the cache manager allocates in the steady state, and times its operations, with all keys or a window. Prints: allocations,
// ns per decode step.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <vector>

#include "tvm_infer/kv/cache_manager.h"
#include "tvm_infer/kv/shared_pages.h"

namespace {
long g_allocations = 0;
}
void* operator new(size_t size) {
  ++g_allocations;
  if (void* p = std::malloc(size)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }

// Allocations of the third step that looks for shared pages, of forks of a prompt and forks of these; 1000 if it does not find the 9 runs.
static long FindShared() {
  tvm_infer::kv::CacheManager manager({16, 1000, 16, 1000});
  tvm_infer::kv::SharedPages shared_pages;
  const auto grow = [&](const std::vector<int64_t>& ids, int64_t length) -> const tvm_infer::kv::Step& {
    const std::vector<int64_t> lengths(ids.size(), length);
    const auto& step = manager.BeginForward(ids.data(), lengths.data(), static_cast<int64_t>(ids.size()));
    manager.EndForward();
    return step;
  };
  manager.Add(0);
  grow({0}, 1000);
  std::vector<int64_t> ids;
  for (int64_t child = 1; child <= 16; ++child) {
    manager.Fork(child % 2 == 1 ? 0 : child - 1, ids.emplace_back(child), -1);
    grow({child}, 40);
  }
  long allocations = 0;
  for (int i = 0; i < 3; ++i) {
    const auto& step = grow(ids, 17);
    const long before = g_allocations;
    if (shared_pages.Find(step, manager.pool(), 16).num_runs != 9) return 1000;
    allocations = g_allocations - before;
  }
  return allocations;
}

int main(int argc, char**) {
  using tvm_infer::kv::CacheManager;
  constexpr int kBatch = 64, kPrompt = 1000, kSteps = 500, kRounds = 3;
  CacheManager manager({16, 20000, kBatch, kBatch * kPrompt});
  if (argc > 1) manager.SetWindow({200});
  std::vector<int64_t> ids(kBatch), prompt(kBatch, kPrompt), one(kBatch, 1), probe(kBatch, 40);
  long allocations = FindShared();
  long long nanoseconds = 0, total = 0;
  for (int round = 0; round < kRounds; ++round) {
    // sequences come and go: the second round meets page lists that have seen these lengths
    for (int i = 0; i < kBatch; ++i) manager.Add(ids[i] = round * 1000 + i);
    const long before = g_allocations;
    const auto start = std::chrono::steady_clock::now();
    manager.BeginForward(ids.data(), prompt.data(), kBatch);
    manager.EndForward();
    for (int step = 0; step < kSteps; ++step) {
      total += manager.BeginForward(ids.data(), one.data(), kBatch).page_indices.size();
      if (step % 10 == 0) {
        manager.CancelForward();
      } else {
        manager.EndForward();
      }
      if (step % 10 == 5) total += manager.PagesAfter(ids.data(), probe.data(), kBatch);
      if (step % 50 == 25) manager.Pop(ids[step % kBatch], argc > 1 ? 1 : 20);
    }
    nanoseconds = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count() / kSteps;
    if (round > 0) allocations += g_allocations - before;
    for (int i = 0; i < kBatch; ++i) manager.Remove(ids[i]);
  }
  std::printf("%ld %lld %lld\n", allocations, nanoseconds, total);
  return manager.pool().num_free() == 20000 ? 0 : 1;
}
