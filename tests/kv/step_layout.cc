// What a step's block holds, read back at the offsets that StepLayout names. Prints "ok", or what is wrong.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "tvm_infer/error.h"
#include "tvm_infer/kv/step_buffer.h"

namespace {

using namespace tvm_infer;
using namespace tvm_infer::kv;

void Check(bool holds, const char* what, const StepLimits& limits, int64_t rows, int64_t logits) {
  if (holds) return;
  std::printf("%s: max_batch %d, max_rows %d, plan %lld, entries %lld, rows %lld, logits %lld\n", what, limits.max_batch, limits.max_rows,
              static_cast<long long>(limits.plan_bytes), static_cast<long long>(limits.max_page_entries), static_cast<long long>(rows),
              static_cast<long long>(logits));
  std::exit(1);
}

// Arrays stand in order, begin on lines of the cache, do not overlap, and end within the block.
void CheckOffsets(const StepLimits& limits, int64_t rows, int64_t logits) {
  const StepLayout layout(limits);
  const int64_t plan_bytes = limits.plan_bytes, entries = limits.max_page_entries;
  const struct {
    int64_t begin, bytes;
  } arrays[] = {{layout.lists(), 4 * int64_t{limits.num_lists} * limits.list_pages},
                {layout.logit_rows(rows, logits), 8 * logits},
                {layout.input_ids(rows), 8 * rows},
                {layout.position_ids(rows), 8 * rows},
                {layout.page_indptr(), 4 * (int64_t{limits.max_batch} + 1)},
                {layout.list_kv_len(), limits.num_lists > 0 ? 4 * int64_t{limits.max_batch} : 0},
                {layout.list_indptr(), limits.num_lists > 0 ? 4 * (int64_t{limits.num_lists} + 1) : 0},
                {layout.plan(), plan_bytes},
                {layout.plan(limits.num_plans - 1), limits.num_plans > 1 ? plan_bytes : 0},
                {layout.page_indices(plan_bytes), 4 * entries},
                {layout.copies(plan_bytes, entries), limits.max_batch * static_cast<int64_t>(sizeof(PageCopy))}};
  int64_t end = 0;
  for (const auto& array : arrays) {
    if (array.bytes == 0) continue;
    Check(array.begin >= end, "arrays overlap", limits, rows, logits);
    Check(array.begin % kStepAlignment == 0, "an array is not aligned", limits, rows, logits);
    end = array.begin + array.bytes;
  }
  Check(end <= layout.bytes(), "the block is too small", limits, rows, logits);
  Check(layout.bytes() % 8 == 0, "the block is no whole number of words", limits, rows, logits);
}

// One request of one token in its third page, one page copied.
Step SmallStep() {
  Step step;
  step.qo_indptr = {0, 1};
  step.kv_len = {9};
  step.page_indptr = {0, 3};
  step.page_indices = {5, 2, 7};
  step.copies = {{4, 7, 1}};
  return step;
}

template <typename T>
const T* At(const std::vector<int64_t>& block, int64_t offset) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(block.data()) + offset);
}

void CheckContents(int32_t num_plans, int32_t max_rows, int64_t rows, bool has_tokens, int64_t logits) {
  const StepLimits limits{1, max_rows, 256, 3, num_plans};
  const StepLayout layout(limits);
  constexpr int64_t kPlanBytes = 100, kPoison = -0x0123456789abcdef;
  std::vector<int64_t> block(layout.bytes() / 8, kPoison);
  const int64_t token = 42;
  const std::vector<int64_t> wanted(logits, rows - 1);
  const Step step = SmallStep();
  const StepInputs inputs{rows, has_tokens ? &token : nullptr, logits > 0 ? wanted.data() : nullptr, logits};
  const StepRange range = FillStep(layout, step, inputs, kPlanBytes, block.data());
  const auto* ids = At<int64_t>(block, layout.input_ids(rows));
  const auto* positions = At<int64_t>(block, layout.position_ids(rows));
  for (int64_t r = 0; r < rows; ++r) {
    Check(ids[r] == (r == 0 && has_tokens ? token : 0), "a token", limits, rows, logits);
    Check(positions[r] == (r == 0 ? 8 : 0), "a position", limits, rows, logits);
  }
  for (int64_t i = 0; i < logits; ++i) {
    Check(At<int64_t>(block, layout.logit_rows(rows, logits))[i] == rows - 1, "a logit row", limits, rows, logits);
  }
  // entries count from the block's first word
  const auto* indptr = At<int32_t>(block, layout.page_indptr());
  const auto* words = At<int32_t>(block, 0);
  Check(indptr[1] - indptr[0] == 3, "the number of pages", limits, rows, logits);
  for (int32_t i = 0; i < 3; ++i) Check(words[indptr[0] + i] == step.page_indices[i], "a page", limits, rows, logits);
  const auto* copy = At<PageCopy>(block, layout.copies(kPlanBytes, 3));
  Check(copy->src == 4 && copy->dst == 7 && copy->num_tokens == 1, "a copy", limits, rows, logits);
  // what is brought to the device is all of it and nothing before it
  Check(range.begin == layout.logit_rows(rows, logits), "the range's beginning", limits, rows, logits);
  Check(range.end == layout.copies(kPlanBytes, 3) + static_cast<int64_t>(sizeof(PageCopy)), "the range's end", limits, rows, logits);
  for (int64_t i = 0; i < range.begin / 8; ++i) Check(block[i] == kPoison, "words before the range", limits, rows, logits);
  // of all plans but the last their whole room
  const int64_t end_of_plans = layout.plan(num_plans - 1) + kPlanBytes;
  for (int64_t i = layout.plan() / 8; i < end_of_plans / 8; ++i) Check(block[i] == kPoison, "a plan", limits, rows, logits);
}

