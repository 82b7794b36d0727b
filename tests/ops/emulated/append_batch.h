// Random batches of new tokens, with and without a plan: what the kernels that append are given.
#pragma once

#include <algorithm>
#include <random>

#include "tvm_infer/cuda/params.h"
#include "tvm_infer/schedule/plan.h"

namespace append_batch {

using tvm_infer::PlanHeader;
using tvm_infer::cuda::AppendParams;

inline std::mt19937 random_bits(1);
inline int32_t Random(int32_t low, int32_t high) { return low + static_cast<int32_t>(random_bits() % (high - low + 1)); }

struct Batch {
  std::vector<int32_t> qo_indptr{0}, kv_len, page_indptr{0}, page_indices;
};

inline Batch MakeBatch(int32_t num_requests, int32_t page_size, bool has_long_requests) {
  Batch batch;
  for (int32_t r = 0; r < num_requests; ++r) {
    const int32_t new_tokens = has_long_requests && Random(0, 9) == 0 ? Random(20, 90) : Random(0, 2);
    batch.qo_indptr.push_back(batch.qo_indptr.back() + new_tokens);
    batch.kv_len.push_back(new_tokens + Random(0, 3 * page_size));
    batch.page_indptr.push_back(batch.page_indptr.back() + (batch.kv_len.back() + page_size - 1) / page_size + Random(0, 1));
  }
  for (int32_t i = 0; i < batch.page_indptr.back(); ++i) batch.page_indices.push_back(i);
  std::shuffle(batch.page_indices.begin(), batch.page_indices.end(), random_bits);
  return batch;
}

// A plan's header and the two arrays that an append reads. 16-byte aligned, as plans are.
inline std::vector<uint4> MakePlan(const Batch& batch, const AppendParams& p) {
  std::vector<int32_t> words(sizeof(PlanHeader) / 4);
  PlanHeader header{};
  header.magic = tvm_infer::kPlanMagic;
  header.version = tvm_infer::kPlanVersion;
  header.capture_key[0] = 5;
  header.capture_key[1] = 6;
  header.num_requests = header.num_kv_lists = static_cast<int32_t>(batch.kv_len.size());
  header.num_tokens = batch.qo_indptr.back();
  header.num_kv_heads = p.num_kv_heads;
  header.group_size = 4;
  header.num_partial_rows = 9;
  const auto add = [&](const std::vector<int32_t>& array) {
    const int32_t offset = static_cast<int32_t>(words.size() * 4);
    words.insert(words.end(), array.begin(), array.end());
    words.resize((words.size() + 3) / 4 * 4);
    return offset;
  };
  header.kv_len_offset = add(batch.kv_len);
  header.qo_indptr_offset = add(batch.qo_indptr);
  std::memcpy(words.data(), &header, sizeof(header));
  std::vector<uint4> plan(words.size() / 4);
  std::memcpy(plan.data(), words.data(), words.size() * 4);
  return plan;
}

// 0: a plan that fits, with whatever it may have beside; others: one wrong number each.
inline void Spoil(int32_t what, AppendParams* p, std::vector<uint4>* plan) {
  auto* header = reinterpret_cast<PlanHeader*>(plan->data());
  p->expected = {p->num_kv_heads, 4, p->max_tokens, 9, header->num_kv_lists, {0, 0}, Random(0, 1) ? 7 : 6};
  if (Random(0, 1)) p->expected.capture_key[0] = 5, p->expected.capture_key[1] = 6;
  if (what == 1) header->magic = 0;
  if (what == 2) header->version += 1;
  if (what == 3) header->num_kv_heads += 1;
  if (what == 4) header->group_size = 1;
  if (what == 5) p->expected.max_tokens = header->num_tokens - 1;
  if (what == 6) p->expected.max_partial_rows = 8;
  if (what == 7) p->expected.max_kv_lists -= 1;
  if (what == 8) p->expected.capture_key[0] = 4, p->expected.capture_key[1] = 6;
  const auto without = [p](tvm_infer::cuda::PlanFeature feature) { p->expected.features &= ~feature; };
  if (what == 9) header->num_shared_works = 1, without(tvm_infer::cuda::kSharedWorks);
  if (what == 10) header->num_sink = 4, without(tvm_infer::cuda::kRowMasks);
  if (what == 11) header->chunk = 64, without(tvm_infer::cuda::kRowMasks);
  if (what == 12) p->expected.max_kv_lists = header->num_kv_lists += 1, without(tvm_infer::cuda::kHeadLists);
}

// Gives p the batch's lengths: bare for every third number, else as a plan, which `plan` keeps. Returns what is wrong with the plan, 0 for
// nothing.
inline int32_t SetLengths(const Batch& batch, int32_t number, AppendParams* p, std::vector<uint4>* plan) {
  p->plan_is_ready = Random(0, 1);
  if (number % 3 == 0) {
    p->qo_indptr = batch.qo_indptr.data();
    p->kv_len = batch.kv_len.data();
    p->num_requests = static_cast<int32_t>(batch.kv_len.size());
    return 0;
  }
  *plan = MakePlan(batch, *p);
  const int32_t spoiled = number % 3 == 1 ? 0 : Random(0, 12);
  Spoil(spoiled, p, plan);
  p->plan = plan->data();
  return spoiled;
}

}  // namespace append_batch
