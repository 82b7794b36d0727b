#include "tvm_infer/cuda/kernels.h"

#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "tvm_infer/embedded.h"
#include "tvm_infer/error.h"

namespace tvm_infer::cuda {
namespace {

using NameAndArch = std::pair<std::string, std::string>;
using NameAndDevice = std::pair<std::string, int32_t>;

struct Registry {
  std::mutex mutex;
  std::map<NameAndArch, std::string> cubins;  // kept: another device may ask for them
  std::map<NameAndDevice, std::unique_ptr<const Kernel>> kernels;
  std::atomic<CubinProvider> provider{nullptr};
};

// Never destroyed: other static objects may launch until the end.
Registry& TheRegistry() {
  static Registry* const registry = new Registry;
  return *registry;
}

// An exported model brings its kernels along.
std::string EmbeddedCubinOf(const std::string& name, const std::string& arch) {
  for (size_t i = 0; i < tvm_infer_embedded.num_cubins; ++i) {
    const EmbeddedCubin& embedded = tvm_infer_embedded.cubins[i];
    if (embedded.name == name && embedded.arch == arch) return std::string(embedded.cubin.begin, embedded.cubin.end);
  }
  return "";
}

[[noreturn]] void ThrowMissing(const std::string& name, const std::string& arch) {
  ErrorStream error("ExecutorError");
  error.stream() << "there is no kernel `" << name << "` for " << arch << ". ";
  if (tvm_infer_embedded.num_cubins == 0) {
    error.stream() << "Prebuild it with `tvm-infer build`, or import tvm_infer in this process, which compiles kernels as they are needed";
  } else {
    error.stream() << "This exported model holds";
    for (size_t i = 0; i < tvm_infer_embedded.num_cubins; ++i) {
      error.stream() << " " << tvm_infer_embedded.cubins[i].name << " for " << tvm_infer_embedded.cubins[i].arch << ",";
    }
    error.stream() << " and there is no tvm_infer in this process to compile others: export it with the archs, page_sizes, kv_dtype "
                      "and page_budget that it is to run with";
  }
}

KernelInfo ReadInfo(void* library, const std::string& name) {
  const DriverApi& driver = Driver();
  DevicePointer address = 0;
  size_t bytes = 0;
  const std::string symbol = name + "_info";
  const int code = driver.cuLibraryGetGlobal(&address, &bytes, library, symbol.c_str());
  if (code != kSuccess) CheckDriver(code, ("cuLibraryGetGlobal of `" + symbol + "`").c_str());
  // Whatever its size, it begins with the number by which both sides know whether they agree.
  KernelInfo info{};
  CheckDriver(driver.cuMemcpyDtoH_v2(&info, address, bytes < sizeof(info) ? bytes : sizeof(info)), "cuMemcpyDtoH");
  if (info.abi != kKernelAbi || bytes != sizeof(info)) {
    TVM_INFER_THROW(AbiError) << "kernel `" << name << "` was compiled from sources of kernel ABI " << info.abi
                              << ", this library launches " << kKernelAbi
                              << "; build it again with this version of tvm_infer (`tvm-infer build`)";
  }
  return info;
}

// Unloads a library that turned out to be unusable.
class LoadedLibrary {
 public:
  LoadedLibrary(const std::string& name, const std::string& cubin) {
    const int code = Driver().cuLibraryLoadData(&library_, cubin.data(), nullptr, nullptr, 0, nullptr, nullptr, 0);
    if (code != kSuccess) CheckDriver(code, ("cuLibraryLoadData of `" + name + "`").c_str());
  }
  ~LoadedLibrary() {
    if (library_ != nullptr) Driver().cuLibraryUnload(library_);
  }
  LoadedLibrary(const LoadedLibrary&) = delete;
  LoadedLibrary& operator=(const LoadedLibrary&) = delete;
  void* get() const { return library_; }
  void Keep() { library_ = nullptr; }