// Two sequences of two KV heads with lists of three pages, of which a step has one.
void CheckLists(bool selects) {
  const StepLimits limits{2, 4, 256, 3, 1, 4, 3};
  const StepLayout layout(limits);
  constexpr int64_t kPoison = -0x0123456789abcdef;
  std::vector<int64_t> block(layout.bytes() / 8, kPoison);
  const Step step = SmallStep();
  const StepRange range = FillStep(layout, step, StepInputs{1, nullptr, nullptr, 0}, 100, block.data());
  FillLists(layout, step, selects, block.data());
  for (int64_t i = 0; i < range.begin / 8; ++i) Check(block[i] == kPoison, "a list", limits, 1, 0);
  Check(range.begin >= layout.lists() + 4 * 4 * 3, "lists in what is copied", limits, 1, 0);
  Check(range.begin <= layout.list_kv_len() && layout.list_indptr() + 4 * 5 <= range.end, "lengths are not copied", limits, 1, 0);
  const auto* indptr = At<int32_t>(block, layout.page_indptr());
  const auto* kv_len = At<int32_t>(block, layout.list_kv_len());
  const auto* lists = At<int32_t>(block, layout.list_indptr());
  Check(indptr[2] == indptr[1] && indptr[1] == indptr[0] + 3, "page_indptr of no sequence", limits, 1, 0);
  Check(kv_len[0] == (selects ? 9 : 0) && kv_len[1] == 0, "a length", limits, 1, 0);
  for (int32_t i = 0; i < 5; ++i) {
    Check(lists[i] == (selects ? layout.lists() / 4 + 3 * i : indptr[i == 0 ? 0 : 1]), "where a list begins", limits, 1, 0);
  }
}

void CheckRefusal() {
  const StepLimits limits{1, 4, 256, 2};
  const StepLayout layout(limits);
  std::vector<int64_t> block(layout.bytes() / 8, -7);
  try {
    FillStep(layout, SmallStep(), StepInputs{1, nullptr, nullptr, 0}, 256, block.data());
  } catch (const Error& error) {
    for (int64_t word : block) Check(word == -7, "a refused step wrote", limits, 1, 0);
    return;
  }
  Check(false, "page tables over the limit were taken", limits, 1, 0);
}

}  // namespace

int main() {
  for (int32_t max_batch : {1, 2, 31, 32, 1000, 1 << 20}) {
    for (int32_t max_rows : {1, 2, 15, 16, 17, 4096, 1 << 24}) {
      for (int64_t plan_bytes : {int64_t{4}, int64_t{128}, int64_t{1} << 33}) {
        for (int64_t entries : {int64_t{1}, int64_t{31}, int64_t{1} << 22}) {
          for (int32_t num_plans : {1, 2, 4}) {
            const StepLimits limits{max_batch, max_rows, plan_bytes, entries, num_plans, num_plans == 2 ? 3 * max_batch : 0, 5};
            for (int64_t rows : {int64_t{0}, int64_t{1}, int64_t{max_rows}}) {
              CheckOffsets(limits, rows, 0);
              CheckOffsets(limits, rows, rows);
            }
          }
        }
      }
    }
  }
  for (int32_t max_rows : {1, 2, 16, 17, 33}) {
    for (int64_t rows : {int64_t{1}, int64_t{max_rows}}) {
      for (int64_t logits : {int64_t{0}, int64_t{1}, rows}) {
        for (int32_t num_plans : {1, 2, 4}) {
          CheckContents(num_plans, max_rows, rows, true, logits);
          CheckContents(num_plans, max_rows, rows, false, logits);
        }
      }
    }
  }
  CheckLists(true);
  CheckLists(false);
  CheckRefusal();
  std::puts("ok");
}
