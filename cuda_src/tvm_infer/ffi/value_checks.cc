#include "tvm_infer/ffi/value_checks.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace tvm_infer::ffi_api {
namespace {

std::atomic<bool>& DebugFlag() {
  static std::atomic<bool> flag([] {
    const char* value = std::getenv("TVM_INFER_DEBUG_CHECKS");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }());
  return flag;
}

}  // namespace

bool DebugChecks() { return DebugFlag().load(std::memory_order_relaxed); }
bool ExchangeDebugChecks(bool enabled) { return DebugFlag().exchange(enabled); }

const PlanHeader& CheckPlanBytes(const void* plan, int64_t bytes) {
  const auto* header = static_cast<const PlanHeader*>(plan);
  if (bytes < static_cast<int64_t>(sizeof(PlanHeader)) || header->magic != kPlanMagic) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `plan`, " << bytes << " bytes, is not a plan; make one with tvm_infer.plan";
  }
  if (header->version != kPlanVersion) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `plan` has version " << header->version << ", this library reads version "
                                       << kPlanVersion << "; make the plan with this library's tvm_infer.plan";
  }
  if (header->bytes_used > bytes) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `plan` says it uses " << header->bytes_used << " bytes but has " << bytes
                                       << "; pass the whole buffer";
  }
  return *header;
}

const PlanHeader& CheckPlan(const TensorView& plan) {
  CheckIndex(plan, "plan");
  return CheckPlanBytes(DataPtr<const void>(plan), plan.numel() * static_cast<int64_t>(sizeof(int32_t)));
}

void CheckPlanFitsQuery(const PlanHeader& header, const TensorView& q, bool is_padded) {
  if (is_padded ? q.size(0) < header.num_tokens : q.size(0) != header.num_tokens) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `q` has " << q.size(0) << " tokens, shape " << ShapeString(q)
                                       << ", but the plan was made for " << header.num_tokens << "; plan with this batch's qo_indptr";
  }
  const int64_t plan_heads = static_cast<int64_t>(header.num_kv_heads) * header.group_size;
  if (q.size(1) != plan_heads) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `q` has " << q.size(1) << " heads, shape " << ShapeString(q)
                                       << ", but the plan was made for " << plan_heads << " query heads (" << header.num_kv_heads
                                       << " KV heads); plan with this num_qo_heads";
  }
}

void CheckPlanFitsCache(const PlanHeader& header, const CacheShape& shape) {
  if (shape.num_kv_heads != header.num_kv_heads) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `k_cache` has " << shape.num_kv_heads << " KV heads, but the plan was made for "
                                       << header.num_kv_heads << "; plan with this num_kv_heads";
  }
}

void CheckPlanFitsWorkspace(const PlanHeader& header, const TensorView& workspace, int64_t head_dim) {
  const int64_t needed = static_cast<int64_t>(header.num_partial_rows) * (head_dim + 1);
  if (workspace.numel() < needed) {
    TVM_INFER_THROW(WorkspaceError) << "argument `workspace` holds " << workspace.numel() << " floats; this plan needs " << needed << " ("
                                    << header.num_partial_rows << " partial rows of head_dim " << head_dim
                                    << " + 1). Size it with tvm_infer.workspace_size";
  }
}

void CheckPageTableValues(const PageTable& table, int32_t num_lists, const int32_t* kv_len, const CacheShape& shape, bool check_pages,
                          bool is_by_head) {
  const char* of = is_by_head ? "list " : "request ";
  if (table.num_indptr != num_lists + 1) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `kv_page_indptr` has " << table.num_indptr << " entries; " << num_lists
                                       << (is_by_head ? " lists, one for each request and KV head, need " : " requests need ")
                                       << num_lists + 1;
  }
  const int32_t* ptr = table.indptr;
  if (ptr[0] != 0) TVM_INFER_THROW(ArgumentError) << "argument `kv_page_indptr` starts at " << ptr[0] << "; it must start at 0";
  for (int32_t l = 0; l < num_lists; ++l) {
    const int64_t num_pages = static_cast<int64_t>(ptr[l + 1]) - ptr[l];
    if (num_pages < 0) {
      TVM_INFER_THROW(ArgumentError) << "argument `kv_page_indptr` decreases from " << ptr[l] << " to " << ptr[l + 1] << " at entry "
                                     << l + 1 << "; it must not decrease";
    }
    if (num_pages * shape.page_size < kv_len[l]) {
      TVM_INFER_THROW(PlanMismatchError) << of << l << " has kv_len " << kv_len[l] << " but argument `kv_page_indptr` gives it "
                                         << num_pages << " pages of " << shape.page_size << " tokens; it needs "
                                         << (kv_len[l] + static_cast<int64_t>(shape.page_size) - 1) / shape.page_size;
    }
  }
  if (ptr[num_lists] > table.num_indices) {
    TVM_INFER_THROW(ArgumentError) << "argument `kv_page_indptr` ends at " << ptr[num_lists] << " but `kv_page_indices` has "
                                   << table.num_indices << " entries";
  }
  for (int32_t l = 0; check_pages && l < num_lists; ++l) {
    const int32_t used = (kv_len[l] + shape.page_size - 1) / shape.page_size;  // later entries may hold anything
    for (int32_t i = ptr[l]; i < ptr[l] + used; ++i) {
      if (table.indices[i] < 0 || table.indices[i] >= shape.num_pages) {
        TVM_INFER_THROW(ArgumentError) << "argument `kv_page_indices` has page " << table.indices[i] << " at entry " << i << " (" << of << l
                                       << "); pages must be in [0, " << shape.num_pages << ")";
      }
    }
  }
}

