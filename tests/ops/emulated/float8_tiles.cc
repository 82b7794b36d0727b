// attention/decode_products_scaled.cuh and attention/widen_tile.cuh on the host (compiled with -include warp.h), for every shape of a
// kernel on 8-bit keys and values: tiles as the copy engine leaves them, its swizzle written down anew from the definition; logits, outputs
// and widened tiles against double. NaN lies in all elements that nothing may be made of. Prints how many tiles it had.
#include <algorithm>
#include <random>

#include "tvm_infer/attention/config_sm90.cuh"
#include "tvm_infer/attention/decode_products_scaled.cuh"
#include "tvm_infer/attention/widen_tile.cuh"
#include "tvm_infer/ptx/float8.cuh"

namespace {

using namespace tvm_infer;

std::mt19937 random_bits(5);
int32_t Random(int32_t low, int32_t high) { return low + static_cast<int32_t>(random_bits() % (high - low + 1)); }

// Of address bits (PTX ISA, tensor swizzling modes): the 16-byte chunk's number within `span` bytes takes the bits above 128 bytes.
uint32_t Swizzled(uint32_t address, uint32_t span) { return address ^ (address >> 7 & (span / 16 - 1)) << 4; }
uint8_t& Shared(uint32_t address) { return emulated::shared_memory[address]; }
float FromE4m3(uint8_t byte) { return ptx::HalfToFloat(ptx::E4m3::ToHalf(byte)); }

void Expect(bool holds, const char* what, int head_dim, int page_size) {
  if (holds) return;
  std::fprintf(stderr, "%s, head_dim %d, pages of %d\n", what, head_dim, page_size);
  std::exit(1);
}
void ExpectNear(double x, double expected, double size, const char* what, int head_dim, int page_size) {
  Expect(std::abs(x - expected) <= 1e-5 * size, what, head_dim, page_size);  // NaN is not near
}

template <int kHeadDim, int kPageSize, typename Element>
struct Shape {
  using Config = attention::ConfigSm90<Element, kHeadDim, kPageSize, attention::NoVariant, ptx::E4m3>;
  using Products = attention::ScaledDecodeProducts<Config>;
  static constexpr int kKeys = Config::kTileKeys, kThreads = Config::kConsumerThreads, kRows = 16;
  static constexpr int kSlices = kKeys / 16, kGroups = Config::kConsumerWarps / kSlices;
  static constexpr uint32_t kStage = 3 * Config::kStageBytes, kWide = 2 * Config::kStageBytes, kQuery = Config::kQueryOffset;
  static constexpr float kKeyScale = 0.25f;

  uint8_t tile[kKeys][kHeadDim];
  float query[kRows][kHeadDim];
  int32_t begin = Random(0, kKeys / 4), end = Random(kKeys - kKeys / 4, kKeys);

  // Keys outside [begin, end) are NaN where `is_poisoned`. Boxes of a page: panel, token, bytes; of a panel that ends behind the head the
  // rest is 0.
  void FillTile(bool is_poisoned) {
    constexpr int kPanel = kHeadDim == 64 || kHeadDim == 192 ? 64 : 128, kPanels = (kHeadDim + kPanel - 1) / kPanel;
    for (int key = 0; key < kKeys; ++key) {
      for (int c = 0; c < kPanels * kPanel; ++c) {
        uint8_t byte = static_cast<uint8_t>(Random(0, 255));
        if ((byte & 0x7f) == 0x7f) byte = 0;
        if (is_poisoned && (key < begin || key >= end)) byte = 0xff;
        if (c < kHeadDim) tile[key][c] = byte;
        const uint32_t box = kStage + key / kPageSize * kPageSize * kPanels * kPanel + c / kPanel * kPageSize * kPanel;
        Shared(Swizzled(box + key % kPageSize * kPanel + c % kPanel, kPanel)) = c < kHeadDim ? byte : 0;
      }
    }
  }
  void FillQuery(uint32_t at) {
    std::memset(&Shared(at), 0xff, Config::kQueryBytes - (at - kQuery));
    for (int row = 0; row < kRows; ++row) {
      for (int c = 0; c < kHeadDim; ++c) {
        // bf16: rows of any magnitude, beyond float16's, too
        const float x = std::ldexp(static_cast<float>(Random(-255, 255)), Element::kIsBf16 ? 10 * row - 100 : row - 12);
        const uint32_t bits = ptx::Pack<Element>(x, x);
        query[row][c] = ptx::Unpack<Element>(bits).x;
        const uint16_t half = static_cast<uint16_t>(bits);
        std::memcpy(&Shared(at + c / 64 * Config::kPanelRows * 128 + Swizzled(row * 128 + c % 64 * 2, 128)), &half, 2);
      }
    }
  }

