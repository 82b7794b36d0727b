#include "tvm_infer/cuda/staging.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "tvm_infer/cuda/driver.h"
#include "tvm_infer/error.h"
#include "tvm_infer/schedule/plan.h"

namespace tvm_infer::cuda {
namespace {

constexpr size_t kMinSlotBytes = 64 * 1024;  // the plan of 500 decode requests; doubled as larger ones come

// Pinned memory that one copy at a time is read from. Never released: the driver may be gone when static objects are destroyed.
class Slot {
 public:
  // Waits for the copy that the slot was last used for, then holds at least `bytes`.
  void* Acquire(size_t bytes) {
    const DriverApi& driver = Driver();
    if (event_ == nullptr) CheckDriver(driver.cuEventCreate(&event_, kEventDisableTiming), "cuEventCreate");
    if (is_in_flight_) CheckDriver(driver.cuEventSynchronize(event_), "cuEventSynchronize");
    is_in_flight_ = false;
    if (bytes <= capacity_) return data_;
    if (data_ != nullptr) CheckDriver(driver.cuMemFreeHost(data_), "cuMemFreeHost");
    data_ = nullptr;
    size_t capacity = std::max(capacity_, kMinSlotBytes);
    capacity_ = 0;
    while (capacity < bytes) capacity *= 2;
    CheckDriver(driver.cuMemHostAlloc(&data_, capacity, kHostAllocPortable), "cuMemHostAlloc");
    capacity_ = capacity;
    return data_;
  }

  void Copy(void* device, size_t bytes, void* stream) {
    const DriverApi& driver = Driver();
    CheckDriver(driver.cuMemcpyHtoDAsync_v2(reinterpret_cast<DevicePointer>(device), data_, bytes, stream), "cuMemcpyHtoDAsync");
    const int code = driver.cuEventRecord(event_, stream);
    if (code != kSuccess) driver.cuStreamSynchronize(stream);  // nothing would guard the slot
    CheckDriver(code, "cuEventRecord");
    is_in_flight_ = true;
  }

 private:
  void* data_ = nullptr;
  size_t capacity_ = 0;
  void* event_ = nullptr;
  bool is_in_flight_ = false;
};

struct Ring {
  std::mutex mutex;
  std::array<Slot, kStagingSlots> slots;
  int next = 0;
};

Ring& RingOf(int32_t device_id) {
  static auto* const mutex = new std::mutex;
  static auto* const rings = new std::map<int32_t, std::unique_ptr<Ring>>;
  const std::lock_guard<std::mutex> lock(*mutex);
  std::unique_ptr<Ring>& ring = (*rings)[device_id];
  if (ring == nullptr) ring = std::make_unique<Ring>();
  return *ring;
}

// Checks the plan and that it fits; returns its bytes.
size_t CheckedBytes(const void* host_plan, int64_t host_bytes, const void* device_plan, int64_t device_bytes) {
  const auto& header = *static_cast<const PlanHeader*>(host_plan);
  if (host_bytes < static_cast<int64_t>(sizeof(PlanHeader)) || header.magic != kPlanMagic) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `plan_host`, " << host_bytes << " bytes, is not a plan; make one with tvm_infer.plan";
  }
  if (header.version != kPlanVersion) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `plan_host` has version " << header.version << ", this library reads version "
                                       << kPlanVersion << "; make the plan with this library's tvm_infer.plan";
  }
  if (header.bytes_used > host_bytes || header.bytes_used < static_cast<int64_t>(sizeof(PlanHeader))) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `plan_host` says it uses " << header.bytes_used << " bytes but has " << host_bytes
                                       << "; pass the whole buffer";
  }
  if (header.bytes_used > device_bytes) {
    TVM_INFER_THROW(WorkspaceError) << "argument `plan_device` has " << device_bytes << " bytes; this plan uses " << header.bytes_used
                                    << ". Size it with tvm_infer.workspace_size(…).plan_bytes";
  }
  if (reinterpret_cast<uintptr_t>(device_plan) % 16 != 0) {
    TVM_INFER_THROW(ArgumentError) << "argument `plan_device` starts " << reinterpret_cast<uintptr_t>(device_plan) % 16
                                   << " bytes behind a multiple of 16; plans start on 16-byte boundaries";
  }
  return static_cast<size_t>(header.bytes_used);
}

}  // namespace

void Upload(int32_t device_id, void* stream, const void* host, size_t bytes, void* device) {
  Ring& ring = RingOf(device_id);
  const std::lock_guard<std::mutex> lock(ring.mutex);
  Slot& slot = ring.slots[ring.next];
  ring.next = (ring.next + 1) % kStagingSlots;
  std::memcpy(slot.Acquire(bytes), host, bytes);
  slot.Copy(device, bytes, stream);
}

void UploadPlan(int32_t device_id, void* stream, const void* host_plan, int64_t host_bytes, void* device_plan, int64_t device_bytes) {
  const size_t bytes = CheckedBytes(host_plan, host_bytes, device_plan, device_bytes);
  const DeviceGuard guard(device_id);
  if (IsCapturing(stream)) {
    TVM_INFER_THROW(DeviceError) << "plan_upload on a stream that is being captured for a graph: a replay would bring back the plan of the "
                                    "capture. Upload each step's plan before the replay, outside of the graph, into the buffer that was "
                                    "captured";
  }
  Upload(device_id, stream, host_plan, bytes, device_plan);
}

}  // namespace tvm_infer::cuda
