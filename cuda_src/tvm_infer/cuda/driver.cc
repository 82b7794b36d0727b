#include "tvm_infer/cuda/driver.h"

#include <array>
#include <atomic>
#include <memory>
#include <mutex>

#include "tvm_infer/cuda/kernels.h"
#include "tvm_infer/error.h"

namespace tvm_infer::cuda {
namespace {

std::unique_ptr<Device> Describe(int32_t device_id) {
  const DriverApi& driver = Driver();
  int count = 0;
  const int code = driver.cuDeviceGetCount(&count);
  if (code != kErrorNoDevice) CheckDriver(code, "cuDeviceGetCount");
  if (device_id < 0 || device_id >= count || device_id >= kMaxDevices) {
    TVM_INFER_THROW(ExecutorError) << "there is no cuda device " << device_id << ": the driver sees " << count
                                   << (count == 1 ? " device" : " devices") << ", numbered from 0. Executors here: cpu"
                                   << (count > 0 ? ", cuda" : "");
  }
  int handle = 0;
  CheckDriver(driver.cuDeviceGet(&handle, device_id), "cuDeviceGet");
  const auto attribute = [&](int id) {
    int value = 0;
    CheckDriver(driver.cuDeviceGetAttribute(&value, id, handle), "cuDeviceGetAttribute");
    return value;
  };
  auto device = std::make_unique<Device>();
  device->id = device_id;
  device->major = attribute(kComputeMajor);
  device->minor = attribute(kComputeMinor);
  device->num_sms = attribute(kNumSms);
  device->max_shared_bytes = attribute(kMaxSharedOptin);
  char name[256] = "";
  CheckDriver(driver.cuDeviceGetName(name, sizeof(name), handle), "cuDeviceGetName");
  device->name = name;
  // Kernels of Hopper use instructions that exist there alone, hence the "a".
  device->arch = "sm_" + std::to_string(device->major) + std::to_string(device->minor) + (device->major == 9 ? "a" : "");
  CheckDriver(driver.cuDevicePrimaryCtxRetain(&device->primary_context, handle), "cuDevicePrimaryCtxRetain");
  return device;
}

}  // namespace

const Device& GetDevice(int32_t device_id) {
  // Never destroyed, as contexts are never released: other static objects may launch until the end.
  static auto* const devices = new std::array<std::atomic<const Device*>, kMaxDevices>{};
  static auto* const mutex = new std::mutex;
  if (device_id >= 0 && device_id < kMaxDevices) {
    if (const Device* device = (*devices)[device_id].load(std::memory_order_acquire)) return *device;
  }
  const std::lock_guard<std::mutex> lock(*mutex);
  if (device_id >= 0 && device_id < kMaxDevices) {
    if (const Device* device = (*devices)[device_id].load(std::memory_order_acquire)) return *device;
  }
  const Device* device = Describe(device_id).release();
  (*devices)[device_id].store(device, std::memory_order_release);
  return *device;
}

bool HasKernels(const Device& device) { return device.arch == "sm_90a"; }

void CheckArchitecture(const Device& device) {
  if (HasKernels(device)) return;
  TVM_INFER_THROW(ExecutorError) << "cuda device " << device.id << " (" << device.name << ") has architecture " << device.arch
                                 << ", for which there are no kernels. Executors: cuda on sm_90a (H100, H200, GH200), cpu for host "
                                    "tensors. Move the tensors to the host, or use such a device";
}

DeviceGuard::DeviceGuard(int32_t device_id) {
  const Device& device = GetDevice(device_id);
  const DriverApi& driver = Driver();
  void* current = nullptr;
  CheckDriver(driver.cuCtxGetCurrent(&current), "cuCtxGetCurrent");
  if (current == device.primary_context) return;
  CheckDriver(driver.cuCtxPushCurrent_v2(device.primary_context), "cuCtxPushCurrent");
  pushed_ = true;
}

DeviceGuard::~DeviceGuard() {
  void* popped = nullptr;
  if (pushed_) Driver().cuCtxPopCurrent_v2(&popped);
}

bool IsCapturing(void* stream) {
  int status = kCaptureStatusNone;
  const int code = Driver().cuStreamIsCapturing(stream, &status);
  // The legacy stream cannot be asked while another stream of the context is being captured, and cannot be synchronised either.
  if (code == kErrorCaptureImplicit) return true;
  CheckDriver(code, "cuStreamIsCapturing");
  return status != kCaptureStatusNone;
}

void Synchronize(void* stream) { CheckDriver(Driver().cuStreamSynchronize(stream), "cuStreamSynchronize"); }

void CopyToHost(void* host, const void* device, size_t bytes, void* stream) {
  const DriverApi& driver = Driver();
  CheckDriver(driver.cuStreamSynchronize(stream), "cuStreamSynchronize");
  CheckDriver(driver.cuMemcpyDtoH_v2(host, reinterpret_cast<DevicePointer>(device), bytes), "cuMemcpyDtoH");
}

void LaunchKernel(const Kernel& kernel, int32_t grid, void* stream, void* const* params, bool programmatic_dependent) {
  LaunchAttribute attribute{};
  attribute.id = kProgrammaticSerialization;
  attribute.value[0] = 1;
  LaunchConfig config{};
  config.grid[0] = static_cast<unsigned int>(grid);
  config.grid[1] = config.grid[2] = 1;
  config.block[0] = static_cast<unsigned int>(kernel.info.threads);
  config.block[1] = config.block[2] = 1;
  config.shared_bytes = static_cast<unsigned int>(kernel.info.shared_bytes);
  config.stream = stream;
  config.attributes = &attribute;
  config.num_attributes = programmatic_dependent ? 1 : 0;
  const int code = Driver().cuLaunchKernelEx(&config, kernel.function, const_cast<void**>(params), nullptr);
  if (code != kSuccess) CheckDriver(code, ("cuLaunchKernelEx of `" + kernel.name + "`").c_str());
}

TensorMap EncodeTensorMap(DTypeTag dtype, const void* base, const uint64_t (&sizes)[5], const uint64_t (&strides)[4],
                          const uint32_t (&box)[5], int64_t row_bytes) {
  constexpr uint32_t kElementStrides[5] = {1, 1, 1, 1, 1};
  const int type = IsScaled(dtype) ? kTensorMapUInt8 : dtype == DTypeTag::kBFloat16 ? kTensorMapBFloat16 : kTensorMapFloat16;
  const int swizzle = box[0] * ElementBytes(dtype) == 64 ? kTensorMapSwizzle64 : kTensorMapSwizzle128;
  const int promotion = row_bytes % 128 == 0 ? kTensorMapPromotion128 : kTensorMapPromotion64;
  TensorMap map;
  CheckDriver(Driver().cuTensorMapEncodeTiled(&map, type, 5, const_cast<void*>(base), sizes, strides, box, kElementStrides,
                                              kTensorMapInterleaveNone, swizzle, promotion, kTensorMapZeroFill),
              "cuTensorMapEncodeTiled");
  return map;
}

}  // namespace tvm_infer::cuda
