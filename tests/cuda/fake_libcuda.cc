// A libcuda.so.1 for tests on machines without a GPU. Device memory is host memory; launches are recorded. Devices: 0 and 1 are H200s, 2 is
// an A100. A cubin is the text "NAME ABI THREADS SHARED_BYTES CTAS_PER_SM". FAKE_CUDA_INIT: what cuInit returns.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "tvm_infer/cuda/driver_api.h"
#include "tvm_infer/cuda/params.h"
#include "tvm_infer/variant/variant.h"

using tvm_infer::cuda::AttentionParams;
using tvm_infer::cuda::DevicePointer;
using tvm_infer::cuda::GemvParams;
using tvm_infer::cuda::KernelInfo;
using tvm_infer::cuda::KvTensorMaps;
using tvm_infer::cuda::LaunchConfig;
using tvm_infer::cuda::Memcpy2D;
using tvm_infer::cuda::Memcpy3D;
using tvm_infer::cuda::PageBoundsParams;
using tvm_infer::cuda::PageScoresParams;
using tvm_infer::cuda::RopeAppendParams;
using tvm_infer::cuda::SelectPagesParams;

#if !defined(FAKE_CUDA_OLD)  // else a driver that lacks functions
namespace {

struct Library {
  std::string name;
  KernelInfo info;
};

std::string log_text;                // one line a call
std::map<std::string, int> failure;  // function -> what its next call returns
std::map<void*, size_t> allocated;   // device memory
std::string allocations;
bool capturing = false;
void* captured_stream = nullptr;  // the one that is captured; null: all are
int capture_mode = 0;             // global
void* current = nullptr;
int contexts[3];
unsigned char attention_params[sizeof(AttentionParams)], attention_maps[sizeof(KvTensorMaps)];
unsigned char rope_append_params[sizeof(RopeAppendParams)], gemv_params[sizeof(GemvParams)];
unsigned char page_bounds_params[sizeof(PageBoundsParams)], page_scores_params[sizeof(PageScoresParams)];
unsigned char select_pages_params[sizeof(SelectPagesParams)];
unsigned char variant_args[sizeof(tvm_infer::variant::Args)];

int Called(const char* name, const std::string& text = "") {
  log_text += std::string(name) + (text.empty() ? "" : " ") + text + "\n";
  const auto it = failure.find(name);
  if (it == failure.end()) return 0;
  const int code = it->second;
  failure.erase(it);
  return code;
}

std::string Numbers(std::initializer_list<uint64_t> values) {
  std::string text;
  for (uint64_t v : values) text += (text.empty() ? "" : ",") + std::to_string(v);
  return text;
}

}  // namespace

#define FAKE extern "C" __attribute__((visibility("default")))
// What tests ask.
FAKE const char* fake_log() { return log_text.c_str(); }
FAKE const char* fake_allocations() {  // "address bytes", a line each
  allocations.clear();
  for (const auto& [data, bytes] : allocated) {
    allocations += std::to_string(reinterpret_cast<uintptr_t>(data)) + " " + std::to_string(bytes) + "\n";
  }
  return allocations.c_str();
}
FAKE void fake_clear() {
  log_text.clear();
  failure.clear();
  capturing = false;
}
FAKE void fake_fail(const char* function, int code) { failure[function] = code; }
FAKE void fake_capture(int on) {
  capturing = on != 0;
  captured_stream = nullptr;
}
FAKE void fake_capture_stream(void* stream) {
  capturing = true;
  captured_stream = stream;
}
FAKE int fake_current_device() {
  for (int i = 0; i < 3; ++i) {
    if (current == &contexts[i]) return i;
  }
  return -1;
}
FAKE const void* fake_params() { return attention_params; }
FAKE const void* fake_rope_append_params() { return rope_append_params; }
FAKE const void* fake_gemv_params() { return gemv_params; }
FAKE const void* fake_page_bounds_params() { return page_bounds_params; }
FAKE const void* fake_page_scores_params() { return page_scores_params; }
FAKE const void* fake_select_pages_params() { return select_pages_params; }
FAKE const void* fake_variant_args() { return variant_args; }
FAKE const void* fake_maps() { return attention_maps; }

