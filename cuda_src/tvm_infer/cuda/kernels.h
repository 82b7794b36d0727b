// Kernels by name: cubins that were given or that a provider makes, loaded at first use, kept for the life of the process.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <string>
#include <utility>

#include "tvm_infer/cuda/driver.h"
#include "tvm_infer/cuda/params.h"

namespace tvm_infer::cuda {

// A kernel of a loaded cubin.
struct Kernel {
  std::string name;
  void* function;  // CUkernel, good for cuLaunchKernelEx
  KernelInfo info;
};

// The kernel called `name` (tvm_infer/jit/names.py) for the device: loaded at first use, then kept. Looked for among cubins given to
// AddCubin, then among those that an exported model embeds (embedded.h), then asked of the provider. Thread safe; the provider is called
// without a lock. Throws Error("ExecutorError") saying how to build it when there is none, Error("AbiError") when it was compiled from
// sources of another kKernelAbi, Error("DeviceError") when `stream` is being captured and the kernel is not loaded yet, since loading
// synchronises.
const Kernel& GetKernel(int32_t device_id, const std::string& name, void* stream);

// Keeps a cubin that holds kernel `name` for `arch`. Nothing is loaded until GetKernel. Throws Error("ArgumentError") when the kernel is
// loaded already, from other bytes: launches that were captured would not know the new one.
void AddCubin(const std::string& name, const std::string& arch, std::string cubin);

// Makes cubins that are missing: returns one for (name, arch), or "" for no such kernel; may throw. One for the process.
using CubinProvider = std::string (*)(const std::string& name, const std::string& arch);
void SetCubinProvider(CubinProvider provider);

// GetKernel for a call site that asks for one name: a load and a compare after the first call, for any number of threads.
class CachedKernel {
 public:
  explicit CachedKernel(std::string name) : name_(std::move(name)) {}
  const Kernel& Get(int32_t device_id, void* stream) {
    if (device_id < 0 || device_id >= kMaxDevices) return GetKernel(device_id, name_, stream);
    auto& slot = loaded_[device_id];
    const Kernel* kernel = slot.load(std::memory_order_acquire);
    if (kernel == nullptr) slot.store(kernel = &GetKernel(device_id, name_, stream), std::memory_order_release);
    return *kernel;
  }
  const std::string& name() const { return name_; }

 private:
  static constexpr int kMaxDevices = 16;
  const std::string name_;
  std::array<std::atomic<const Kernel*>, kMaxDevices> loaded_{};
};

}  // namespace tvm_infer::cuda
