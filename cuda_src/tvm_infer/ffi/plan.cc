#include "tvm_infer/ffi/plan.h"

#include <tvm/ffi/extra/c_env_api.h>

#include <string>
#include <utility>
#include <vector>

#include "tvm_infer/cuda/staging.h"
#include "tvm_infer/ffi/common.h"
#include "tvm_infer/ffi/kv_dtype.h"
#include "tvm_infer/schedule/levels.h"

namespace tvm_infer::ffi_api {
namespace {

constexpr int kTileFields = 5, kSharedMergeFields = 3;
constexpr int kBandFields = 4;

int32_t CheckedInt32(int64_t value, const char* name) {
  if (value < INT32_MIN || value > INT32_MAX) {
    TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` is " << value << "; it must fit in 32 bits";
  }
  return static_cast<int32_t>(value);
}

// Tile classes of the last call are kept per thread, so that planning step after step allocates nothing.
PlanParams MakeParams(int64_t num_qo_heads, int64_t num_kv_heads, int64_t num_ctas, const tvm::ffi::Shape& band, int64_t fixed_split_size,
                      const tvm::ffi::Shape& tile_table) {
  thread_local std::vector<TileClass> classes;
  const int64_t num_values = static_cast<int64_t>(tile_table.size());
  const bool has_shared_merge = num_values % kTileFields == kSharedMergeFields;
  if (num_values < kTileFields || (num_values % kTileFields != 0 && !has_shared_merge)) {
    TVM_INFER_THROW(ArgumentError)
        << "argument `tile_table` has " << num_values
        << " values; it must have 5 for each class, rows, kv_granule, fixed, row, kv, and may end with 3, what "
           "each merge of shared keys costs, what a plan that has any does, and thousandths of a key's cost when it "
           "is read again";
  }
  classes.resize(num_values / kTileFields);
  for (size_t i = 0; i < classes.size(); ++i) {
    const int64_t* v = tile_table.data() + i * kTileFields;
    for (int f = 0; f < kTileFields; ++f) {
      if (v[f] < (f < 2 ? 1 : 0)) {
        TVM_INFER_THROW(ArgumentError) << "argument `tile_table` has " << v[f] << " at class " << i << ", field " << f
                                       << "; rows and kv_granule must be at least 1, costs at least 0";
      }
    }
    classes[i] = TileClass{CheckedInt32(v[0], "tile_table rows"), CheckedInt32(v[1], "tile_table kv_granule"), v[2], v[3], v[4]};
  }
  PlanParams params;
  params.num_ctas = CheckedInt32(num_ctas, "num_ctas");
  params.num_qo_heads = CheckedInt32(num_qo_heads, "num_qo_heads");
  params.num_kv_heads = CheckedInt32(num_kv_heads, "num_kv_heads");
  params.band = MakeBand(band);
  params.fixed_split_size = CheckedInt32(fixed_split_size, "fixed_split_size");
  params.tile_classes = classes.data();
  params.num_tile_classes = static_cast<int32_t>(classes.size());
  if (has_shared_merge)
    params.shared_merge = SharedMergeCost{tile_table[num_values - 3], tile_table[num_values - 2], tile_table[num_values - 1]};
  return params;
}

}  // namespace

int64_t AbiVersion() { return kAbiVersion; }

MaskBand MakeBand(const tvm::ffi::Shape& band) {
  if (band.size() != kBandFields) {
    TVM_INFER_THROW(ArgumentError) << "argument `band` has " << band.size()
                                   << " values; it must have 4: window_left, window_right, num_sink, chunk";
  }
  for (const auto& [name, i] : {std::pair{"window_left", 0}, {"window_right", 1}}) {
    if (band[i] < -1) {
      TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` is " << band[i] << "; it must be -1 (no window) or at least 0";
    }
  }
  return {CheckedInt32(band[0], "window_left"), CheckedInt32(band[1], "window_right"), CheckedInt32(band[2], "num_sink"),
          CheckedInt32(band[3], "chunk")};
}

namespace {

Planner& ThreadPlanner() {
  thread_local Planner planner;
  return planner;
}

// Checked lengths and where the plan goes.
struct PlanCall {
  const int32_t *qo_indptr, *kv_len;
  int32_t num_requests;
  void* out;
  int64_t out_bytes;

