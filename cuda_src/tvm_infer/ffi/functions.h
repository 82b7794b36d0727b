// Every packed function of tvm_infer, once. register.cc turns the table into global functions `tvm_infer.<name>` (shared library);
// exports.cc turns it into symbols `__tvm_ffi_tvm_infer_<name>` (static object, which registers nothing when it is loaded).
// To add one: declare it here with its arguments, add its row, and give it a .cc file; relax/extern_calls.py has the Python side.
#pragma once

#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <cstdint>

#include "tvm_infer/ffi/attention.h"
#include "tvm_infer/ffi/cuda_functions.h"
#include "tvm_infer/ffi/host_results.h"
#include "tvm_infer/ffi/kv_cache.h"
#include "tvm_infer/ffi/kv_cache_like.h"
#include "tvm_infer/ffi/kv_cache_reuse.h"
#include "tvm_infer/ffi/kv_cache_selection.h"
#include "tvm_infer/ffi/kv_dtype.h"
#include "tvm_infer/ffi/matmul.h"
#include "tvm_infer/ffi/matmul_cuda.h"
#include "tvm_infer/ffi/page_selection.h"
#include "tvm_infer/ffi/plan.h"
#include "tvm_infer/ffi/read_ceiling.h"
#include "tvm_infer/ffi/rope.h"
#include "tvm_infer/ffi/scale_lse.h"
#include "tvm_infer/ffi/tensor.h"
#include "tvm_infer/ffi/variant.h"

// V(name, function): name is what follows "tvm_infer."
#define TVM_INFER_FUNCTIONS(V)              \
  TVM_INFER_PLAN_FUNCTIONS(V)               \
  TVM_INFER_ATTENTION_FUNCTIONS(V)          \
  TVM_INFER_CUDA_FUNCTIONS(V)               \
  TVM_INFER_HOST_RESULTS_FUNCTIONS(V)       \
  TVM_INFER_KV_CACHE_FUNCTIONS(V)           \
  TVM_INFER_KV_CACHE_LIKE_FUNCTIONS(V)      \
  TVM_INFER_KV_CACHE_REUSE_FUNCTIONS(V)     \
  TVM_INFER_KV_CACHE_SELECTION_FUNCTIONS(V) \
  TVM_INFER_KV_DTYPE_FUNCTIONS(V)           \
  TVM_INFER_MATMUL_FUNCTIONS(V)             \
  TVM_INFER_MATMUL_CUDA_FUNCTIONS(V)        \
  TVM_INFER_PAGE_SELECTION_FUNCTIONS(V)     \
  TVM_INFER_READ_CEILING_FUNCTIONS(V)       \
  TVM_INFER_ROPE_FUNCTIONS(V)               \
  TVM_INFER_SCALE_LSE_FUNCTIONS(V)          \
  TVM_INFER_TENSOR_FUNCTIONS(V)             \
  TVM_INFER_VARIANT_FUNCTIONS(V)
