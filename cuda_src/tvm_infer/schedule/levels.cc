#include "tvm_infer/schedule/levels.h"

#include <algorithm>
#include <sstream>
#include <string>

#include "tvm_infer/error.h"
#include "tvm_infer/schedule/items.h"

namespace tvm_infer {
namespace {

std::string NameOf(int32_t level, int32_t index) {
  std::ostringstream name;
  name << "argument `levels`: group " << index << " of level " << level;
  return name.str();
}

void CheckSettings(const PlanParams& p) {
  if (!p.band.IsSharable()) {
    TVM_INFER_THROW(ArgumentError) << "argument `levels` with window_left " << p.band.left << ", num_sink " << p.band.num_sink << ", chunk "
                                   << p.band.chunk
                                   << "; requests see shared keys alike only where no window or chunk hides some. Plan without levels";
  }
  if (p.fixed_split_size != kSplitAuto) {
    TVM_INFER_THROW(ArgumentError) << "argument `levels` with fixed_split_size " << p.fixed_split_size
                                   << "; with shared keys a row's result depends on the levels, which a fixed size is to prevent. Plan "
                                      "without levels, or with fixed_split_size 0";
  }
  if (!p.shared_merge.has_value()) {
    TVM_INFER_THROW(ArgumentError)
        << "argument `levels` with a `tile_table` that does not say what merges of shared keys cost; end the table "
           "with two integers, picoseconds for each merge and for a plan that has any (the executors' do)";
  }
}

}  // namespace

const SharedRuns& Levels::Read(const PlanParams& p, const int32_t* words, int64_t num_words, const int32_t* qo_indptr,
                               const int32_t* kv_len, int32_t num_requests) {
  CheckParams(p);
  Items::Check(p, {qo_indptr, kv_len, num_requests});
  CheckSettings(p);
  ReadGroups(words, num_words);
  CheckGroups(p, qo_indptr, kv_len, num_requests);
  Order(num_requests);
  shared_ = {order_.data(), runs_.data(), static_cast<int32_t>(runs_.size())};
  return shared_;
}

void Levels::ReadGroups(const int32_t* words, int64_t num_words) {
  groups_.clear();
  int32_t level = 0, index = 0;
  for (int64_t i = 0; i < num_words;) {
    const bool has_head = num_words - i >= 3;
    if (!has_head || words[i + 2] < 0 || words[i + 2] > num_words - i - 3 || words[i] < level || words[i] > level + 1) {
      TVM_INFER_THROW(ArgumentError) << "argument `levels` is cut off or out of order at word " << i
                                     << "; each group has its level (ascending from 0), its keys, its number of requests, the requests";
    }
    if (words[i] > level) index = 0, ++level;
    groups_.push_back({level, index++, words[i + 1], words + i + 3, words[i + 2], -1});
    i += 3 + int64_t{words[i + 2]};
  }
}

void Levels::CheckGroups(const PlanParams& p, const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests) {
  group_of_.assign(num_requests, -1);
  for (size_t g = 0; g < groups_.size(); ++g) {
    Group& group = groups_[g];
    for (int32_t i = 0; i < group.num_requests; ++i) {
      const int32_t r = group.requests[i];
      if (r < 0 || r >= num_requests) {
        TVM_INFER_THROW(ArgumentError) << NameOf(group.level, group.index) << " has request " << r << "; the batch has requests 0 to "
                                       << num_requests - 1;
      }
      const int32_t before = group_of_[r];
      if (before >= 0 && groups_[before].level == group.level) {
        TVM_INFER_THROW(ArgumentError) << NameOf(group.level, group.index) << " has request " << r << ", which group "
                                       << groups_[before].index << " of this level has too; a request is in one group of a level, once";
      }
      const int32_t parent = before >= 0 && groups_[before].level == group.level - 1 ? before : -1;
      if (group.level > 0 && (parent < 0 || (i > 0 && parent != group.parent))) {
        TVM_INFER_THROW(ArgumentError) << NameOf(group.level, group.index) << " has request " << r
                                       << (parent < 0 ? ", which no group of level " : ", which another group of level ") << group.level - 1
                                       << (parent < 0 ? " has" : " has than its request ")
                                       << (parent < 0 ? "" : std::to_string(group.requests[0]))
                                       << "; a level parts the groups of the level before: requests that share a longer prefix share the "
                                          "shorter one";
      }
      group.parent = parent;
      group_of_[r] = static_cast<int32_t>(g);
      // Rows of a request that see different parts of the shared keys would need a mask, which shared works do not have.
      const int32_t qo_len = qo_indptr[r + 1] - qo_indptr[r], most = kv_len[r] - (p.band.has_end() ? qo_len : 0);
      if (group.kv_end > most) {
        TVM_INFER_THROW(ArgumentError) << NameOf(group.level, group.index) << " shares " << group.kv_end << " keys, but request " << r
                                       << " has " << kv_len[r] << " keys"
                                       << (p.band.has_end() ? ", its " + std::to_string(qo_len) + " new tokens included" : "")
                                       << "; at most " << most << " can be shared: those that all its queries see";
      }
    }
    const int32_t least = group.parent < 0 ? 1 : groups_[group.parent].kv_end + 1;
    if (group.kv_end < least) {
      TVM_INFER_THROW(ArgumentError) << NameOf(group.level, group.index) << " shares " << group.kv_end << " keys; it must be at least "
                                     << least << (group.parent < 0 ? "" : ": all that the group around it shares, and more");
    }
  }
}

// Requests of a group stand where the first of them does, those of a group within it likewise.
void Levels::Order(int32_t num_requests) {
  // A request's key: the smallest request of every group around it, outermost first, then its own number. Two keys differ before one of
  // them ends, since no request of a group is the smallest of another beside it.
  const int32_t stride = groups_.empty() ? 1 : groups_.back().level + 2;
  least_.resize(groups_.size());
  for (size_t g = 0; g < groups_.size(); ++g) {
    const Group& group = groups_[g];
    least_[g] = group.num_requests > 0 ? *std::min_element(group.requests, group.requests + group.num_requests) : 0;
  }
  keys_.assign(size_t(num_requests) * stride, 0);
  order_.resize(num_requests);
  bool is_sorted = true;
  const auto key_of = [&](int32_t r) { return keys_.data() + size_t(r) * stride; };
  const auto is_less = [&](int32_t a, int32_t b) {
    return std::lexicographical_compare(key_of(a), key_of(a) + stride, key_of(b), key_of(b) + stride);
  };
  for (int32_t r = 0; r < num_requests; ++r) {
    const int32_t g = group_of_[r], depth = g < 0 ? 0 : groups_[g].level + 1;
    int32_t* key = key_of(r);
    key[depth] = r;
    for (int32_t k = g; k >= 0; k = groups_[k].parent) key[groups_[k].level] = least_[k];
    order_[r] = r;
    is_sorted = is_sorted && (r == 0 || is_less(r - 1, r));
  }
  if (!is_sorted) std::sort(order_.begin(), order_.end(), is_less);
  run_of_group_.assign(groups_.size(), SharedRun{num_requests, -1, 0});
  for (int32_t i = 0; i < num_requests; ++i) {
    for (int32_t g = group_of_[order_[i]]; g >= 0; g = groups_[g].parent) {
      SharedRun& run = run_of_group_[g];
      run = {std::min(run.begin, i), i + 1, groups_[g].kv_end};
    }
  }
  runs_.clear();
  for (const SharedRun& run : run_of_group_) {
    if (run.end - run.begin > 1) runs_.push_back(run);
  }
  std::sort(runs_.begin(), runs_.end(), [](const SharedRun& a, const SharedRun& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end != b.end ? a.end > b.end : a.kv_end < b.kv_end;
  });
}

}  // namespace tvm_infer
