#include "tvm_infer/ffi/cuda_functions.h"

#include <string>

#include "tvm_infer/cuda/kernels.h"
#include "tvm_infer/cuda/tile_table.h"
#include "tvm_infer/ffi/cuda_launch.h"
#include "tvm_infer/ffi/cuda_scope.h"
#include "tvm_infer/ffi/kv_dtype.h"
#include "tvm_infer/ffi/plan.h"
#include "tvm_infer/ffi/value_checks.h"

namespace tvm_infer::ffi_api {
namespace {

void CheckAtMost(int64_t value, int64_t limit, const char* of_plan, const char* of_call, const char* way_out) {
  if (value <= limit) return;
  TVM_INFER_THROW(PlanMismatchError) << "argument `plan` has " << value << " " << of_plan << "; " << of_call << " " << limit << ". "
                                     << way_out;
}

}  // namespace

tvm::ffi::Shape CudaTileTable(tvm::ffi::String dtype, int64_t head_dim) { return CudaKVTileTable(dtype, head_dim, dtype); }

tvm::ffi::Shape CudaKVTileTable(tvm::ffi::String dtype, int64_t head_dim, tvm::ffi::String kv_dtype) {
  return CudaVOTileTable(dtype, head_dim, head_dim, kv_dtype);
}

tvm::ffi::Shape CudaVOTileTable(tvm::ffi::String dtype, int64_t head_dim, int64_t head_dim_vo, tvm::ffi::String kv_dtype) {
  return Guarded([&] {
    if (dtype != "float16" && dtype != "bfloat16") {
      TVM_INFER_THROW(DTypeError) << "argument `dtype` is \"" << std::string(dtype) << "\"; the cuda executor takes float16 and bfloat16";
    }
    const cpu::DType type = FindKVDType(std::string(dtype))->type;
    const cpu::DType kv_type = CheckKVDTypeName(std::string(kv_dtype), "kv_dtype");
    CheckDTypePair(type, "dtype", kv_type, "kv_dtype");
    return FlatCosts(
        cuda::TileTable(on_cuda::ToTag(type), on_cuda::ToTag(kv_type), static_cast<int32_t>(head_dim), static_cast<int32_t>(head_dim_vo)));
  });
}

tvm::ffi::String CudaInfo(int64_t device_id) {
  return Guarded([&] {
    const cuda::Device& device = cuda::GetDevice(static_cast<int32_t>(device_id));
    return tvm::ffi::String(device.arch + " " + std::to_string(device.num_sms) + " " + device.name);
  });
}

void AddCubin(tvm::ffi::String name, tvm::ffi::String arch, tvm::ffi::Bytes cubin) {
  Guarded([&] { cuda::AddCubin(std::string(name), std::string(arch), std::string(cubin)); });
}

void CheckPlanFor(TensorView plan_host, int64_t num_tokens, int64_t num_qo_heads, int64_t num_kv_heads, int64_t max_partial_rows,
                  int64_t num_kv_lists, int64_t num_sms) {
  Guarded([&] {
    const PlanHeader& header = CheckPlan(plan_host);
    const int64_t plan_heads = static_cast<int64_t>(header.num_kv_heads) * header.group_size;
    if (header.num_kv_heads != num_kv_heads || plan_heads != num_qo_heads) {
      TVM_INFER_THROW(PlanMismatchError) << "argument `plan` was made for " << plan_heads << " query heads and " << header.num_kv_heads
                                         << " KV heads; the tensors have " << num_qo_heads << " and " << num_kv_heads
                                         << ". Plan with these num_qo_heads and num_kv_heads";
    }
    CheckAtMost(header.num_ctas, num_sms, "CTAs", "the device runs", "Plan for this device (num_ctas, its number of SMs)");
    CheckAtMost(header.num_tokens, num_tokens, "query tokens", "`q` has", "Plan with this batch's qo_indptr");
    CheckAtMost(header.num_kv_lists, num_kv_lists, "requests", "the page table has", "Pass the table of the batch that was planned");
    if (header.num_partial_rows > max_partial_rows) {
      TVM_INFER_THROW(WorkspaceError) << "argument `workspace` holds " << max_partial_rows << " partial rows; this plan needs "
                                      << header.num_partial_rows << ". Size it with tvm_infer.workspace_size";
    }
  });
}

int64_t PlanStatus(TensorView plan_device) {
  return Guarded([&]() -> int64_t {
    const Place place = PlaceOf(plan_device, "plan_device");
    if (!place.is_cuda()) {
      TVM_INFER_THROW(ArgumentError)
          << "argument `plan_device` is on the host; only kernels of a device leave a status in a plan. Pass the "
             "device tensor that the launches were given";
    }
    CheckIndex(plan_device, "plan_device", place);
    const int64_t bytes = plan_device.numel() * static_cast<int64_t>(sizeof(int32_t));
    if (bytes < static_cast<int64_t>(sizeof(PlanHeader))) return kNotAPlan;
    const CudaScope scope(place.device);
    PlanHeader header;
    const auto* base = DataPtr<const char>(plan_device);
    cuda::CopyToHost(&header, base, sizeof(header), scope.stream());
    if (header.magic != kPlanMagic || header.version != kPlanVersion) return kNotAPlan;
    const int64_t refusal_offset = header.tickets_offset + kRefusalTicket * static_cast<int64_t>(sizeof(int32_t));
    if (header.tickets_offset <= 0 || refusal_offset + static_cast<int64_t>(sizeof(int32_t)) > bytes) return kNotAPlan;
    int32_t status = kPlanAccepted;
    cuda::CopyToHost(&status, base + refusal_offset, sizeof(status), scope.stream());
    return status;
  });
}

}  // namespace tvm_infer::ffi_api
