// Counts what the cache manager allocates in the steady state, and times its operations, with all keys, a window, or prefixes that are
// reused ("prefix": the pool is small, and half of each prompt is the same). Prints: allocations, ns per decode step.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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

int main(int argc, char** argv) {
  using tvm_infer::kv::CacheManager;
  constexpr int kBatch = 64, kPrompt = 1000, kSteps = 500, kRounds = 3;
  const bool has_window = argc > 1 && std::strcmp(argv[1], "window") == 0, reuses = argc > 1 && !has_window;
  const int num_pages = reuses ? 7000 : 20000;
  CacheManager manager({16, num_pages, kBatch, kBatch * kPrompt});
  if (has_window) manager.SetWindow({200});
  if (reuses) manager.EnablePrefixReuse();
  std::vector<int64_t> ids(kBatch), prompt(kBatch, kPrompt), one(kBatch, 1), probe(kBatch, 40), tokens(kBatch * kPrompt);
  long allocations = FindShared();
  long long nanoseconds = 0, total = 0;
  for (int round = 0; round < kRounds; ++round) {
    // sequences come and go: the second round meets page lists that have seen these lengths
    for (int i = 0; i < kBatch; ++i) {
      ids[i] = round * 1000 + i;
      if (!reuses) {
        manager.Add(ids[i]);
        continue;
      }
      int64_t* text = &tokens[i * kPrompt];
      for (int t = 0; t < kPrompt; ++t) text[t] = t < kPrompt / 2 ? t : 1'000'000 * ids[i] + t;
      prompt[i] = kPrompt - manager.AddWithPrefix(ids[i], text, kPrompt, 0);
      if (round > 0 && prompt[i] > kPrompt - kPrompt / 2 + 16) return 1;
    }
    if (reuses) {  // what is left to append
      std::vector<int64_t> rest;
      for (int i = 0; i < kBatch; ++i)
        rest.insert(rest.end(), tokens.begin() + (i + 1) * kPrompt - prompt[i], tokens.begin() + (i + 1) * kPrompt);
      rest.resize(tokens.size());
      tokens = rest;
    }
    const long before = g_allocations;
    const auto start = std::chrono::steady_clock::now();
    manager.BeginForward(ids.data(), prompt.data(), kBatch);
    if (reuses) manager.NoteTokens(tokens.data());
    manager.EndForward();
    for (int step = 0; step < kSteps; ++step) {
      total += manager.BeginForward(ids.data(), one.data(), kBatch).page_indices.size();
      if (reuses) manager.NoteTokens(ids.data());
      if (step % 10 == 0) {
        manager.CancelForward();
      } else {
        manager.EndForward();
      }
      if (step % 10 == 5) total += manager.PagesAfter(ids.data(), probe.data(), kBatch);
      if (step % 50 == 25) manager.Pop(ids[step % kBatch], has_window ? 1 : 20);
    }
    nanoseconds = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count() / kSteps;
    if (round > 0) allocations += g_allocations - before;
    for (int i = 0; i < kBatch; ++i) manager.Remove(ids[i]);
  }
  std::printf("%ld %lld %lld\n", allocations, nanoseconds, total);
  if (reuses && manager.prefixes().stats().evictions == 0) return 1;
  return manager.pool().num_free() == num_pages ? 0 : 1;
}
