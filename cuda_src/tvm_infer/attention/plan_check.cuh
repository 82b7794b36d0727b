// Whether a plan on the device is one that this launch can execute. A captured graph is replayed with plans that no host code has seen.
//
// One warp checks, a lane for each word of the header (0 … 15 and 24 … 39), while the first works are on their way: the answer costs a
// compare behind a load that is waited for anyway.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tvm_infer/attention/params.cuh"
#include "tvm_infer/schedule/plan.h"

namespace tvm_infer::attention {

class PlanCheck {
 public:
  // By a whole warp. `grid`: CTAs that were launched.
  __device__ __forceinline__ PlanCheck(const PlanView& plan, const cuda::ExpectedPlan& expected, int32_t grid) {
    const int32_t lane = threadIdx.x % 32;
    word_ = __ldg(reinterpret_cast<const int32_t*>(plan.header) + (lane < kFirstWords ? lane : lane + kSkippedWords));
    const int32_t num_requests = __ldg(&plan.header->num_requests);
    const auto equals = [&](int32_t word, int32_t value) {
      if (lane == word) least_ = most_ = value;
    };
    const auto at_most = [&](int32_t word, int32_t value) {
      if (lane == word) least_ = 0, most_ = value;
    };
    equals(kMagic, kPlanMagic);
    equals(kVersion, kPlanVersion);
    if ((expected.capture_key[0] | expected.capture_key[1]) != 0) {
      equals(kCaptureKey, static_cast<int32_t>(expected.capture_key[0]));
      equals(kCaptureKey + 1, static_cast<int32_t>(expected.capture_key[1]));
    }
    equals(kNumKvHeads, expected.num_kv_heads);
    equals(kGroupSize, expected.group_size);
    at_most(kNumCtas, grid);
    at_most(kNumTokens, expected.max_tokens);
    at_most(kNumPartialRows, expected.max_partial_rows);
    at_most(kNumKvLists, expected.max_kv_lists);
    if ((expected.features & cuda::kSharedWorks) == 0) equals(kNumSharedWorks, 0);
    if ((expected.features & cuda::kRowMasks) == 0) equals(kNumSink, 0), equals(kChunk, 0);
    if ((expected.features & cuda::kHeadLists) == 0 && lane == kNumKvLists) {
      has_head_lists_ = word_ != num_requests && !IsBad();
      if (has_head_lists_) least_ = most_ = num_requests;
    }
  }

  // This lane's word forbids CTA `cta` to go on: the plan is refused, or has no such CTA.
  __device__ __forceinline__ bool Stops(int32_t cta) const { return IsBad() || (threadIdx.x % 32 == kNumCtas && word_ <= cta); }

  // Leaves the reason in the plan, if it was refused. Of something that is no plan of this version not even that word's place is known.
  // By the whole warp, of one CTA.
  __device__ __forceinline__ void Report(const PlanView& plan) const {
    const uint32_t bad = __ballot_sync(0xffffffff, IsBad()), head_lists = __ballot_sync(0xffffffff, has_head_lists_);
    if (threadIdx.x % 32 != 0 || bad == 0 || (bad >> kMagic & 1) != 0 || (bad >> kVersion & 1) != 0) return;
    PlanRefusal reason = kOtherCaptureKey;
    if (bad >> kNumSink & 1 || bad >> kChunk & 1) reason = kMaskWithoutVariant;
    if (bad >> kNumSharedWorks & 1) reason = kSharedWithVariant;
    if (bad >> kNumKvLists & 1) reason = head_lists != 0 ? kHeadListsRefused : kTooManyLists;
    if (bad >> kNumPartialRows & 1) reason = kTooManyPartials;
    if (bad >> kNumTokens & 1) reason = kTooManyTokens;
    if (bad >> kNumCtas & 1) reason = kTooManyCtas;
    if (bad >> kNumKvHeads & 1 || bad >> kGroupSize & 1) reason = kOtherHeads;
    plan.tickets()[kRefusalTicket] = reason;
  }

 private:
  // Lanes of words of the header: the first 16, and 16 from 24 on.
  static constexpr int32_t kFirstWords = 16, kSkippedWords = 8;
  static constexpr int32_t kMagic = offsetof(PlanHeader, magic) / 4;
  static constexpr int32_t kVersion = offsetof(PlanHeader, version) / 4;
  static constexpr int32_t kCaptureKey = offsetof(PlanHeader, capture_key) / 4;
  static constexpr int32_t kNumCtas = offsetof(PlanHeader, num_ctas) / 4;
  static constexpr int32_t kNumTokens = offsetof(PlanHeader, num_tokens) / 4;
  static constexpr int32_t kNumKvHeads = offsetof(PlanHeader, num_kv_heads) / 4;
  static constexpr int32_t kGroupSize = offsetof(PlanHeader, group_size) / 4;
  static constexpr int32_t kNumKvLists = offsetof(PlanHeader, num_kv_lists) / 4;
  static constexpr int32_t kNumPartialRows = offsetof(PlanHeader, num_partial_rows) / 4;
  static constexpr int32_t kNumSharedWorks = offsetof(PlanHeader, num_shared_works) / 4;
  static constexpr int32_t kNumSink = offsetof(PlanHeader, num_sink) / 4 - kSkippedWords;
  static constexpr int32_t kChunk = offsetof(PlanHeader, chunk) / 4 - kSkippedWords;
  static_assert(kNumPartialRows < kFirstWords && kNumSharedWorks < kFirstWords);
  static_assert(kNumSink >= kFirstWords && kChunk >= kFirstWords && kNumSink < 32 && kChunk < 32);

  __device__ __forceinline__ bool IsBad() const { return word_ < least_ || word_ > most_; }

  int32_t word_;
  int32_t least_ = INT32_MIN;  // the word may be least_ … most_
  int32_t most_ = INT32_MAX;
  bool has_head_lists_ = false;  // and they are not taken
};

}  // namespace tvm_infer::attention