void CheckRaggedValues(const int32_t* ptr, int64_t num_indptr, const TensorView& k, const PlanView& plan) {
  const PlanHeader& header = *plan.header;
  CheckDim(k, "k", 1, header.num_kv_heads, "num_kv_heads of the plan");
  if (num_indptr != header.num_kv_lists + 1) {
    TVM_INFER_THROW(ArgumentError) << "argument `kv_indptr` has " << num_indptr << " entries; it must have " << header.num_kv_lists + 1
                                   << " (one more than the plan has requests)";
  }
  if (ptr[0] != 0) TVM_INFER_THROW(ArgumentError) << "argument `kv_indptr` starts at " << ptr[0] << "; it must start at 0";
  for (int32_t l = 0; l < header.num_kv_lists; ++l) {
    if (ptr[l + 1] - ptr[l] != plan.kv_len()[l]) {
      TVM_INFER_THROW(PlanMismatchError) << "argument `kv_indptr` gives request " << l << " " << ptr[l + 1] - ptr[l]
                                         << " keys, but the plan was made for " << plan.kv_len()[l];
    }
  }
  if (ptr[header.num_kv_lists] > k.size(0)) {
    TVM_INFER_THROW(ArgumentError) << "argument `kv_indptr` ends at " << ptr[header.num_kv_lists] << " but `k` has " << k.size(0)
                                   << " rows";
  }
}

void CheckStartValues(const int32_t* start, int64_t num_starts, const TensorView& k, const PlanView& plan) {
  const PlanHeader& header = *plan.header;
  CheckDim(k, "k", 1, header.num_kv_heads, "num_kv_heads of the plan");
  if (num_starts != header.num_kv_lists) {
    TVM_INFER_THROW(ArgumentError) << "argument `kv_start` has " << num_starts << " entries; it must have " << header.num_kv_lists
                                   << ", one for each request of the plan";
  }
  for (int32_t l = 0; l < header.num_kv_lists; ++l) {
    const int64_t length = plan.kv_len()[l];
    if (start[l] < 0 || start[l] + length > k.size(0)) {
      TVM_INFER_THROW(ArgumentError) << "argument `kv_start` is " << start[l] << " for request " << l << ", which has " << length
                                     << " keys; its rows must lie within the " << k.size(0) << " of `k`";
    }
  }
}

void CheckPlanAppends(const PlanHeader& header) {
  if (header.num_kv_lists == header.num_requests) return;
  TVM_INFER_THROW(PlanMismatchError) << "argument `plan` has a list of keys for each KV head, " << header.num_kv_lists << " lists of "
                                     << header.num_requests
                                     << " requests, which say nothing of where a request's new tokens go; call append with the requests' "
                                        "own page tables and kv_len, then attention";
}

void CheckAppendLengths(const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests) {
  if (qo_indptr[0] != 0) TVM_INFER_THROW(ArgumentError) << "argument `qo_indptr` starts at " << qo_indptr[0] << "; it must start at 0";
  for (int32_t r = 0; r < num_requests; ++r) {
    const int32_t qo_len = qo_indptr[r + 1] - qo_indptr[r];
    if (qo_len < 0) {
      TVM_INFER_THROW(ArgumentError) << "argument `qo_indptr` decreases from " << qo_indptr[r] << " to " << qo_indptr[r + 1] << " at entry "
                                     << r + 1 << "; it must not decrease";
    }
    if (qo_len > kv_len[r]) {
      TVM_INFER_THROW(ArgumentError) << "argument `kv_len` is " << kv_len[r] << " for request " << r << ", which appends " << qo_len
                                     << " tokens; kv_len counts the new tokens, so it must be at least " << qo_len;
    }
  }
}

void CheckNumNewTokens(const TensorView& k, const TensorView& v, int64_t num_tokens) {
  const TensorView* tensors[] = {&k, &v};
  const char* names[] = {"k", "v"};
  for (int t = 0; t < 2; ++t) {
    if (tensors[t]->size(0) != num_tokens) {
      TVM_INFER_THROW(ArgumentError) << "argument `" << names[t] << "` has shape " << ShapeString(*tensors[t]) << "; qo_indptr names "
                                     << num_tokens << " new tokens";
    }
  }
}

}  // namespace tvm_infer::ffi_api
