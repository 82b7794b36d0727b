// Host planner: lengths in, Plan out (Algorithm 1 of arXiv 2501.01005, section 3.3.1, with runs of KV heads and splits only where
// they shorten the makespan). No allocation once its scratch has grown; no CUDA, no TVM.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "tvm_infer/schedule/plan.h"
#include "tvm_infer/schedule/shared_runs.h"
#include "tvm_infer/schedule/tile_costs.h"

namespace tvm_infer {

inline constexpr int32_t kSplitAuto = 0;    // PlanParams::fixed_split_size: split where it shortens the makespan
inline constexpr int32_t kSplitNever = -1;  // one work per tile

// Everything but lengths. Together with the capacity it decides the capture key.
struct PlanParams {
  int32_t num_ctas;
  int32_t num_qo_heads;
  int32_t num_kv_heads;
  MaskBand band;
  int32_t fixed_split_size;  // kSplitAuto, kSplitNever, or > 0: KV is cut at its multiples, so a row's result does not depend on the batch
  const TileClass* tile_classes;  // ascending in rows; a request uses the first class that holds all its packed rows, else the last
  int32_t num_tile_classes;
  std::optional<SharedMergeCost> shared_merge = {};  // without them no keys are shared; not part of the capture key

  void SetCosts(const TileCosts& costs) {
    tile_classes = costs.classes;
    num_tile_classes = costs.num_classes;
    shared_merge = costs.shared_merge;
  }
};

// The largest batch that a buffer must serve.
struct PlanLimits {
  int32_t max_requests;
  int32_t max_tokens;     // query tokens of all requests together
  int64_t max_kv_tokens;  // keys of all requests together; only a fixed split size makes the plan grow with it
  // Room for shared works: runs around a request, and query tokens of all requests within runs. A batch of more is planned without any.
  int32_t max_levels = 0;
  int32_t max_shared_tokens = 0;
  // Plans of Planner::PlanHeadLists, of which max_kv_tokens counts the keys of all lists. No shared works then.
  bool has_head_lists = false;
};

// What a buffer must hold for every batch within the limits: tight bounds, no guesses.
struct PlanCapacity {
  int64_t plan_bytes;    // multiple of 16
  int64_t partial_rows;  // rows of the partial buffers
};

// ArgumentError naming what is out of its range.
void CheckParams(const PlanParams& params);

// Digest of the params: what a captured graph bakes in of them. A plan's header carries it.
uint64_t CaptureKey(const PlanParams& params);

PlanCapacity ComputeCapacity(const PlanParams& params, const PlanLimits& limits);

struct Batch;  // items.h

class Planner {
 public:
  Planner();
  ~Planner();
  Planner(const Planner&) = delete;
  Planner& operator=(const Planner&) = delete;

  // Writes the plan of a batch into `out` (16-byte aligned, host memory) and returns header.bytes_used.
  //   qo_indptr  int32[num_requests + 1], starts at 0, not decreasing: query tokens of each request
  //   kv_len     int32[num_requests], keys of each request, its new tokens included; kv_len[r] >= qo_len[r] when the band has an end
  //   shared     keys that requests have in common: a run is used where it shortens the plan, and the plan fits. For bands without a begin
  //              and automatic splits, and params with shared_merge
  // Throws Error("ArgumentError") naming the argument, its value and the limit; Error("WorkspaceError") if `out` is too small or
  // more than max_partial_rows partial rows would be needed. Nothing is written to `out` then.
  int64_t Plan(const PlanParams& params, const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests, void* out,
               int64_t out_bytes, int64_t max_partial_rows, const SharedRuns& shared = {});

  // The same where each KV head of a request attends to keys of its own: lists of unequal lengths, balanced in one plan. A Work is of one
  // KV head; list r * num_kv_heads + h is that of head h of request r.
  //   kv_len     int32[num_requests * num_kv_heads], keys of each list. With the causal band the last keys of every list are the request's
  //              new tokens: kv_len >= qo_len
  // ArgumentError also for a band that is neither causal nor all keys: other positions mean nothing in a list that leaves keys out.
  int64_t PlanHeadLists(const PlanParams& params, const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests, void* out,
                        int64_t out_bytes, int64_t max_partial_rows);

 private:
  int64_t WriteFlat(const PlanParams& params, const Batch& batch, void* out, int64_t out_bytes, int64_t max_partial_rows);
  struct Scratch;
  std::unique_ptr<Scratch> scratch_;
};

}  // namespace tvm_infer
