// Device memory of the driver's own, for what lives as long as a cache, copies from and to page-locked memory, and marks in streams.
#pragma once

#include <cstddef>
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

// Between page-locked memory and the device's, in the order of the stream; they return at once. (A copy from host memory to host memory
// would not: the driver waits for the stream and copies by itself.)
void CopyToDevice(void* device, const void* pinned, size_t bytes, void* stream);
void CopyToPinned(void* pinned, const void* device, size_t bytes, void* stream);

// A mark in a stream that the host can wait for.
class Event {
 public:
  explicit Event(int32_t device_id);
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void Record(void* stream);  // behind the stream's work so far; the device's context is current
  void Wait();                // for the work before the last Record, if there was one

 private:
  int32_t device_id_;
  void* event_ = nullptr;
};

}  // namespace tvm_infer::cuda