 private:
  void* library_ = nullptr;
};

std::unique_ptr<const Kernel> Load(const Device& device, const std::string& name, const std::string& cubin) {
  const DeviceGuard guard(device.id);
  const DriverApi& driver = Driver();
  LoadedLibrary library(name, cubin);
  auto kernel = std::make_unique<Kernel>();
  kernel->name = name;
  const int code = driver.cuLibraryGetKernel(&kernel->function, library.get(), name.c_str());
  if (code != kSuccess) CheckDriver(code, ("cuLibraryGetKernel of `" + name + "`").c_str());
  kernel->info = ReadInfo(library.get(), name);
  if (kernel->info.shared_bytes > device.max_shared_bytes) {
    TVM_INFER_THROW(ExecutorError) << "kernel `" << name << "` needs " << kernel->info.shared_bytes
                                   << " bytes of shared memory; a CTA of cuda device " << device.id << " (" << device.name << ") has "
                                   << device.max_shared_bytes;
  }
  // A CUdevice is the ordinal it was got for.
  CheckDriver(driver.cuKernelSetAttribute(kMaxDynamicShared, kernel->info.shared_bytes, kernel->function, device.id),
              "cuKernelSetAttribute");
  library.Keep();
  return kernel;
}

}  // namespace

const Kernel& GetKernel(int32_t device_id, const std::string& name, void* stream) {
  Registry& registry = TheRegistry();
  const Device& device = GetDevice(device_id);
  const NameAndDevice key(name, device_id);
  const NameAndArch cubin_key(name, device.arch);
  bool has_cubin;
  {
    const std::lock_guard<std::mutex> lock(registry.mutex);
    if (const auto it = registry.kernels.find(key); it != registry.kernels.end()) return *it->second;
    has_cubin = registry.cubins.count(cubin_key) != 0;
  }
  CheckArchitecture(device);
  const DeviceGuard guard(device_id);
  if (IsCapturing(stream)) {
    TVM_INFER_THROW(DeviceError) << "kernel `" << name << "` is not loaded, and the stream is being captured for a graph; loading "
                                 << "synchronises, which a capture forbids. Make the call once before capturing it";
  }
  // NOTE: no lock while the provider runs. It may need Python's global lock, whose holder may be waiting for ours.
  std::string provided;
  if (!has_cubin) provided = EmbeddedCubinOf(name, device.arch);
  if (!has_cubin && provided.empty()) {
    const CubinProvider provider = registry.provider.load(std::memory_order_acquire);
    if (provider != nullptr) provided = provider(name, device.arch);
    if (provided.empty()) ThrowMissing(name, device.arch);
  }
  const std::lock_guard<std::mutex> lock(registry.mutex);
  if (const auto it = registry.kernels.find(key); it != registry.kernels.end()) return *it->second;
  const std::string& cubin = registry.cubins.try_emplace(cubin_key, std::move(provided)).first->second;
  return *registry.kernels.emplace(key, Load(device, name, cubin)).first->second;
}

void AddCubin(const std::string& name, const std::string& arch, std::string cubin) {
  if (cubin.empty()) TVM_INFER_THROW(ArgumentError) << "argument `cubin` of kernel `" << name << "` for " << arch << " is empty";
  Registry& registry = TheRegistry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  const NameAndArch key(name, arch);
  for (const auto& [loaded, kernel] : registry.kernels) {
    if (loaded.first != name || GetDevice(loaded.second).arch != arch || registry.cubins[key] == cubin) continue;
    TVM_INFER_THROW(ArgumentError) << "kernel `" << name << "` for " << arch << " is loaded already, from another cubin; kernels of a "
                                   << "running process are not replaced. Add cubins before the first call that needs them";
  }
  registry.cubins[key] = std::move(cubin);
}

void SetCubinProvider(CubinProvider provider) { TheRegistry().provider.store(provider, std::memory_order_release); }

}  // namespace tvm_infer::cuda
