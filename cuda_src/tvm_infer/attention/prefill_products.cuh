// The matrix products of the prefill class, issued by one warpgroup: turns, descriptors, operands in shared memory and in registers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "tvm_infer/attention/consumer.cuh"
#include "tvm_infer/attention/mask.cuh"
#include "tvm_infer/ptx/sync.cuh"
#include "tvm_infer/ptx/wgmma.cuh"
#include "tvm_infer/tile/descriptor.cuh"

namespace tvm_infer::attention {

template <typename Config>
class PrefillProducts {
 protected:
  // 8-bit keys and values are float16 by now, and queries and weights beside them, too.
  using Operand = std::conditional_t<Config::kIsScaled, ptx::Fp16, typename Config::Element>;
  static constexpr int kHeadDim = Config::kHeadDim, kHeadDimVo = Config::kHeadDimVo, kTileKeys = Config::kTileKeys;
  static constexpr int kRows = Config::kPanelRows;
  static constexpr int kOutputs = kHeadDimVo / 2;  // fp32 accumulators a thread
  static constexpr int kLogits = kTileKeys / 2;    // the same of a tile

  __device__ __forceinline__ explicit PrefillProducts(Consumer<Config>& c)
      : c_(c), warpgroup_(__shfl_sync(0xffffffff, c.Thread() / 128, 0)) {}

  __device__ __forceinline__ void WaitTurn() { ptx::BarrierSync(Config::kBarrierTurn + warpgroup_, Config::kConsumerThreads); }
  __device__ __forceinline__ void PassTurn() { ptx::BarrierArrive(Config::kBarrierTurn + 1 - warpgroup_, Config::kConsumerThreads); }

  // s = Q @ K^T, asynchronous.
  __device__ __forceinline__ void IssueLogits(float (&s)[kLogits], uint32_t query, uint32_t k_stage) {
    const ptx::Descriptor q = tile::Uniform(
        tile::MatrixDescriptor(c_.PrefillQuery(query) + warpgroup_ * kRows * Config::kRowWidth * 2, 0, tile::kSwizzleAtomBytes));
    const ptx::Descriptor k = tile::Uniform(tile::MatrixDescriptor(k_stage, 0, tile::kSwizzleAtomBytes));
    // NOTE: the first product overwrites s. Said so where registers are short, for the weights before would live until here; elsewhere the
    // compiler's order of things is better without.
    if constexpr (Config::kChangesKeys) ptx::DefineRegisters(s);
    ptx::PinRegisters(s);
    ptx::WgmmaFence();
#pragma unroll
    for (int d = 0; d < kHeadDim; d += 16) {
      const int panel = d / tile::kPanelElements, bytes = d % tile::kPanelElements * 2;
      ptx::WgmmaSharedA<Operand>(s, tile::Advance(q, panel * kRows * tile::kPanelRowBytes + bytes),
                                 tile::Advance(k, panel * kTileKeys * tile::kPanelRowBytes + bytes), d > 0);
    }
    ptx::WgmmaCommit();
    ptx::PinRegisters(s);
  }

  // o (+)= P @ V, asynchronous. Of a tile that is at most half full only that half.
  __device__ __forceinline__ void IssueValues(float (&o)[kOutputs], uint32_t (&p)[kLogits / 2], uint32_t v_stage, bool accumulate,
                                              int32_t num_keys) {
    // 8-bit values were widened into one box.
    constexpr int kBoxKeys = Config::kIsScaled ? kTileKeys : Config::kBoxKeys;
    using Boxes = tile::PageBoxes<kBoxKeys, kHeadDimVo>;
    // Pages of 8 tokens: the next 8 keys are the next page.
    constexpr uint32_t kNext8Keys = kBoxKeys == 8 ? Boxes::kPageBytes : tile::kSwizzleAtomBytes;
    const ptx::Descriptor v = tile::Uniform(tile::MatrixDescriptor(v_stage, Boxes::kPanelBytes, kNext8Keys));
    ptx::PinRegisters(o);
    ptx::PinRegisters(p);
    const auto issue = [&](int last) {
      ptx::WgmmaFence();
#pragma unroll
      for (int key = 0; key < last; key += 16) {
        const uint32_t bytes = key / kBoxKeys * Boxes::kPageBytes + key % kBoxKeys * tile::kPanelRowBytes;
        // NOTE: a kernel of 512 threads may not have an instruction with 128 registers and more, and accumulates 128 columns at a time.
        if constexpr (Config::kWidenerThreads > 0 && kHeadDimVo == 256) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            ptx::WgmmaRegisterA<Operand>(reinterpret_cast<float(&)[kOutputs / 2]>(o[half * kOutputs / 2]), p + key / 4,
                                         tile::Advance(v, bytes + half * 2 * Boxes::kPanelBytes), key > 0 || accumulate);
          }
        } else {
          ptx::WgmmaRegisterA<Operand>(o, p + key / 4, tile::Advance(v, bytes), key > 0 || accumulate);
        }
      }
      ptx::WgmmaCommit();
    };
    // NOTE: by a shuffled value, so that the branch is known to be uniform: else the compiler would wait after each product.
    if (__shfl_sync(0xffffffff, num_keys, 0) > kTileKeys / 2) {
      issue(kTileKeys);
    } else {
      issue(kTileKeys / 2);
    }
    ptx::PinRegisters(o);
  }

  __device__ __forceinline__ static void PackWeights(uint32_t (&p)[kLogits / 2], const float (&s)[kLogits]) {
#pragma unroll
    for (int i = 0; i < kLogits / 2; ++i) p[i] = ptx::Pack<Operand>(s[2 * i], s[2 * i + 1]);
  }

  // Slots of a tile of V without a key of this work: before `begin`, and from `end` to the end of its box (keys of the tile). Whole boxes
  // behind the last are zero already; gathered slots all are.
  __device__ __forceinline__ void CleanValues(uint32_t v_stage, int32_t begin, int32_t end) {
    constexpr int kBoxKeys = Config::kBoxKeys;
    const int32_t box_end = min((end + kBoxKeys - 1) / kBoxKeys * kBoxKeys, kTileKeys);
    if (Config::kIsGather || Config::kIsScaled || (begin <= 0 && end >= box_end)) return;
    const int32_t thread = c_.ThreadAnew();
    ZeroValues<kBoxKeys, kHeadDimVo>(v_stage, 0, begin, thread % 128);
    ZeroValues<kBoxKeys, kHeadDimVo>(v_stage, end, box_end, thread % 128);
    ptx::FenceProxyAsyncShared();
    ptx::BarrierSync(Config::kBarrierWarpgroup + warpgroup_, 128);
  }

  Consumer<Config>& c_;
  const int32_t warpgroup_;
};

}  // namespace tvm_infer::attention
