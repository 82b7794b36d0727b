#include "tvm_infer/kv/step_buffer.h"

#include <algorithm>

#include "tvm_infer/error.h"

namespace tvm_infer::kv {
namespace {

template <typename T>
T* At(void* block, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(block) + offset);
}

// Padding has token and position 0: a row of the embedding that is there.
void FillRows(const StepLayout& layout, const Step& step, const StepInputs& inputs, void* block) {
  int64_t* positions = At<int64_t>(block, layout.position_ids(inputs.num_rows));
  for (int32_t r = 0; r < step.num_requests(); ++r) {
    const int64_t shift = step.kv_len[r] - step.qo_indptr[r + 1];
    for (int32_t t = step.qo_indptr[r]; t < step.qo_indptr[r + 1]; ++t) positions[t] = shift + t;
  }
  std::fill(positions + step.num_tokens(), positions + inputs.num_rows, 0);
  int64_t* ids = At<int64_t>(block, layout.input_ids(inputs.num_rows));
  if (inputs.token_ids != nullptr) std::copy(inputs.token_ids, inputs.token_ids + step.num_tokens(), ids);
  std::fill(ids + (inputs.token_ids != nullptr ? step.num_tokens() : 0), ids + inputs.num_rows, 0);
  if (inputs.logit_rows != nullptr) {
    std::copy(inputs.logit_rows, inputs.logit_rows + inputs.num_logits,
              At<int64_t>(block, layout.logit_rows(inputs.num_rows, inputs.num_logits)));
  }
}

}  // namespace

StepLayout::StepLayout(const StepLimits& limits) : limits_(limits) {
  page_indptr_ = Aligned(4 * int64_t{limits.num_lists} * limits.list_pages) + 3 * Bytes(limits.max_rows);
  plan_ = list_indptr() + ListBytes(int64_t{limits.num_lists} + 1);
  bytes_ = copies(limits.plan_bytes, limits.max_page_entries) + Aligned(limits.max_batch * static_cast<int64_t>(sizeof(PageCopy)));
}

StepRange FillStep(const StepLayout& layout, const Step& step, const StepInputs& inputs, int64_t plan_bytes, void* block) {
  const auto num_entries = static_cast<int64_t>(step.page_indices.size());
  if (num_entries > layout.limits().max_page_entries) {
    TVM_INFER_THROW(WorkspaceError) << "the step's " << step.num_requests() << " sequences have " << num_entries
                                    << " pages, those that are shared counted for each; the cache has room for page tables of "
                                    << layout.limits().max_page_entries << " entries. Step fewer sequences at a time, or take larger pages "
                                    << "(page_size)";
  }
  FillRows(layout, step, inputs, block);
  const int64_t indices = layout.page_indices(plan_bytes);
  int32_t* indptr = At<int32_t>(block, layout.page_indptr());
  const auto first = static_cast<int32_t>(indices / 4);
  for (size_t r = 0; r < step.page_indptr.size(); ++r) indptr[r] = first + step.page_indptr[r];
  std::copy(step.page_indices.begin(), step.page_indices.end(), At<int32_t>(block, indices));
  const int64_t copies = layout.copies(plan_bytes, num_entries);
  std::copy(step.copies.begin(), step.copies.end(), At<PageCopy>(block, copies));
  const int64_t num_logits = inputs.logit_rows == nullptr ? 0 : inputs.num_logits;
  return {layout.logit_rows(inputs.num_rows, num_logits), copies + static_cast<int64_t>(step.copies.size() * sizeof(PageCopy))};
}

void FillLists(const StepLayout& layout, const Step& step, bool selects, void* block) {
  const StepLimits& limits = layout.limits();
  const int32_t num_requests = step.num_requests();
  int32_t* const indptr = At<int32_t>(block, layout.page_indptr());
  std::fill(indptr + num_requests + 1, indptr + limits.max_batch + 1, indptr[num_requests]);
  int32_t* const kv_len = At<int32_t>(block, layout.list_kv_len());
  std::fill(kv_len, kv_len + limits.max_batch, 0);
  int32_t* const list_indptr = At<int32_t>(block, layout.list_indptr());
  if (selects) {
    std::copy(step.kv_len.begin(), step.kv_len.end(), kv_len);
    for (int32_t list = 0; list <= limits.num_lists; ++list) {
      list_indptr[list] = static_cast<int32_t>(layout.lists() / 4) + list * limits.list_pages;
    }
  } else {
    std::copy(indptr, indptr + num_requests + 1, list_indptr);
    std::fill(list_indptr + num_requests + 1, list_indptr + limits.num_lists + 1, indptr[num_requests]);
  }
}

}  // namespace tvm_infer::kv
