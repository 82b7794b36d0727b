// The driver's functions as libcuda.so.1 exports them, found at first use: our own declarations of cuda.h's, so that building needs no CUDA
// toolkit. Names are the exported symbols, with the version suffix that cuda.h's macros add.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tvm_infer::cuda {

// Handles are pointers to opaque structs in cuda.h; a CUdevice is an int, a CUdeviceptr 64 bits.
using DevicePointer = unsigned long long;

// CUlaunchAttribute: the value is a union of 64 bytes whose first word is the only one that programmatic serialization reads.
struct LaunchAttribute {
  int id;
  char pad[4];
  alignas(8) int value[16];
};

// CUlaunchConfig.
struct LaunchConfig {
  unsigned int grid[3];
  unsigned int block[3];
  unsigned int shared_bytes;  // dynamic
  void* stream;
  LaunchAttribute* attributes;
  unsigned int num_attributes;
};

// CUDA_MEMCPY2D: `height` rows of `width_bytes`, `pitch` bytes apart; of each side the pointer that its memory type names counts.
struct Memcpy2D {
  struct Side {
    size_t x_bytes = 0, y = 0;
    unsigned int memory_type = 0;
    void* host = nullptr;
    DevicePointer device = 0;
    void* array = nullptr;
    size_t pitch = 0;
  } from, to;
  size_t width_bytes, height;
};

// CUDA_MEMCPY3D: `depth` planes of `height` rows of `width_bytes`; of each side rows are `pitch` bytes apart, planes `plane_rows` rows.
struct Memcpy3D {
  struct Side {
    size_t x_bytes = 0, y = 0, z = 0, level = 0;
    unsigned int memory_type = 0;
    void* host = nullptr;
    DevicePointer device = 0;
    void* array = nullptr;
    void* reserved = nullptr;
    size_t pitch = 0, plane_rows = 0;
  } from, to;
  size_t width_bytes, height, depth;
};

// Values of cuda.h's enumerations (tests/cuda/driver_constants.cc holds them, and the structs above, against cuda.h).
inline constexpr int kSuccess = 0;                    // CUDA_SUCCESS
inline constexpr int kErrorOutOfMemory = 2;           // CUDA_ERROR_OUT_OF_MEMORY
inline constexpr int kErrorNoDevice = 100;            // CUDA_ERROR_NO_DEVICE
inline constexpr int kErrorInvalidDevice = 101;       // CUDA_ERROR_INVALID_DEVICE
inline constexpr int kErrorNotReady = 600;            // CUDA_ERROR_NOT_READY
inline constexpr int kErrorCaptureImplicit = 906;     // CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
inline constexpr int kNumSms = 16;                    // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
inline constexpr int kComputeMajor = 75;              // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
inline constexpr int kComputeMinor = 76;              // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
inline constexpr int kMaxSharedOptin = 97;            // CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
inline constexpr int kMaxDynamicShared = 8;           // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
inline constexpr int kProgrammaticSerialization = 6;  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
inline constexpr unsigned kMemoryTypeHost = 1;        // CU_MEMORYTYPE_HOST
inline constexpr unsigned kMemoryTypeDevice = 2;      // CU_MEMORYTYPE_DEVICE
inline constexpr int kTensorMapUInt8 = 0;             // CU_TENSOR_MAP_DATA_TYPE_UINT8
inline constexpr int kTensorMapFloat16 = 6;           // CU_TENSOR_MAP_DATA_TYPE_FLOAT16
inline constexpr int kTensorMapBFloat16 = 9;          // CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
inline constexpr int kTensorMapInterleaveNone = 0;    // CU_TENSOR_MAP_INTERLEAVE_NONE
inline constexpr int kTensorMapSwizzle64 = 2;         // CU_TENSOR_MAP_SWIZZLE_64B
inline constexpr int kTensorMapSwizzle128 = 3;        // CU_TENSOR_MAP_SWIZZLE_128B
inline constexpr int kTensorMapPromotion64 = 1;       // CU_TENSOR_MAP_L2_PROMOTION_L2_64B
inline constexpr int kTensorMapPromotion128 = 2;      // CU_TENSOR_MAP_L2_PROMOTION_L2_128B
inline constexpr int kTensorMapZeroFill = 0;          // CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE
inline constexpr unsigned kHostAllocPortable = 1;     // CU_MEMHOSTALLOC_PORTABLE
inline constexpr unsigned kEventDisableTiming = 2;    // CU_EVENT_DISABLE_TIMING
inline constexpr int kCaptureStatusNone = 0;          // CU_STREAM_CAPTURE_STATUS_NONE
inline constexpr int kCaptureModeRelaxed = 2;         // CU_STREAM_CAPTURE_MODE_RELAXED