  void Decode() {
    const uint32_t turn = kQuery + Random(0, 1) * Config::kDecodeQueryStride;
    FillQuery(turn), FillTile(true);
    static float logits[kRows][kKeys], weights[kRows][kKeys], out[kSlices][kRows][Config::kRowWidth], unscale[kRows];
    for (auto& row : weights) {
      for (float& x : row) x = static_cast<float>(Random(0, 64)) / 64;
    }
    emulated::Launch(1, kThreads, [&] {
      const uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
      const uint32_t slice = warp % kSlices, first_column = warp / kSlices * Products::kOwnColumns;
      Products::PrepareQuery(turn, unscale, warp);
      __syncthreads();
      typename Products::Query q;
      Products::LoadQuery(q, turn, unscale, kKeyScale);
      float s[8], o[Products::kOwnColumns / 8][4] = {};
      Products::Logits(s, q, kStage + Products::KeyOffset(slice * 16));
      uint32_t p[4];
      const auto weight = [&](uint32_t row, uint32_t key) { return weights[row][slice * 16 + key]; };
      for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t row = g + i % 2 * 8, key = 2 * t + i / 2 * 8;
        p[i] = ptx::Pack<ptx::Fp16>(weight(row, key), weight(row, key + 1));
        for (uint32_t e = 0; e < 2; ++e) logits[row][slice * 16 + key + e] = s[4 * (i / 2) + 2 * (i % 2) + e];
      }
      const auto first = static_cast<int32_t>(slice) * 16;
      Products::Values(o, p, kStage + Products::ValueOffset(slice * 16), static_cast<int32_t>(first_column), begin - first, end - first);
      for (int half = 0; half < 2; ++half) {
        Products::StoreRow(out[slice][g + 8 * half], o, half, static_cast<int32_t>(first_column) / 8, static_cast<int32_t>(g),
                           static_cast<int32_t>(t));
      }
    });
    for (int row = 0; row < kRows; ++row) {
      for (int key = begin; key < end; ++key) {
        double expected = 0, size = 0;
        for (int c = 0; c < kHeadDim; ++c) {
          const double term = double{query[row][c]} * FromE4m3(tile[key][c]) * kKeyScale;
          expected += term, size += std::abs(term);
        }
        ExpectNear(logits[row][key], expected, size, "a logit is wrong", kHeadDim, kPageSize);
      }
      for (int c = 0; c < kHeadDim; ++c) {
        double got = 0, expected = 0, size = 0;
        for (int slice = 0; slice < kSlices; ++slice) got += out[slice][row][(c / 8 ^ row % 8) * 8 + c % 8];
        for (int key = begin; key < end; ++key) {
          const double term = double{weights[row][key]} * FromE4m3(tile[key][c]);
          expected += term, size += std::abs(term);
        }
        ExpectNear(got, expected, size, "an output is wrong", kHeadDim, kPageSize);
      }
    }
  }

  void Widen() {
    FillTile(true);
    std::memset(&Shared(kWide), 0xff, Config::kStageBytes);
    for (auto& of : emulated::accesses) of.clear();
    emulated::Launch(1, Config::kWidenerThreads, [&] { attention::WidenTile<Config>::Run(kStage, kWide, threadIdx.x, begin, end); });
    for (int key = 0; key < kKeys; ++key) {
      for (int c = 0; c < kHeadDim; ++c) {
        uint16_t bits;
        std::memcpy(&bits, &Shared(kWide + c / 64 * kKeys * 128 + Swizzled(key * 128 + c % 64 * 2, 128)), 2);
        const float expected = key < begin || key >= end ? 0.f : FromE4m3(tile[key][c]);
        Expect(ptx::Unpack<ptx::Fp16>(bits).x == expected, "a widened element is wrong", kHeadDim, kPageSize);
      }
    }
    for (int lane = 0; lane < Config::kWidenerThreads; lane += 8) {
      for (size_t i = 0; i < emulated::accesses[0].size(); ++i) {
        uint32_t together[8];
        for (int j = 0; j < 8; ++j) together[j] = emulated::accesses[lane + j].at(i);
        Expect(!emulated::MeetInBank(together), "accesses of widening meet in a bank", kHeadDim, kPageSize);
      }
    }
  }
};

int32_t num_tiles = 0;

template <int kHeadDim, int kPageSize, typename Element>
void RunShape() {
  for (int i = 0; i < 2; ++i, num_tiles += 2) {
    static Shape<kHeadDim, kPageSize, Element> shape;
    shape = {};
    shape.begin = i == 0 ? 0 : shape.begin, shape.end = i == 0 ? shape.kKeys : shape.end;
    shape.Decode(), shape.Widen();
  }
}
template <int kHeadDim>
void RunHeadDim() {
  RunShape<kHeadDim, 16, ptx::Bf16>();
  RunShape<kHeadDim, 32, ptx::Fp16>();
  RunShape<kHeadDim, 64, ptx::Bf16>();
}

}  // namespace

int main() {
  RunHeadDim<64>(), RunHeadDim<80>(), RunHeadDim<96>(), RunHeadDim<128>(), RunHeadDim<192>(), RunHeadDim<256>();
  std::printf("%d\n", num_tiles);
}
