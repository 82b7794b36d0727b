#include "tvm_infer/cuda/matmul_workspace.h"

#include <array>
#include <map>
#include <mutex>

#include "tvm_infer/cuda/driver.h"
#include "tvm_infer/error.h"

namespace tvm_infer::cuda {
namespace {

struct Registry {
  std::mutex mutex;
  std::map<int32_t, std::map<const void*, void*>> devices;  // device -> stream -> workspace
};

// Never destroyed: the driver may be gone when static objects are.
Registry& TheRegistry() {
  static auto* const registry = new Registry;
  return *registry;
}

// Where a thread last ran a product.
struct LastUse {
  const void* stream;
  void* workspace;  // null: nowhere yet
};

LastUse& LastUseOf(int32_t device_id) {
  thread_local std::array<LastUse, kMaxDevices> uses{};
  return uses[device_id];
}

// What tells streams apart. CU_STREAM_PER_THREAD is one handle for as many streams as there are threads.
const void* StreamKey(void* stream) {
  thread_local const char own = 0;
  return reinterpret_cast<uintptr_t>(stream) == 2 ? &own : stream;
}

[[noreturn]] void ThrowUnprepared(int32_t device_id) {
  TVM_INFER_THROW(WorkspaceError) << "matmul on a stream of cuda device " << device_id
                                  << " that is being captured for a graph, before this "
                                  << "thread ran a product there: its workspace of " << kMatmulWorkspaceBytes
                                  << " bytes cannot be allocated in a capture. Make the call once on an ordinary stream of this thread "
                                     "before capturing it";
}

void* Allocate() {
  const RelaxedCaptureMode relaxed;
  DevicePointer pointer = 0;
  CheckDriver(Driver().cuMemAlloc_v2(&pointer, kMatmulWorkspaceBytes), "cuMemAlloc of the 32 MiB workspace of matmul");
  return reinterpret_cast<void*>(pointer);
}

}  // namespace

void* MatmulWorkspace(int32_t device_id, void* stream) {
  LastUse& last = LastUseOf(device_id);
  const void* key = StreamKey(stream);
  if (last.workspace != nullptr && last.stream == key) return last.workspace;
  Registry& registry = TheRegistry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  auto& streams = registry.devices[device_id];
  auto found = streams.find(key);
  if (found == streams.end()) {
    if (IsCapturing(stream)) {
      if (last.workspace == nullptr) ThrowUnprepared(device_id);
      return last.workspace;
    }
    if (streams.size() >= kMaxMatmulStreams) {
      TVM_INFER_THROW(WorkspaceError) << "matmul on more than " << kMaxMatmulStreams << " streams of cuda device " << device_id
                                      << ": each keeps a workspace of " << kMatmulWorkspaceBytes
                                      << " bytes for the life of the process. Keep streams and use them again, instead of making new ones";
    }
    found = streams.emplace(key, Allocate()).first;
  }
  last = LastUse{key, found->second};
  return last.workspace;
}

int64_t MatmulWorkspaceBytes(int32_t device_id) {
  Registry& registry = TheRegistry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  const auto found = registry.devices.find(device_id);
  return found == registry.devices.end() ? 0 : static_cast<int64_t>(found->second.size() * kMatmulWorkspaceBytes);
}

RelaxedCaptureMode::RelaxedCaptureMode() : mode_(kCaptureModeRelaxed) {
  CheckDriver(Driver().cuThreadExchangeStreamCaptureMode(&mode_), "cuThreadExchangeStreamCaptureMode");
}

RelaxedCaptureMode::~RelaxedCaptureMode() { Driver().cuThreadExchangeStreamCaptureMode(&mode_); }

}  // namespace tvm_infer::cuda
