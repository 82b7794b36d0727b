// How results leave a CUDA device, in the order of the caller's stream.
#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/function.h>

#include <cstdint>

#define TVM_INFER_HOST_RESULTS_FUNCTIONS(V) \
  V(host_visible, HostVisible)              \
  V(copy_to_host, CopyTensorToHost)         \
  V(copy_on_stream, CopyOnStream)           \
  V(new_event, NewEvent)                    \
  V(wait_for_stream, WaitForStream)         \
  V(stream_is_capturing, StreamIsCapturing)

namespace tvm_infer::ffi_api {

// Page-locked host memory, as a tensor of `device` and as one of the host: what kernels store to the first is read in the second once the
// stream is done, without a copy. For results of a few hundred bytes: stores cross the bus one by one. Contents are 0.
tvm::ffi::Array<tvm::ffi::Tensor> HostVisible(tvm::ffi::Shape shape, DLDataType dtype, DLDevice device);

// `target` on the host gets what `source` on a device holds after the work before it on the current stream: both contiguous, of one shape
// and type. Waits.
void CopyTensorToHost(tvm::ffi::TensorView source, tvm::ffi::TensorView target);

// `target` gets what `source` holds after the work before it on the current stream of the device that one of them lies on; the other is
// page-locked memory of the host, as HostVisible makes it. Contiguous, of one type and as many elements. Returns at once.
void CopyOnStream(tvm::ffi::TensorView source, tvm::ffi::TensorView target);

// A mark in a stream: (record, wait). record() puts it behind the work so far of the device's current stream; wait() waits until the work
// before the last record() is done, at once if there was none.
tvm::ffi::Array<tvm::ffi::Function> NewEvent(DLDevice device);

// Waits for the current stream of a CUDA device.
void WaitForStream(DLDevice device);

// Whether the work on the current stream of a CUDA device is being recorded for a graph.
bool StreamIsCapturing(DLDevice device);

}  // namespace tvm_infer::ffi_api
