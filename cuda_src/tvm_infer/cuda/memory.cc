#include "tvm_infer/cuda/memory.h"

#include <algorithm>

#include "tvm_infer/cuda/driver.h"
#include "tvm_infer/error.h"

namespace tvm_infer::cuda {

void* AllocateDevice(int32_t device_id, int64_t bytes, const char* what) {
  const DeviceGuard guard(device_id);
  const DriverApi& driver = Driver();
  DevicePointer data = 0;
  const int code = driver.cuMemAlloc_v2(&data, static_cast<size_t>(std::max<int64_t>(bytes, 1)));
  if (code == kErrorOutOfMemory) {
    size_t free_bytes = 0, total_bytes = 0;
    driver.cuMemGetInfo_v2(&free_bytes, &total_bytes);
    TVM_INFER_THROW(ArgumentError) << "cuda device " << device_id << " (" << GetDevice(device_id).name << ") has no " << bytes
                                   << " bytes for " << what << ": " << free_bytes << " of " << total_bytes
                                   << " are free. Create the cache with fewer pages (num_pages) or a smaller step (max_batch, max_tokens)";
  }
  CheckDriver(code, "cuMemAlloc");
  return reinterpret_cast<void*>(data);
}

void* AllocatePinned(int32_t device_id, int64_t bytes) {
  const DeviceGuard guard(device_id);
  void* data = nullptr;
  CheckDriver(Driver().cuMemHostAlloc(&data, static_cast<size_t>(std::max<int64_t>(bytes, 1)), kHostAllocPortable), "cuMemHostAlloc");
  return data;
}

void FreePinned(int32_t device_id, void* data) noexcept {
  try {
    const DeviceGuard guard(device_id);
    Driver().cuMemFreeHost(data);
  } catch (...) {  // as below
  }
}

void FreeDevice(int32_t device_id, void* data) noexcept {
  try {
    const DeviceGuard guard(device_id);
    Driver().cuMemFree_v2(reinterpret_cast<DevicePointer>(data));
  } catch (...) {  // a driver that is shutting down has freed it already
  }
}

void CopyToDevice(void* device, const void* pinned, size_t bytes, void* stream) {
  CheckDriver(Driver().cuMemcpyHtoDAsync_v2(reinterpret_cast<DevicePointer>(device), pinned, bytes, stream), "cuMemcpyHtoDAsync");
}

void CopyToPinned(void* pinned, const void* device, size_t bytes, void* stream) {
  CheckDriver(Driver().cuMemcpyDtoHAsync_v2(pinned, reinterpret_cast<DevicePointer>(device), bytes, stream), "cuMemcpyDtoHAsync");
}

Event::Event(int32_t device_id) : device_id_(device_id) {
  const DeviceGuard guard(device_id);
  CheckDriver(Driver().cuEventCreate(&event_, kEventDisableTiming), "cuEventCreate");
}

Event::~Event() {
  try {
    const DeviceGuard guard(device_id_);
    Driver().cuEventDestroy_v2(event_);
  } catch (...) {  // as FreeDevice
  }
}

void Event::Record(void* stream) { CheckDriver(Driver().cuEventRecord(event_, stream), "cuEventRecord"); }

void Event::Wait() { CheckDriver(Driver().cuEventSynchronize(event_), "cuEventSynchronize"); }

}  // namespace tvm_infer::cuda