  PlanCall(const TensorView& qo_indptr_, const TensorView& kv_len_, const TensorView& plan_out) {
    CheckIndex(qo_indptr_, "qo_indptr");
    CheckIndex(kv_len_, "kv_len");
    CheckDim(qo_indptr_, "qo_indptr", 0, kv_len_.size(0) + 1, "one more than kv_len has entries");
    Read(qo_indptr_, kv_len_, plan_out);
  }
  PlanCall(const TensorView& qo_indptr_, const TensorView& kv_len_, const TensorView& plan_out, const PlanParams& params) {
    CheckParams(params);
    CheckIndex(qo_indptr_, "qo_indptr");
    CheckIndex(kv_len_, "kv_len");
    if (qo_indptr_.size(0) < 1) TVM_INFER_THROW(ArgumentError) << "argument `qo_indptr` is empty; it has one entry more than requests";
    const int64_t requests = qo_indptr_.size(0) - 1;
    if (kv_len_.size(0) != requests * params.num_kv_heads) {
      TVM_INFER_THROW(ArgumentError) << "argument `kv_len` has " << kv_len_.size(0) << " entries; " << requests << " requests with "
                                     << params.num_kv_heads << " KV heads, each with a list of keys, need "
                                     << requests * params.num_kv_heads;
    }
    Read(qo_indptr_, kv_len_, plan_out);
  }