FAKE int cuInit(unsigned) {
  const char* code = std::getenv("FAKE_CUDA_INIT");
  return code ? std::atoi(code) : 0;
}
FAKE int cuDriverGetVersion(int* version) {
  const char* text = std::getenv("FAKE_CUDA_VERSION");
  return *version = text ? std::atoi(text) : 13000, 0;
}
FAKE int cuGetErrorName(int error, const char** name) {
  *name = error == 100 ? "CUDA_ERROR_NO_DEVICE" : error == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_FAKE";
  return 0;
}
FAKE int cuGetErrorString(int, const char** text) { return *text = "a fake text", 0; }
FAKE int cuDeviceGetCount(int* count) { return *count = 3, 0; }
FAKE int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
FAKE int cuDeviceGetName(char* name, int length, int device) {
  std::snprintf(name, length, "%s", device == 2 ? "Fake A100" : "Fake H200");
  return 0;
}
FAKE int cuDeviceGetAttribute(int* value, int attribute, int device) {
  const bool old = device == 2;
  *value = attribute == 16 ? (old ? 108 : 132) : attribute == 75 ? (old ? 8 : 9) : attribute == 76 ? 0 : old ? 166912 : 232448;
  return 0;
}
FAKE int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = &contexts[device], Called("cuDevicePrimaryCtxRetain"); }
FAKE int cuCtxGetCurrent(void** context) { return *context = current, 0; }
FAKE int cuCtxPushCurrent_v2(void* context) { return current = context, Called("cuCtxPushCurrent"); }
FAKE int cuCtxPopCurrent_v2(void** context) { return *context = current, current = nullptr, Called("cuCtxPopCurrent"); }
FAKE int cuLibraryLoadData(void** library, const void* code, int*, void**, unsigned, int*, void**, unsigned) {
  char name[64];
  auto* loaded = new Library;
  if (std::sscanf(static_cast<const char*>(code), "%63s %d %d %d %d", name, &loaded->info.abi, &loaded->info.threads,
                  &loaded->info.shared_bytes, &loaded->info.ctas_per_sm) != 5) {
    return 200;
  }
  loaded->name = name;
  loaded->info.tile_keys = loaded->name.find("_h256") != std::string::npos ? 64 : 128;
  *library = loaded;
  return Called("cuLibraryLoadData", name);
}
FAKE int cuLibraryUnload(void*) { return Called("cuLibraryUnload"); }
FAKE int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  *kernel = library;
  return static_cast<Library*>(library)->name == name ? Called("cuLibraryGetKernel") : 500;
}
FAKE int cuLibraryGetGlobal(DevicePointer* pointer, size_t* bytes, void* library, const char* name) {
  auto* loaded = static_cast<Library*>(library);
  if (loaded->name + "_info" != name) return 500;
  *pointer = reinterpret_cast<DevicePointer>(&loaded->info);
  *bytes = sizeof(KernelInfo);
  return current == nullptr ? 201 : 0;
}
FAKE int cuKernelSetAttribute(int attribute, int value, void*, int device) {
  return Called("cuKernelSetAttribute", std::to_string(attribute) + " " + std::to_string(value) + " " + std::to_string(device));
}
FAKE int cuLaunchKernelEx(const LaunchConfig* c, void* function, void** params, void** extra) {
  auto* loaded = static_cast<Library*>(function);
  const auto& a = *c->attributes;
  if (loaded->name.rfind("attention", 0) == 0) {
    std::memcpy(attention_params, params[0], sizeof(attention_params));
    std::memcpy(attention_maps, params[1], sizeof(attention_maps));
    if (loaded->name.find("_v") != std::string::npos) std::memcpy(variant_args, params[2], sizeof(variant_args));
  }
  if (loaded->name.rfind("rope_append", 0) == 0) std::memcpy(rope_append_params, params[0], sizeof(rope_append_params));
  if (loaded->name.rfind("gemv", 0) == 0) std::memcpy(gemv_params, params[0], sizeof(gemv_params));
  if (loaded->name.rfind("page_bounds", 0) == 0) std::memcpy(page_bounds_params, params[0], sizeof(page_bounds_params));
  if (loaded->name.rfind("page_scores", 0) == 0) std::memcpy(page_scores_params, params[0], sizeof(page_scores_params));
  if (loaded->name == "select_pages") std::memcpy(select_pages_params, params[0], sizeof(select_pages_params));
  return Called("cuLaunchKernelEx", loaded->name + " grid=" + Numbers({c->grid[0], c->grid[1], c->grid[2]}) + " block=" +
                                        Numbers({c->block[0], c->block[1], c->block[2]}) + " shared=" + std::to_string(c->shared_bytes) +
                                        " stream=" + std::to_string(reinterpret_cast<uintptr_t>(c->stream)) +
                                        " attributes=" + Numbers({c->num_attributes, uint64_t(a.id), uint64_t(a.value[0])}) +
                                        " device=" + std::to_string(fake_current_device()) + (extra ? " extra" : ""));
}
FAKE int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* base, const uint64_t* sizes, const uint64_t* strides,
                                const uint32_t* box, const uint32_t* element, int interleave, int swizzle, int promotion, int fill) {
  std::memset(map, 0, 128);
  std::memcpy(map, &base, sizeof(base));
  for (int i = 0; i < 4; ++i) {
    if (strides[i] % 16 != 0 || strides[i] >= uint64_t{1} << 40) return 1;
  }
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0 || reinterpret_cast<uintptr_t>(base) % 16 != 0 || base == nullptr) return 1;
  return Called(
      "cuTensorMapEncodeTiled",
      "type=" + std::to_string(type) + " rank=" + std::to_string(rank) + " base=" + std::to_string(reinterpret_cast<uintptr_t>(base)) +
          " sizes=" + Numbers({sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]}) + " strides=" +
          Numbers({strides[0], strides[1], strides[2], strides[3]}) + " box=" + Numbers({box[0], box[1], box[2], box[3], box[4]}) +
          " element=" + Numbers({element[0], element[1], element[2], element[3], element[4]}) +
          " modes=" + Numbers({uint64_t(interleave), uint64_t(swizzle), uint64_t(promotion), uint64_t(fill)}));
}
FAKE int cuMemcpyDtoH_v2(void* host, DevicePointer device, size_t bytes) {
  std::memcpy(host, reinterpret_cast<const void*>(device), bytes);
  return Called("cuMemcpyDtoH");
}
FAKE int cuMemcpyHtoDAsync_v2(DevicePointer device, const void* host, size_t bytes, void*) {
  std::memcpy(reinterpret_cast<void*>(device), host, bytes);
  return Called("cuMemcpyHtoDAsync", std::to_string(bytes));
}
FAKE int cuMemcpyDtoHAsync_v2(void* host, DevicePointer device, size_t bytes, void*) {
  std::memcpy(host, reinterpret_cast<const void*>(device), bytes);
  return Called("cuMemcpyDtoHAsync", std::to_string(bytes));
}
FAKE int cuMemAlloc_v2(DevicePointer* pointer, size_t bytes) {  // as a driver refuses it while any stream is captured in the mode "global"
  if (capturing && capture_mode != tvm_infer::cuda::kCaptureModeRelaxed) return Called("cuMemAlloc", "refused"), 900;
  const int code = Called("cuMemAlloc", std::to_string(bytes));
  if (code != 0) return code;
  void* data = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  allocated[data] = bytes;
  *pointer = reinterpret_cast<DevicePointer>(data);
  return 0;
}
FAKE int cuMemsetD2D8Async(DevicePointer pointer, size_t pitch, unsigned char value, size_t width, size_t height, void* stream) {
  for (size_t row = 0; row < height; ++row) std::memset(reinterpret_cast<char*>(pointer) + row * pitch, value, width);
  return Called("cuMemsetD2D8Async", std::to_string(reinterpret_cast<uintptr_t>(stream)));
}
FAKE int cuMemcpy2DAsync_v2(const Memcpy2D* copy, void* stream) {
  for (const Memcpy2D::Side& side : {copy->from, copy->to}) {
    if (side.memory_type != tvm_infer::cuda::kMemoryTypeDevice || side.x_bytes != 0 || side.y != 0) return 1;
    if (copy->width_bytes > side.pitch) return 1;
  }
  for (size_t row = 0; row < copy->height; ++row) {
    std::memcpy(reinterpret_cast<char*>(copy->to.device) + row * copy->to.pitch,
                reinterpret_cast<const char*>(copy->from.device) + row * copy->from.pitch, copy->width_bytes);
  }
  return Called("cuMemcpy2DAsync", std::to_string(reinterpret_cast<uintptr_t>(stream)));
}
FAKE int cuMemcpy3DAsync_v2(const Memcpy3D* copy, void*) {
  const bool is_out = copy->to.memory_type == tvm_infer::cuda::kMemoryTypeHost;
  const int code =
      Called("cuMemcpy3DAsync", (is_out ? "to_host " : "to_device ") + Numbers({copy->width_bytes, copy->height, copy->depth}));
  if (code != 0) return code;
  char* bases[2];
  const Memcpy3D::Side* sides[2] = {&copy->from, &copy->to};
  for (int i = 0; i < 2; ++i) {
    const Memcpy3D::Side& side = *sides[i];
    const bool is_device = side.memory_type == tvm_infer::cuda::kMemoryTypeDevice;
    if (!is_device && side.memory_type != tvm_infer::cuda::kMemoryTypeHost) return 1;
    if (side.x_bytes != 0 || side.z != 0 || side.level != 0 || side.reserved != nullptr) return 1;
    if (copy->width_bytes > side.pitch || side.y + copy->height > side.plane_rows) return 1;
    bases[i] = (is_device ? reinterpret_cast<char*>(side.device) : static_cast<char*>(side.host)) + side.y * side.pitch;
  }
  for (size_t plane = 0; plane < copy->depth; ++plane) {
    for (size_t row = 0; row < copy->height; ++row) {
      std::memcpy(bases[1] + (plane * copy->to.plane_rows + row) * copy->to.pitch,
                  bases[0] + (plane * copy->from.plane_rows + row) * copy->from.pitch, copy->width_bytes);
    }
  }
  return 0;
}
FAKE int cuMemFree_v2(DevicePointer pointer) {
  allocated.erase(reinterpret_cast<void*>(pointer));
  return std::free(reinterpret_cast<void*>(pointer)), Called("cuMemFree");
}
FAKE int cuMemGetInfo_v2(size_t* free_bytes, size_t* total_bytes) { return *free_bytes = 1000, *total_bytes = 2000, 0; }
FAKE int cuMemHostAlloc(void** pointer, size_t bytes, unsigned flags) {
  const int code = Called("cuMemHostAlloc", std::to_string(flags));
  if (code == 0) *pointer = std::malloc(bytes);
  return code;
}
FAKE int cuMemFreeHost(void* pointer) { return std::free(pointer), Called("cuMemFreeHost"); }
FAKE int cuEventCreate(void** event, unsigned flags) { return *event = &capturing, Called("cuEventCreate", std::to_string(flags)); }
FAKE int cuEventDestroy_v2(void*) { return Called("cuEventDestroy"); }
FAKE int cuEventRecord(void*, void*) { return Called("cuEventRecord"); }
FAKE int cuEventQuery(void*) { return 0; }
FAKE int cuEventSynchronize(void*) { return Called("cuEventSynchronize"); }
FAKE int cuStreamIsCapturing(void* stream, int* status) {
  *status = capturing && (captured_stream == nullptr || captured_stream == stream);
  return 0;
}
FAKE int cuThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(*mode, capture_mode);
  return 0;
}
FAKE int cuStreamSynchronize(void*) { return Called("cuStreamSynchronize"); }
#endif
