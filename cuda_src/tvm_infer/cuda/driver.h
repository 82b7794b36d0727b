// The few driver calls that the CUDA executor needs. libcuda.so.1 is opened at first use, so that the library builds without the CUDA
// toolkit and runs on machines without a GPU. No CUDA headers: our own declarations (driver.cc).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "tvm_infer/cuda/params.h"

namespace tvm_infer::cuda {

struct Device {
  int32_t id;
  int32_t major, minor;  // compute capability
  int32_t num_sms;
  int32_t max_shared_bytes;  // dynamic, of one CTA, with opt-in
  std::string name;          // "NVIDIA H200"
  std::string arch;          // what its cubins are compiled for: "sm_90a"; elsewhere "sm_80", …
};

// Throws Error("ExecutorError") where there is no libcuda, no such device, or its architecture has no kernels.
const Device& GetDevice(int32_t device_id);

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

// Throws Error("DeviceError") naming the call `what`, the driver's error and its text.
void CheckDriver(int code, const char* what);

// A kernel of a loaded cubin.
struct Kernel {
  void* function;  // CUkernel, good for cuLaunchKernelEx
  KernelInfo info;
};

// The kernel called `name` (tvm_infer/jit/names.py) for the device: loaded at first use, then kept. Looked for among cubins given to
// AddCubin, then asked of the provider. Throws Error("ExecutorError") saying how to build it when there is none.
const Kernel& GetKernel(int32_t device_id, const std::string& name);

// Keeps a cubin that holds kernel `name` for `arch`. Nothing is loaded until GetKernel.
void AddCubin(const std::string& name, const std::string& arch, std::string cubin);

// Makes cubins that are missing: returns one for (name, arch), or "" for no such kernel; may throw. One for the process.
using CubinProvider = std::string (*)(const std::string& name, const std::string& arch);
void SetCubinProvider(CubinProvider provider);

// `params`: addresses of the kernel's parameters. PDL: its prologue may overlap the launch before it on the stream.
void LaunchKernel(const Kernel& kernel, int32_t grid, void* stream, void* const* params, bool programmatic_dependent = true);

// Five axes, innermost first; sizes and boxes in elements, strides in bytes (of axes 1 … 4). 16-bit elements, 128-byte swizzle, 128-byte
// L2 promotion, zeros outside.
TensorMap EncodeTensorMap(bool is_bf16, const void* base, const uint64_t (&sizes)[5], const uint64_t (&strides)[4],
                          const uint32_t (&box)[5]);

}  // namespace tvm_infer::cuda
