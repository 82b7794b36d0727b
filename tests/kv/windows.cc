// Windows with sinks and chunks in the core alone: random steps, pops and forks, and after each step exactly the pages that sinks and
// window need. Prints "ok <pages given back>", or what is wrong.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "tvm_infer/error.h"
#include "tvm_infer/kv/cache_manager.h"

namespace {

using namespace tvm_infer;
using namespace tvm_infer::kv;

void Check(bool holds, const char* what, int32_t page_size, const KeyWindow& window) {
  if (holds) return;
  std::printf("%s: page_size %d, left %d, num_sink %d, chunk %d\n", what, page_size, window.left, window.num_sink, window.chunk);
  std::exit(1);
}

template <typename F>
std::string ErrorOf(const F& f) {
  try {
    f();
  } catch (const Error& error) {
    return std::string(error.kind()) + ": " + error.what();
  }
  return "";
}

bool Contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

// A lone sequence in random steps: entries before the first page that its last step's first token saw are given back, but for sinks.
int64_t RunCase(int32_t page_size, const KeyWindow& window, unsigned seed) {
  std::mt19937 random(seed);
  CacheManager manager({page_size, 4000 / page_size + 1, 4, 500});
  manager.SetWindow(window);
  const int64_t id = 5;
  manager.Add(id);
  int64_t given_back = 0;
  for (int step = 0; step < 300; ++step) {
    const int64_t start = manager.Length(id), n = random() % 4 != 0 ? 1 : random() % 97;
    const std::vector<int32_t> before = manager.Pages(id);
    const int64_t predicted = manager.PagesAfter(&id, &n, 1);
    manager.BeginForward(&id, &n, 1);
    Check(manager.pool().num_used() == predicted, "PagesAfter() is not what a step takes", page_size, window);
    Check(manager.step().page_indices == manager.Pages(id), "a step's table is not the sequence's", page_size, window);
    manager.EndForward();
    const int64_t num_sink_pages = (window.num_sink + page_size - 1) / page_size, first = window.FirstSeen(start) / page_size;
    const std::vector<int32_t>& pages = manager.Pages(id);
    for (int64_t i = 0; i < static_cast<int64_t>(pages.size()); ++i) {
      const bool is_gone = i >= num_sink_pages && i < first;
      Check((pages[i] == kNoPage) == is_gone, "a page is kept that nobody sees, or the other way round", page_size, window);
      if (i < static_cast<int64_t>(before.size()) && before[i] != kNoPage && is_gone) ++given_back;
    }
    const int64_t held = std::count_if(pages.begin(), pages.end(), [](int32_t page) { return page != kNoPage; });
    Check(held == manager.pool().num_used() && held <= manager.PeakPages(manager.Length(id), 97), "pages held", page_size, window);
    if (random() % 8 == 0) manager.Pop(id, random() % (n + 1));  // what the step appended can go again
  }
  const int64_t end = manager.Length(id), sinks = int64_t{(window.num_sink + page_size - 1) / page_size} * page_size;
  manager.Fork(id, 6, sinks);  // within the sinks' pages nothing is missing
  manager.Fork(id, 7, -1);
  Check(Contains(ErrorOf([&] { manager.Fork(id, 8, end / 2); }), "left the window and were given back"), "a fork", page_size, window);
  Check(Contains(ErrorOf([&] { manager.SetWindow({window.left, window.num_sink + 1000}); }), "argument `num_sink` is"), "more sinks",
        page_size, window);
  Check(Contains(ErrorOf([&] { manager.SetWindow({window.max_left() + 1000, window.num_sink}); }), "argument `window_left` is"),
        "a wider window", page_size, window);
  Check(Contains(ErrorOf([&] { manager.SetWindow({-1, window.num_sink, 100'000}); }), "argument `chunk` is 100000"), "a longer chunk",
        page_size, window);
  manager.SetWindow({0, window.num_sink / 2, window.chunk});
  manager.Truncate(id, sinks);
  const int64_t one = 1;
  manager.BeginForward(&id, &one, 1);
  manager.EndForward();
  manager.Clear();
  Check(manager.pool().num_used() == 0, "pages are lost", page_size, window);
  return given_back;
}

}  // namespace

int main() {
  int64_t given_back = 0;
  unsigned seed = 0;
  for (int32_t page_size : {1, 3, 16}) {
    for (int32_t left : {0, 1, 31, 200}) {
      for (int32_t num_sink : {0, 1, 4, 33}) given_back += RunCase(page_size, {left, num_sink}, ++seed);
    }
    for (int32_t chunk : {1, 32, 150}) {
      for (int32_t left : {-1, 20}) given_back += RunCase(page_size, {left, chunk % 5, chunk}, ++seed);
    }
  }
  const KeyWindow all = Union({5, 2}, {-1, 0});
  Check(!all.is_bounded() && all.num_sink == 2 && all.FirstSeen(1 << 30) == 0, "a union with all keys", 0, all);
  const struct {
    KeyWindow a, b, expected;
  } unions[] = {{{5, 2}, {9, 1}, {9, 2}},
                {{-1, 0, 8}, {-1, 3, 8}, {-1, 3, 8}},
                {{5, 0, 8}, {6, 0, 8}, {6, 0, 8}},
                {{-1, 0, 8}, {5, 0, 8}, {-1, 0, 8}},
                {{-1, 0, 8}, {5}, {7}},
                {{-1, 0, 8}, {-1, 0, 12}, {11}},
                {{-1, 0, 8}, {-1}, {-1}}};
  for (const auto& u : unions) {
    Check(Union(u.a, u.b) == u.expected && Union(u.b, u.a) == u.expected, "a union", 0, u.a);
    for (int64_t p = 0; p < 100; ++p) {
      Check(u.expected.FirstSeen(p) <= std::min(u.a.FirstSeen(p), u.b.FirstSeen(p)), "a union hides", 0, u.a);
    }
  }
  std::printf("ok %lld\n", static_cast<long long>(given_back));
}
