#include "tvm_infer/cuda/driver_api.h"

#include <dlfcn.h>

#include <string>

#include "tvm_infer/error.h"

namespace tvm_infer::cuda {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";

// What opening the library gave: a table, or why there is none. Never destroyed: other static objects may launch until the end.
struct Opened {
  DriverApi api{};
  std::string failure;
};

std::string ErrorText(const DriverApi& api, int code) {
  const char* name = nullptr;
  const char* text = nullptr;
  if (api.cuGetErrorName(code, &name) != kSuccess || name == nullptr) name = "unknown error";
  if (api.cuGetErrorString(code, &text) != kSuccess || text == nullptr) text = "no text";
  return std::string(name) + " (" + std::to_string(code) + "): " + text;
}

void Open(Opened* opened) {
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    opened->failure = std::string("there is no NVIDIA driver (") + (reason ? reason : kLibrary) + ")";
    return;
  }
  DriverApi& api = opened->api;
#define TVM_INFER_DRIVER_FIND(function, parameters)                                                                           \
  api.function = reinterpret_cast<decltype(api.function)>(dlsym(library, #function));                                         \
  if (api.function == nullptr) {                                                                                              \
    opened->failure = "the NVIDIA driver lacks " #function ": it is older than CUDA 12.0 (version 525). Install a newer one"; \
    return;                                                                                                                   \
  }
  TVM_INFER_DRIVER_FUNCTIONS(TVM_INFER_DRIVER_FIND)
#undef TVM_INFER_DRIVER_FIND
  if (const int code = api.cuInit(0); code != kSuccess) {
    opened->failure = "the NVIDIA driver does not start: cuInit returned " + ErrorText(api, code);
  }
}

const Opened& OpenedDriver() {
  static const Opened* const opened = [] {
    auto* result = new Opened;
    Open(result);
    return result;
  }();
  return *opened;
}

}  // namespace

const DriverApi& Driver() {
  const Opened& opened = OpenedDriver();
  if (!opened.failure.empty()) {
    TVM_INFER_THROW(ExecutorError) << "the cuda executor is not available: " << opened.failure
                                   << ". The cpu executor is: pass host tensors";
  }
  return opened.api;
}

void CheckDriver(int code, const char* what) {
  if (code == kSuccess) return;
  TVM_INFER_THROW(DeviceError) << what << " failed: " << ErrorText(OpenedDriver().api, code);
}

}  // namespace tvm_infer::cuda
