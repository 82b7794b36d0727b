// Plans on their way to a device. A copy from ordinary memory would make the host wait; one from the planner's own buffer would race with
// the next step's plan. So plans pass through a ring of pinned buffers, each guarded by an event.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tvm_infer::cuda {

// Plans that a device may have under way; a host that is further ahead waits for the oldest copy.
inline constexpr int kStagingSlots = 8;

// Copies host memory to device memory, in the order of the stream. `host` may be written again at once. Thread safe. The device's context
// is current, and nothing is being captured.
void Upload(int32_t device_id, void* stream, const void* host, size_t bytes, void* device);

// Copies exactly the plan's bytes_used to device memory, in the order of the stream. `host_plan` may be written again at once. Thread safe.
//   host_plan, host_bytes      a plan (schedule/plan.h) and the size of its buffer
//   device_plan, device_bytes  16-byte aligned
// Throws Error("PlanMismatchError") for what is no plan of this version, Error("WorkspaceError") for a device buffer that is too small,
// Error("DeviceError") while the stream is being captured for a graph: a replay would bring back the plan of the capture.
void UploadPlan(int32_t device_id, void* stream, const void* host_plan, int64_t host_bytes, void* device_plan, int64_t device_bytes);

}  // namespace tvm_infer::cuda
