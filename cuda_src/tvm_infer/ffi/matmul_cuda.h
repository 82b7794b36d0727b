// The CUDA half of the matrix product's binding, and the packed functions about its library.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/string.h>

#include <cstdint>

#include "tvm_infer/ffi/common.h"

#define TVM_INFER_MATMUL_CUDA_FUNCTIONS(V) \
  V(set_cublas, LoadCublas)                \
  V(cublas_path, CublasPath)               \
  V(set_matmul_tf32, ExchangeTf32)         \
  V(set_matmul_gemv, ExchangeGemv)         \
  V(matmul_workspace_bytes, WorkspaceBytes)

namespace tvm_infer::ffi_api {

// Opens the cuBLASLt at `path` for this process, before its first product on a CUDA device; returns its version (130100: 13.1.0).
// Without this, the first product asks the global function `tvm_infer.find_cublas() -> path` if there is one (Python registers it), then
// looks as cuda/cublas_api.h says.
int64_t LoadCublas(tvm::ffi::String path);

// The library in force, or "".
tvm::ffi::String CublasPath();

// Whether float32 products on CUDA round their inputs to TF32; initially what TVM_INFER_MATMUL_TF32 says. Returns what was set before.
bool ExchangeTf32(bool enabled);

// Whether products of a few rows run on our own kernel (cuda/gemv.h), else all on cuBLASLt; initially what TVM_INFER_MATMUL_GEMV says.
// Returns what was set before.
bool ExchangeGemv(bool enabled);

// Device memory that the products of a CUDA device hold for good.
int64_t WorkspaceBytes(int64_t device_id);

// A tensor [..., rows, cols] seen as one matrix.
struct Matrix {
  int64_t rows, cols, row_stride;
};

// A matrix of out's shape and dtype that is added. data: null where there is none.
struct Addend {
  const void* data = nullptr;
  int64_t row_stride = 0;
};

struct Product {
  Matrix a, b, out;
  bool transpose_b;
  Addend c;
  bool b_is_constant = false;
};

namespace on_cuda {

// Throws DTypeError unless a and b are both float16, bfloat16 or float32, and out is that or float32.
void CheckMatmulTypes(const TensorView& a, const TensorView& b, const TensorView& out);

// Guard and stream, resolve the library, launch. The tensors are those of `product`, and lie at `place`.
void Matmul(const Place& place, const Product& product, const TensorView& a, const TensorView& b, const TensorView& out);

}  // namespace on_cuda
}  // namespace tvm_infer::ffi_api
