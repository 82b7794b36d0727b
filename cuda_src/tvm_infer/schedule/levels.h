// Shared keys as a caller says them: levels, outermost first, each a list of groups of requests whose first keys are the same.
#pragma once

#include <cstdint>
#include <vector>

#include "tvm_infer/schedule/planner.h"
#include "tvm_infer/schedule/shared_runs.h"

namespace tvm_infer {

class Levels {
 public:
  // `words`, for each group of each level: level, number of keys that its requests share, number of requests, the requests. Levels ascend
  // from 0. A group of a level lies within one of the level before and shares more keys than that one. Groups of one request are allowed,
  // and ignored. Throws Error("ArgumentError") naming level and group for what is no prefix relation, for keys that are not a request's or
  // that not all its rows see, and for params whose keys are not shared (windows, sinks, chunks, fixed splits).
  // Runs are valid until the next call.
  const SharedRuns& Read(const PlanParams& p, const int32_t* words, int64_t num_words, const int32_t* qo_indptr, const int32_t* kv_len,
                         int32_t num_requests);

 private:
  struct Group {
    int32_t level, index;  // index: among the groups of its level
    int32_t kv_end;
    const int32_t* requests;
    int32_t num_requests;
    int32_t parent;  // or -1
  };

  void ReadGroups(const int32_t* words, int64_t num_words);
  void CheckGroups(const PlanParams& p, const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests);
  void Order(int32_t num_requests);

  std::vector<Group> groups_;
  std::vector<int32_t> group_of_;  // [num_requests]: the innermost group of the levels so far, or -1
  std::vector<int32_t> least_;     // [groups]: the smallest request
  std::vector<int32_t> keys_;      // [num_requests, levels + 1]: what requests are ordered by
  std::vector<int32_t> order_;
  std::vector<SharedRun> run_of_group_, runs_;
  SharedRuns shared_;
};

}  // namespace tvm_infer
