// Device memory in which cuBLASLt's kernels keep partial sums and counters. Two products that run at the same time must not share it.
//
// The rule: the products of a stream share one workspace, which is allocated at the stream's first product and never freed, because a graph
// holds its address for ever. A product that is captured takes the workspace of its stream; where that has none (a stream made for the
// capture), the one of the stream on which the calling thread last ran a product: the warm-up that a capture needs anyway. A graph must
// therefore be replayed on that stream, or in order with its products and with other graphs captured after a warm-up there. TVM's graphs
// are: it runs a region on a stream, captures it on another, and replays it on the first. So are two threads with a stream each.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tvm_infer::cuda {

// What NVIDIA recommends for Hopper (cuBLAS manual, cublasSetWorkspace; 4 MiB before it). With less, the heuristic leaves out kernels that
// split k over more CTAs, which small m needs to fill 132 SMs.
inline constexpr size_t kMatmulWorkspaceBytes = size_t{32} << 20;

// Streams of a device that may have a workspace: 512 MiB in all.
inline constexpr int kMaxMatmulStreams = 16;

// The workspace for a product that is about to be launched; the device's context is current. 10 ns where the thread stays on a stream.
// Throws Error("WorkspaceError") in a capture before which the thread ran no product on the device, and for more streams than
// kMaxMatmulStreams; Error("DeviceError") where the device has too little memory.
void* MatmulWorkspace(int32_t device_id, void* stream);

// Bytes of all workspaces of a device so far.
int64_t MatmulWorkspaceBytes(int32_t device_id);

// While it lives, allocating is no error in a capture that another thread began (in the mode "global", which is the default).
class RelaxedCaptureMode {
 public:
  RelaxedCaptureMode();
  ~RelaxedCaptureMode();
  RelaxedCaptureMode(const RelaxedCaptureMode&) = delete;
  RelaxedCaptureMode& operator=(const RelaxedCaptureMode&) = delete;

 private:
  int mode_;
};

}  // namespace tvm_infer::cuda
