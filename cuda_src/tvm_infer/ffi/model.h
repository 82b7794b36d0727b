// Packed functions that exported models alone have: what the library says of itself, and whether it can run here.
#pragma once

#include <tvm/ffi/string.h>

#include <cstdint>

#define TVM_INFER_MODEL_FUNCTIONS(V) \
  V(model_manifest, ModelManifest)   \
  V(model_cubin, ModelCubin)         \
  V(model_check_cuda, ModelCheckCuda)

namespace tvm_infer::ffi_api {

// JSON (docs/deploy.md has its fields). ArgumentError where the library was linked without one.
tvm::ffi::String ModelManifest();

// The kernel's cubin; empty where the library does not hold it. For a tvm_infer in the same process, whose cache launches kernels of its
// own.
tvm::ffi::Bytes ModelCubin(tvm::ffi::String name, tvm::ffi::String arch);

// Throws ExecutorError naming both architectures where the library holds kernels, but none for this CUDA device, or no kernels at all.
void ModelCheckCuda(int64_t device_id);

}  // namespace tvm_infer::ffi_api
