#include "tvm_infer/ffi/host_results.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "tvm_infer/cuda/memory.h"
#include "tvm_infer/ffi/cuda_scope.h"

namespace tvm_infer::ffi_api {
namespace {

using tvm::ffi::Tensor;

struct PinnedAllocator {
  int32_t device_id;
  void AllocData(DLTensor* tensor) {
    const auto bytes = static_cast<int64_t>(tvm::ffi::GetDataSize(*tensor));
    tensor->data = cuda::AllocatePinned(device_id, bytes);
    std::memset(tensor->data, 0, static_cast<size_t>(bytes));
  }
  void FreeData(DLTensor* tensor) { cuda::FreePinned(device_id, tensor->data); }
};

// The memory of another tensor, kept alive by it.
struct Shared {
  Tensor owner;
  void AllocData(DLTensor* tensor) { tensor->data = DataPtr<void>(TensorView(owner)); }
  void FreeData(DLTensor*) {}
};

void CheckCuda(DLDevice device, const char* name) {
  if (device.device_type == kDLCUDA) return;
  TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` is on " << DeviceString(device) << "; it must be on a cuda device";
}

void CheckCopy(const TensorView& source, const TensorView& target) {
  CheckContiguous(source, "source");
  CheckContiguous(target, "target");
  CheckDType(target, "target", source.dtype(), "source's");
  if (source.numel() != target.numel()) {
    TVM_INFER_THROW(ArgumentError) << "argument `target` has shape " << ShapeString(target) << ", `source` " << ShapeString(source)
                                   << "; they must have as many elements";
  }
}

size_t BytesOf(const TensorView& tensor) { return static_cast<size_t>(tensor.numel()) * tensor.dtype().bits / 8; }

}  // namespace

tvm::ffi::Array<Tensor> HostVisible(tvm::ffi::Shape shape, DLDataType dtype, DLDevice device) {
  return Guarded([&] {
    CheckCuda(device, "device");
    const Tensor host = Tensor::FromNDAlloc(PinnedAllocator{device.device_id}, shape, dtype, kHost.device);
    return tvm::ffi::Array<Tensor>({Tensor::FromNDAlloc(Shared{host}, shape, dtype, device), host});
  });
}

void CopyTensorToHost(TensorView source, TensorView target) {
  Guarded([&] {
    CheckCuda(source.device(), "source");
    CheckCpu(target, "target");
    CheckCopy(source, target);
    const CudaScope scope(source.device());
    const size_t bytes = BytesOf(source);
    if (bytes > 0) cuda::CopyToHost(DataPtr<void>(target), DataPtr<void>(source), bytes, scope.stream());
  });
}

void CopyOnStream(TensorView source, TensorView target) {
  Guarded([&] {
    const bool to_device = source.device().device_type == kDLCPU;
    const TensorView& on_device = to_device ? target : source;
    CheckCuda(on_device.device(), to_device ? "target" : "source");
    if (!to_device) CheckCpu(target, "target");
    CheckCopy(source, target);
    const CudaScope scope(on_device.device());
    const size_t bytes = BytesOf(source);
    if (bytes == 0) return;
    const auto copy = to_device ? cuda::CopyToDevice : cuda::CopyToPinned;
    copy(DataPtr<void>(target), DataPtr<const void>(source), bytes, scope.stream());
  });
}

tvm::ffi::Array<tvm::ffi::Function> NewEvent(DLDevice device) {
  return Guarded([&] {
    CheckCuda(device, "device");
    const auto event = std::make_shared<cuda::Event>(device.device_id);
    const auto record = [event, device] {
      Guarded([&] {
        const CudaScope scope(device);
        event->Record(scope.stream());
      });
    };
    const auto wait = [event, device] {
      Guarded([&] {
        const CudaScope scope(device);  // the waiting thread may have no context yet
        event->Wait();
      });
    };
    return tvm::ffi::Array<tvm::ffi::Function>({tvm::ffi::Function::FromTyped(record), tvm::ffi::Function::FromTyped(wait)});
  });
}

void WaitForStream(DLDevice device) {
  Guarded([&] {
    CheckCuda(device, "device");
    const CudaScope scope(device);
    cuda::Synchronize(scope.stream());
  });
}

bool StreamIsCapturing(DLDevice device) {
  return Guarded([&] {
    CheckCuda(device, "device");
    const CudaScope scope(device);
    return cuda::IsCapturing(scope.stream());
  });
}

}  // namespace tvm_infer::ffi_api