 private:
  void Read(const TensorView& qo_indptr_, const TensorView& kv_len_, const TensorView& plan_out) {
    CheckIndex(plan_out, "plan_out");
    qo_indptr = DataPtr<int32_t>(qo_indptr_);
    kv_len = DataPtr<int32_t>(kv_len_);
    num_requests = CheckedInt32(qo_indptr_.size(0) - 1, "number of requests");
    out = DataPtr<void>(plan_out);
    out_bytes = plan_out.numel() * static_cast<int64_t>(sizeof(int32_t));
  }
};

}  // namespace

int64_t MakePlan(TensorView qo_indptr, TensorView kv_len, int64_t num_qo_heads, int64_t num_kv_heads, int64_t num_ctas,
                 tvm::ffi::Shape band, int64_t fixed_split_size, tvm::ffi::Shape tile_table, int64_t max_partial_rows,
                 TensorView plan_out) {
  return Guarded([&] {
    const PlanCall call(qo_indptr, kv_len, plan_out);
    const PlanParams params = MakeParams(num_qo_heads, num_kv_heads, num_ctas, band, fixed_split_size, tile_table);
    return ThreadPlanner().Plan(params, call.qo_indptr, call.kv_len, call.num_requests, call.out, call.out_bytes, max_partial_rows);
  });
}

int64_t MakeSharedPlan(TensorView qo_indptr, TensorView kv_len, TensorView levels, int64_t num_qo_heads, int64_t num_kv_heads,
                       int64_t num_ctas, tvm::ffi::Shape band, int64_t fixed_split_size, tvm::ffi::Shape tile_table,
                       int64_t max_partial_rows, TensorView plan_out) {
  return Guarded([&] {
    const PlanCall call(qo_indptr, kv_len, plan_out);
    CheckIndex(levels, "levels");
    const PlanParams params = MakeParams(num_qo_heads, num_kv_heads, num_ctas, band, fixed_split_size, tile_table);
    thread_local Levels reader;  // as the planner's: a step allocates nothing
    const SharedRuns& shared =
        reader.Read(params, DataPtr<int32_t>(levels), levels.numel(), call.qo_indptr, call.kv_len, call.num_requests);
    return ThreadPlanner().Plan(params, call.qo_indptr, call.kv_len, call.num_requests, call.out, call.out_bytes, max_partial_rows, shared);
  });
}

int64_t MakeHeadListsPlan(TensorView qo_indptr, TensorView kv_len, int64_t num_qo_heads, int64_t num_kv_heads, int64_t num_ctas,
                          tvm::ffi::Shape band, int64_t fixed_split_size, tvm::ffi::Shape tile_table, int64_t max_partial_rows,
                          TensorView plan_out) {
  return Guarded([&] {
    const PlanParams params = MakeParams(num_qo_heads, num_kv_heads, num_ctas, band, fixed_split_size, tile_table);
    const PlanCall call(qo_indptr, kv_len, plan_out, params);
    return ThreadPlanner().PlanHeadLists(params, call.qo_indptr, call.kv_len, call.num_requests, call.out, call.out_bytes,
                                         max_partial_rows);
  });
}

tvm::ffi::Shape PlanCapacityOf(int64_t num_qo_heads, int64_t num_kv_heads, int64_t num_ctas, tvm::ffi::Shape band, int64_t fixed_split_size,
                               tvm::ffi::Shape tile_table, int64_t max_requests, int64_t max_tokens, int64_t max_kv_tokens) {
  return PlanSharedCapacityOf(num_qo_heads, num_kv_heads, num_ctas, band, fixed_split_size, tile_table, max_requests, max_tokens,
                              max_kv_tokens, 0, 0);
}

tvm::ffi::Shape PlanSharedCapacityOf(int64_t num_qo_heads, int64_t num_kv_heads, int64_t num_ctas, tvm::ffi::Shape band,
                                     int64_t fixed_split_size, tvm::ffi::Shape tile_table, int64_t max_requests, int64_t max_tokens,
                                     int64_t max_kv_tokens, int64_t max_levels, int64_t max_shared_tokens) {
  return Guarded([&] {
    const PlanParams params = MakeParams(num_qo_heads, num_kv_heads, num_ctas, band, fixed_split_size, tile_table);
    const PlanLimits limits{CheckedInt32(max_requests, "max_requests"), CheckedInt32(max_tokens, "max_tokens"), max_kv_tokens,
                            CheckedInt32(max_levels, "max_levels"), CheckedInt32(max_shared_tokens, "max_shared_tokens")};
    const PlanCapacity capacity = ComputeCapacity(params, limits);
    return tvm::ffi::Shape({capacity.plan_bytes, capacity.partial_rows});
  });
}

tvm::ffi::Shape PlanHeadListsCapacityOf(int64_t num_qo_heads, int64_t num_kv_heads, int64_t num_ctas, tvm::ffi::Shape band,
                                        int64_t fixed_split_size, tvm::ffi::Shape tile_table, int64_t max_requests, int64_t max_tokens,
                                        int64_t max_kv_tokens) {
  return Guarded([&] {
    const PlanParams params = MakeParams(num_qo_heads, num_kv_heads, num_ctas, band, fixed_split_size, tile_table);
    const PlanLimits limits{.max_requests = CheckedInt32(max_requests, "max_requests"),
                            .max_tokens = CheckedInt32(max_tokens, "max_tokens"),
                            .max_kv_tokens = max_kv_tokens,
                            .has_head_lists = true};
    const PlanCapacity capacity = ComputeCapacity(params, limits);
    return tvm::ffi::Shape({capacity.plan_bytes, capacity.partial_rows});
  });
}

void UploadPlan(TensorView plan_host, TensorView plan_device) {
  Guarded([&] {
    CheckIndex(plan_host, "plan_host");
    if (plan_device.device().device_type != kDLCUDA) {
      TVM_INFER_THROW(ArgumentError) << "argument `plan_device` is on device type " << static_cast<int>(plan_device.device().device_type)
                                     << "; plans are uploaded to cuda devices (type " << static_cast<int>(kDLCUDA)
                                     << "). The cpu executor takes the host's plan itself";
    }
    CheckRank(plan_device, "plan_device", 1, "the words of a plan");
    CheckDType(plan_device, "plan_device", DLDataType{kDLInt, 32, 1}, "a plan is int32 words");
    CheckContiguous(plan_device, "plan_device");
    const int32_t device_id = plan_device.device().device_id;
    constexpr int64_t kWordBytes = sizeof(int32_t);
    cuda::UploadPlan(device_id, TVMFFIEnvGetStream(kDLCUDA, device_id), DataPtr<void>(plan_host), plan_host.numel() * kWordBytes,
                     DataPtr<void>(plan_device), plan_device.numel() * kWordBytes);
  });
}

tvm::ffi::Shape FlatCosts(const TileCosts& costs) {
  std::vector<int64_t> flat;
  for (int32_t i = 0; i < costs.num_classes; ++i) {
    const TileClass& c = costs.classes[i];
    flat.insert(flat.end(), {c.rows, c.kv_granule, c.fixed, c.row, c.kv});
  }
  flat.insert(flat.end(), {costs.shared_merge.each, costs.shared_merge.once, costs.shared_merge.again});
  return tvm::ffi::Shape(flat.begin(), flat.end());
}

tvm::ffi::Shape CpuTileTable(tvm::ffi::String dtype, int64_t head_dim) { return CpuKVTileTable(dtype, head_dim, dtype); }

tvm::ffi::Shape CpuKVTileTable(tvm::ffi::String dtype, int64_t head_dim, tvm::ffi::String kv_dtype) {
  return CpuVOTileTable(dtype, head_dim, head_dim, kv_dtype);
}

tvm::ffi::Shape CpuVOTileTable(tvm::ffi::String dtype, int64_t head_dim, int64_t head_dim_vo, tvm::ffi::String kv_dtype) {
  return Guarded([&] {
    const KVDType* type = FindKVDType(std::string(dtype));
    if (type == nullptr || IsScaled(type->type)) {
      TVM_INFER_THROW(DTypeError) << "argument `dtype` is \"" << std::string(dtype)
                                  << "\"; the cpu executor takes float32, float16 and bfloat16";
    }
    const cpu::DType kv_type = CheckKVDTypeName(std::string(kv_dtype), "kv_dtype");
    CheckDTypePair(type->type, "dtype", kv_type, "kv_dtype");
    return FlatCosts(cpu::TileTable(type->type, kv_type, CheckedInt32(head_dim, "head_dim"), CheckedInt32(head_dim_vo, "head_dim_vo")));
  });
}

tvm::ffi::String CpuInfo() {
  return Guarded([] { return tvm::ffi::String(std::string(cpu::IsaName()) + " " + std::to_string(cpu::DefaultNumThreads())); });
}

}  // namespace tvm_infer::ffi_api
