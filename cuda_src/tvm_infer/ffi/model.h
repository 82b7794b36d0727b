// Packed functions that exported models alone have: what the library says of itself, and whether it can run here.
#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <cstdint>

#include "tvm_infer/ffi/kv_cache_object.h"

#define TVM_INFER_MODEL_FUNCTIONS(V)                   \
  V(model_manifest, ModelManifest)                     \
  V(model_cubin, ModelCubin)                           \
  V(model_check_cuda, ModelCheckCuda)                  \
  V(model_create_cache, ModelCreateCache)              \
  V(model_create_scaled_cache, ModelCreateScaledCache) \
  V(model_set_variants, ModelSetVariants)

namespace tvm_infer::ffi_api {

// JSON (docs/deploy.md has its fields). ArgumentError where the library was linked without one.
tvm::ffi::String ModelManifest();

// The kernel's cubin; empty where the library does not hold it. For a tvm_infer in the same process, whose cache launches kernels of its
// own.
tvm::ffi::Bytes ModelCubin(tvm::ffi::String name, tvm::ffi::String arch);

// Throws ExecutorError naming both architectures where the library holds kernels, but none for this CUDA device, or no kernels at all.
void ModelCheckCuda(int64_t device_id);

// A cache for the model: of its layers' heads and dtype, which rotates as they do and computes what their attention is besides (caps,
// windows, biases, sinks). The type of its pages, their scales, whether it looks for shared prefixes, and the pages that its layers
// select in decode steps are what the model was exported with (`kv_cache_set_shared_prefix` and `kv_cache_set_page_budget` change the last
// two). Other arguments as of kv_cache_create; max_tokens 0: of the largest step that the model was compiled for.
//   weights  the model's, in the order of the manifest, on `device`; those that attention reads are kept by the cache, uncopied
// ArgumentError: `device` is not of the kind that the model was compiled for. Others as of model_set_variants, kv_cache_create.
PagedKVCache ModelCreateCache(tvm::ffi::Array<tvm::ffi::Tensor> weights, int64_t page_size, int64_t num_pages, int64_t max_batch,
                              int64_t max_tokens, DLDevice device);
// The same with pages of another type, by its name ("float8_e4m3fn"; "": what the model was exported with), and scales of pages of 8 bits
// as of kv_cache_set_scales; none: those that the model was exported with, where they are of this type, else 1. ArgumentError: scales of
// pages that have none. DTypeError: no such type beside the model's. ExecutorError: on CUDA no kernels for such pages at all, or, at the
// first step, none in the library.
PagedKVCache ModelCreateScaledCache(tvm::ffi::Array<tvm::ffi::Tensor> weights, tvm::ffi::String kv_dtype,
                                    tvm::ffi::Optional<tvm::ffi::TensorView> k_scales, tvm::ffi::Optional<tvm::ffi::TensorView> v_scales,
                                    int64_t page_size, int64_t num_pages, int64_t max_batch, int64_t max_tokens, DLDevice device);

// What the layers' attention is besides, given to a cache of the model's layers that was made elsewhere (the Python package's); layers
// without a variant get plain attention. ArgumentError, DTypeError: a weight that attention reads is missing, on another device, or of
// another shape or type; the cache has other layers. ExecutorError: there is no code of a variant for this machine's instruction set; such
// a weight is on a GPU, and the cache on the host.
// CacheStateError: as of kv_cache_set_variant. What is refused changes nothing.
void ModelSetVariants(PagedKVCache kv, tvm::ffi::Array<tvm::ffi::Tensor> weights);

// Throws ModelError where this library is an exported model whose layers have variants: a cache made without a look at the manifest would
// compute plain attention.
void CheckModelIsPlain();

}  // namespace tvm_infer::ffi_api