// V(name, parameters): every function returns a CUresult.
#define TVM_INFER_DRIVER_FUNCTIONS(V)                                                                                                     \
  V(cuInit, (unsigned int flags))                                                                                                         \
  V(cuDriverGetVersion, (int* version))                                                                                                   \
  V(cuGetErrorName, (int error, const char** name))                                                                                       \
  V(cuGetErrorString, (int error, const char** text))                                                                                     \
  V(cuDeviceGetCount, (int* count))                                                                                                       \
  V(cuDeviceGet, (int* device, int ordinal))                                                                                              \
  V(cuDeviceGetName, (char* name, int length, int device))                                                                                \
  V(cuDeviceGetAttribute, (int* value, int attribute, int device))                                                                        \
  V(cuDevicePrimaryCtxRetain, (void** context, int device))                                                                               \
  V(cuCtxGetCurrent, (void** context))                                                                                                    \
  V(cuCtxPushCurrent_v2, (void* context))                                                                                                 \
  V(cuCtxPopCurrent_v2, (void** context))                                                                                                 \
  V(cuLibraryLoadData, (void** library, const void* code, int* jit_options, void** jit_values, unsigned int num_jit_options,              \
                        int* library_options, void** library_values, unsigned int num_library_options))                                   \
  V(cuLibraryUnload, (void* library))                                                                                                     \
  V(cuLibraryGetKernel, (void** kernel, void* library, const char* name))                                                                 \
  V(cuLibraryGetGlobal, (DevicePointer * pointer, size_t* bytes, void* library, const char* name))                                        \
  V(cuKernelSetAttribute, (int attribute, int value, void* kernel, int device))                                                           \
  V(cuLaunchKernelEx, (const LaunchConfig* config, void* function, void** params, void** extra))                                          \
  V(cuTensorMapEncodeTiled, (void* map, int data_type, uint32_t rank, void* base, const uint64_t* sizes, const uint64_t* strides,         \
                             const uint32_t* box, const uint32_t* element_strides, int interleave, int swizzle, int promotion, int fill)) \
  V(cuMemcpyDtoH_v2, (void* host, DevicePointer device, size_t bytes))                                                                    \
  V(cuMemcpyHtoDAsync_v2, (DevicePointer device, const void* host, size_t bytes, void* stream))                                           \
  V(cuMemcpyDtoHAsync_v2, (void* host, DevicePointer device, size_t bytes, void* stream))                                                 \
  V(cuMemAlloc_v2, (DevicePointer * data, size_t bytes))                                                                                  \
  V(cuMemFree_v2, (DevicePointer data))                                                                                                   \
  V(cuMemGetInfo_v2, (size_t* free_bytes, size_t* total_bytes))                                                                           \
  V(cuMemsetD2D8Async, (DevicePointer pointer, size_t pitch, unsigned char value, size_t width, size_t height, void* stream))             \
  V(cuMemcpy2DAsync_v2, (const Memcpy2D* copy, void* stream))                                                                             \
  V(cuMemcpy3DAsync_v2, (const Memcpy3D* copy, void* stream))                                                                             \
  V(cuMemHostAlloc, (void** pointer, size_t bytes, unsigned int flags))                                                                   \
  V(cuMemFreeHost, (void* pointer))                                                                                                       \
  V(cuEventCreate, (void** event, unsigned int flags))                                                                                    \
  V(cuEventDestroy_v2, (void* event))                                                                                                     \
  V(cuEventRecord, (void* event, void* stream))                                                                                           \
  V(cuEventQuery, (void* event))                                                                                                          \
  V(cuEventSynchronize, (void* event))                                                                                                    \
  V(cuStreamIsCapturing, (void* stream, int* status))                                                                                     \
  V(cuThreadExchangeStreamCaptureMode, (int* mode))                                                                                       \
  V(cuStreamSynchronize, (void* stream))

struct DriverApi {
#define TVM_INFER_DRIVER_MEMBER(name, parameters) int(*name) parameters;
  TVM_INFER_DRIVER_FUNCTIONS(TVM_INFER_DRIVER_MEMBER)
#undef TVM_INFER_DRIVER_MEMBER
};

// The table, after cuInit. Throws Error("ExecutorError") where there is no libcuda.so.1 or no device, or where the driver is too old.
const DriverApi& Driver();

// Throws Error("DeviceError") naming the call `what`, the driver's error and its text, where code is not kSuccess.
void CheckDriver(int code, const char* what);

}  // namespace tvm_infer::cuda
