// Device memory of the driver's own, for what lives as long as a cache.
#pragma once

#include <cstdint>

namespace tvm_infer::cuda {

// At least `bytes`, aligned to 256. Synchronises, as the driver does. `what`: whose memory it is, for the error: Error("ArgumentError")
// says how much is free.
void* AllocateDevice(int32_t device_id, int64_t bytes, const char* what);

// Page-locked host memory that the device sees at the same address.
void* AllocatePinned(int32_t device_id, int64_t bytes);
void FreePinned(int32_t device_id, void* data) noexcept;

// Waits for work that may use it. Does nothing once the driver is shutting down.
void FreeDevice(int32_t device_id, void* data) noexcept;

}  // namespace tvm_infer::cuda
