// Devices, contexts, launches and tensor maps: what the CUDA executor asks of the driver (driver_api.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "tvm_infer/cuda/driver_api.h"
#include "tvm_infer/cuda/dtype.h"
#include "tvm_infer/cuda/params.h"

namespace tvm_infer::cuda {

inline constexpr int kMaxDevices = 64;  // devices are numbered below

struct Device {
  int32_t id;
  int32_t major, minor;  // compute capability
  int32_t num_sms;
  int32_t max_shared_bytes;  // dynamic, of one CTA, with opt-in
  std::string name;          // "NVIDIA H200"
  std::string arch;          // what cubins for it are compiled for: "sm_90a"; elsewhere "sm_80", …
  void* primary_context;     // retained for the life of the process
};

// Throws Error("ExecutorError") where there is no libcuda or no such device. About 1 ns after the first call for a device.
const Device& GetDevice(int32_t device_id);

// Whether kernels of ours run on the device's architecture.
bool HasKernels(const Device& device);

// Throws Error("ExecutorError") naming the executors that there are, where none do.
void CheckArchitecture(const Device& device);

// Makes the device's primary context current, if it is not, until the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device_id);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  bool pushed_ = false;
};

// Whether work on the stream is being recorded for a graph: nothing may synchronise then.
bool IsCapturing(void* stream);

// Waits for the work on the stream.
void Synchronize(void* stream);

// Bytes of device memory to the host, after the work before it on the stream. Synchronises.
void CopyToHost(void* host, const void* device, size_t bytes, void* stream);

struct Kernel;

// `params`: addresses of the kernel's parameters. PDL: its prologue may overlap the launch before it on the stream.
void LaunchKernel(const Kernel& kernel, int32_t grid, void* stream, void* const* params, bool programmatic_dependent = true);

// Five axes, innermost first; sizes and boxes in elements, strides in bytes (of axes 1 … 4). Elements of 16 or 8 bits; the swizzle
// that spans box[0], 128 or 64 bytes, zeros outside. `row_bytes`: that lie together; the L2 fetches 128 bytes at a time where that is whole
// such (256 read 6 % slower), else 64: with rows of 192 bytes a fifth of what came from memory was not wanted, or came twice.
TensorMap EncodeTensorMap(DTypeTag dtype, const void* base, const uint64_t (&sizes)[5], const uint64_t (&strides)[4],
                          const uint32_t (&box)[5], int64_t row_bytes);

}  // namespace tvm_infer::cuda
