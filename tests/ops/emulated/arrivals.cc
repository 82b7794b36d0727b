// kernels/arrivals.cuh on the host (compiled with -include warp.h): every order in which a few warps may arrive, look, leave and sign, and
// random orders of many. In the end all of a merge is done and its word is 0, and nobody looks at it once it is. Prints how many orders it
// ran.
#include "tvm_infer/kernels/arrivals.cuh"

#include <algorithm>
#include <random>

namespace {

using tvm_infer::kernels::Arrivals;

enum Stage { kComes, kWaits, kSigns, kEnds, kGone };

struct Warp {
  bool may_help = false;
  Stage stage = kComes;
  bool helps = false, is_last = false;
  int32_t place = 0;
  Arrivals now{0, 0};
};

// One merge: its word, and what has been done of it. A step of a warp is one access to the word, as in kernels/merge_tiles.cuh.
struct Model {
  std::vector<Warp> warps;
  uint32_t word = 0;
  bool is_reset = false;
  std::vector<int32_t> done;  // how often, of each share; done[0] alone where one warp does all
  int32_t shares = 0;

  explicit Model(uint32_t helpers, int32_t count) : warps(count) {
    for (int32_t i = 0; i < count; ++i) warps[i].may_help = helpers >> i % 32 & 1;
  }
  int32_t Count() const { return static_cast<int32_t>(warps.size()); }
  void Touch() const {
    if (is_reset) Fail("the word is looked at after its end");
  }
  static void Fail(const char* what) {
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
  }
  void Ready(Warp& w) {
    const int32_t of = w.now.Shares(w.helps, w.is_last);
    if (of > 0) {
      if (shares != 0 && shares != of) Fail("warps disagree on the number of shares");
      shares = of;
      done.resize(of);
      ++done[of == 1 ? 0 : w.place];
    }
    w.stage = w.helps ? kSigns : kEnds;
  }
  // `leaves`: where it waits, it has waited long enough.
  void Step(Warp& w, bool leaves) {
    Touch();
    switch (w.stage) {
      case kComes: {
        w.now = {0, Count()};
        w.helps = w.may_help && w.now.MayHaveHelpers();
        const uint32_t added = w.helps ? Arrivals::kArrived + Arrivals::kHelps : Arrivals::kArrived;
        w.now.word = word;
        w.place = w.now.Helpers();
        word += added;
        w.now.word += added;
        w.is_last = w.now.AreAll();
        if (w.is_last) return Ready(w), End(w);
        w.stage = w.helps ? kWaits : kGone;
        return;
      }
      case kWaits:
        // What it saw last decides, and the exchange fails where that is no more so.
        if (leaves && !w.now.AreAll() && word == w.now.word) {
          word += Arrivals::kLeft;
          w.stage = kGone;
          return;
        }
        w.now.word = word;
        if (w.now.AreAll()) Ready(w);
        return;
      case kSigns:
        word += Arrivals::kSeen;
        w.now.word = word;
        w.stage = kEnds;
        return End(w);
      default:
        Fail("a step behind the end");
    }
  }
  // Not a step of its own: its store follows from what was seen.
  void End(Warp& w) {
    if (w.stage != kEnds) return;
    w.stage = kGone;
    if (!w.now.AreDone()) return;
    word = 0;
    is_reset = true;
  }
  bool IsOver() const {
    for (const Warp& w : warps) {
      if (w.stage != kGone) return false;
    }
    return true;
  }
  void Check() const {
    if (!is_reset || word != 0) Fail("the word is not 0 in the end");
    if (shares == 0) Fail("nobody has merged");
    for (int32_t times : done) {
      if (times != 1) Fail("a share is done not at all, or twice");
    }
  }
};

// All orders. A look that changes nothing is not repeated: `looked` has who would see what it has seen.
int64_t Explore(const Model& model) {
  if (model.IsOver()) {
    model.Check();
    return 1;
  }
  int64_t orders = 0;
  for (int32_t i = 0; i < model.Count(); ++i) {
    const Warp& w = model.warps[i];
    if (w.stage == kGone) continue;
    for (const bool leaves : {false, true}) {
      if (leaves && w.stage != kWaits) continue;
      if (!leaves && w.stage == kWaits && model.word == w.now.word) continue;
      Model next = model;
      next.Step(next.warps[i], leaves);
      orders += Explore(next);
    }
  }
  return orders;
}

int64_t Random(std::mt19937& random, int32_t count) {
  Model model(random(), count);
  while (!model.IsOver()) {
    Warp& w = model.warps[random() % count];
    if (w.stage != kGone) model.Step(w, random() % 64 == 0);
  }
  model.Check();
  return 1;
}

// Each chunk of a merge has one share that takes it, whatever turn the merge has.
void CheckChunks(int32_t shares, int32_t turn, int32_t chunks) {
  std::vector<int32_t> taken(chunks);
  for (int32_t place = 0; place < shares; ++place) {
    for (int32_t i = Arrivals::FirstChunk(place, shares, turn, chunks); i < chunks; i += shares) ++taken[i];
  }
  for (int32_t times : taken) {
    if (times != 1) Model::Fail("a chunk is merged not at all, or twice");
  }
}
// Merges of fewer chunks than shares, one behind the other: no share has two chunks more than another.
void CheckTurns(int32_t shares, int32_t chunks) {
  std::vector<int32_t> of_share(shares);
  for (int32_t turn = 0; turn < 9; ++turn) {
    for (int32_t place = 0; place < shares; ++place) {
      for (int32_t i = Arrivals::FirstChunk(place, shares, turn, chunks); i < chunks; i += shares) ++of_share[place];
    }
    const auto [least, most] = std::minmax_element(of_share.begin(), of_share.end());
    if (*most > *least + 1) Model::Fail("some shares have more of a warp's merges than others");
  }
}

}  // namespace

int main() {
  int64_t orders = 0;
  for (int32_t shares = 1; shares <= 40; ++shares) {
    for (int32_t chunks = 1; chunks <= 40; ++chunks) {
      for (int32_t turn = 0; turn < 9; ++turn) CheckChunks(shares, turn, chunks);
      CheckTurns(shares, chunks);
    }
  }
  for (int32_t count = 1; count <= 4; ++count) {
    for (uint32_t helpers = 0; helpers < 1u << count; ++helpers) orders += Explore(Model(helpers, count));
  }
  std::mt19937 random(1);
  for (int32_t i = 0; i < 400; ++i) orders += Random(random, 1 + i % 60);
  for (int32_t count : {254, 255, 256, 300, 513}) orders += Random(random, count);
  std::printf("%lld\n", static_cast<long long>(orders));
  return 0;
}
