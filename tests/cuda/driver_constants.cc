// Compiled, not run, where CUDA's headers are: our declarations of the driver (cuda/driver_api.h) against cuda.h.
#include <cuda.h>

#include <cstddef>

#include "tvm_infer/cuda/driver_api.h"
#include "tvm_infer/cuda/params.h"

namespace ours = tvm_infer::cuda;

static_assert(ours::kSuccess == CUDA_SUCCESS);
static_assert(ours::kErrorNoDevice == CUDA_ERROR_NO_DEVICE);
static_assert(ours::kErrorInvalidDevice == CUDA_ERROR_INVALID_DEVICE);
static_assert(ours::kErrorNotReady == CUDA_ERROR_NOT_READY);
static_assert(ours::kErrorCaptureImplicit == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
static_assert(ours::kNumSms == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
static_assert(ours::kComputeMajor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
static_assert(ours::kComputeMinor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
static_assert(ours::kMaxSharedOptin == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
static_assert(ours::kMaxDynamicShared == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
static_assert(ours::kProgrammaticSerialization == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
static_assert(ours::kMemoryTypeHost == CU_MEMORYTYPE_HOST);
static_assert(ours::kMemoryTypeDevice == CU_MEMORYTYPE_DEVICE);
static_assert(ours::kTensorMapUInt8 == CU_TENSOR_MAP_DATA_TYPE_UINT8);
static_assert(ours::kTensorMapFloat16 == CU_TENSOR_MAP_DATA_TYPE_FLOAT16);
static_assert(ours::kTensorMapBFloat16 == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16);
static_assert(ours::kTensorMapInterleaveNone == CU_TENSOR_MAP_INTERLEAVE_NONE);
static_assert(ours::kTensorMapSwizzle64 == CU_TENSOR_MAP_SWIZZLE_64B);
static_assert(ours::kTensorMapSwizzle128 == CU_TENSOR_MAP_SWIZZLE_128B);
static_assert(ours::kTensorMapPromotion64 == CU_TENSOR_MAP_L2_PROMOTION_L2_64B);
static_assert(ours::kTensorMapPromotion128 == CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
static_assert(ours::kTensorMapZeroFill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
static_assert(ours::kHostAllocPortable == CU_MEMHOSTALLOC_PORTABLE);
static_assert(ours::kEventDisableTiming == CU_EVENT_DISABLE_TIMING);
static_assert(ours::kCaptureStatusNone == CU_STREAM_CAPTURE_STATUS_NONE);
static_assert(ours::kCaptureModeRelaxed == CU_STREAM_CAPTURE_MODE_RELAXED);

// CUDA 13 aligns the type to 128 bytes; cuTensorMapEncodeTiled and the instructions ask for 64.
static_assert(sizeof(ours::TensorMap) == sizeof(CUtensorMap) && alignof(ours::TensorMap) >= 64);
static_assert(sizeof(ours::LaunchAttribute) == sizeof(CUlaunchAttribute) && alignof(ours::LaunchAttribute) == alignof(CUlaunchAttribute));
static_assert(offsetof(ours::LaunchAttribute, id) == offsetof(CUlaunchAttribute, id));
static_assert(offsetof(ours::LaunchAttribute, value) == offsetof(CUlaunchAttribute, value));
static_assert(sizeof(ours::LaunchAttribute::value) == sizeof(CUlaunchAttributeValue));
static_assert(offsetof(CUlaunchAttributeValue, programmaticStreamSerializationAllowed) == 0);
static_assert(sizeof(ours::LaunchConfig) == sizeof(CUlaunchConfig));
static_assert(offsetof(ours::LaunchConfig, grid) == offsetof(CUlaunchConfig, gridDimX));
static_assert(offsetof(ours::LaunchConfig, block) == offsetof(CUlaunchConfig, blockDimX));
static_assert(offsetof(ours::LaunchConfig, shared_bytes) == offsetof(CUlaunchConfig, sharedMemBytes));
static_assert(offsetof(ours::LaunchConfig, stream) == offsetof(CUlaunchConfig, hStream));
static_assert(offsetof(ours::LaunchConfig, attributes) == offsetof(CUlaunchConfig, attrs));
static_assert(offsetof(ours::LaunchConfig, num_attributes) == offsetof(CUlaunchConfig, numAttrs));
static_assert(sizeof(ours::Memcpy2D) == sizeof(CUDA_MEMCPY2D));
static_assert(offsetof(ours::Memcpy2D, from.memory_type) == offsetof(CUDA_MEMCPY2D, srcMemoryType));
static_assert(offsetof(ours::Memcpy2D, from.device) == offsetof(CUDA_MEMCPY2D, srcDevice));
static_assert(offsetof(ours::Memcpy2D, from.pitch) == offsetof(CUDA_MEMCPY2D, srcPitch));
static_assert(offsetof(ours::Memcpy2D, to.memory_type) == offsetof(CUDA_MEMCPY2D, dstMemoryType));
static_assert(offsetof(ours::Memcpy2D, to.device) == offsetof(CUDA_MEMCPY2D, dstDevice));
static_assert(offsetof(ours::Memcpy2D, to.pitch) == offsetof(CUDA_MEMCPY2D, dstPitch));
static_assert(offsetof(ours::Memcpy2D, width_bytes) == offsetof(CUDA_MEMCPY2D, WidthInBytes));
static_assert(offsetof(ours::Memcpy2D, height) == offsetof(CUDA_MEMCPY2D, Height));
static_assert(sizeof(ours::Memcpy3D) == sizeof(CUDA_MEMCPY3D));
static_assert(offsetof(ours::Memcpy3D, from.y) == offsetof(CUDA_MEMCPY3D, srcY));
static_assert(offsetof(ours::Memcpy3D, from.memory_type) == offsetof(CUDA_MEMCPY3D, srcMemoryType));
static_assert(offsetof(ours::Memcpy3D, from.host) == offsetof(CUDA_MEMCPY3D, srcHost));
static_assert(offsetof(ours::Memcpy3D, from.device) == offsetof(CUDA_MEMCPY3D, srcDevice));
static_assert(offsetof(ours::Memcpy3D, from.pitch) == offsetof(CUDA_MEMCPY3D, srcPitch));
static_assert(offsetof(ours::Memcpy3D, from.plane_rows) == offsetof(CUDA_MEMCPY3D, srcHeight));
static_assert(offsetof(ours::Memcpy3D, to.y) == offsetof(CUDA_MEMCPY3D, dstY));
static_assert(offsetof(ours::Memcpy3D, to.memory_type) == offsetof(CUDA_MEMCPY3D, dstMemoryType));
static_assert(offsetof(ours::Memcpy3D, to.host) == offsetof(CUDA_MEMCPY3D, dstHost));
static_assert(offsetof(ours::Memcpy3D, to.device) == offsetof(CUDA_MEMCPY3D, dstDevice));
static_assert(offsetof(ours::Memcpy3D, to.pitch) == offsetof(CUDA_MEMCPY3D, dstPitch));
static_assert(offsetof(ours::Memcpy3D, to.plane_rows) == offsetof(CUDA_MEMCPY3D, dstHeight));
static_assert(offsetof(ours::Memcpy3D, width_bytes) == offsetof(CUDA_MEMCPY3D, WidthInBytes));
static_assert(offsetof(ours::Memcpy3D, depth) == offsetof(CUDA_MEMCPY3D, Depth));
static_assert(sizeof(ours::DevicePointer) == sizeof(CUdeviceptr) && sizeof(CUdevice) == sizeof(int));

// The exported name behind each of cuda.h's macros, and as many parameters as ours.
template <typename... A, typename... B>
constexpr bool SameArity(int (*)(A...), CUresult (*)(B...)) {
  return sizeof...(A) == sizeof...(B) && ((sizeof(A) == sizeof(B)) && ...);
}
#define HOLD(name, parameters) static_assert(SameArity(static_cast<int(*) parameters>(nullptr), static_cast<decltype(&::name)>(nullptr)));
using ours::DevicePointer;
using ours::LaunchConfig;
using ours::Memcpy2D;
using ours::Memcpy3D;
TVM_INFER_DRIVER_FUNCTIONS(HOLD)
