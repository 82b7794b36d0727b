#include "tvm_infer/ffi/matmul.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#include "tvm_infer/cpu/blas.h"
#include "tvm_infer/cpu/matmul.h"
#include "tvm_infer/ffi/common.h"

namespace tvm_infer::ffi_api {
namespace {

// A tensor [..., rows, cols] seen as one matrix.
struct Matrix {
  int64_t rows, cols, row_stride;
};

Matrix AsMatrix(const TensorView& tensor, const char* name, const char* dims) {
  CheckCpu(tensor, name);
  CheckDType(tensor, name, DLDataType{kDLFloat, 32, 1}, "matmul computes in float32 on the cpu; cast a, b and out to float32");
  if (tensor.ndim() < 2) {
    TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` has rank " << tensor.ndim() << ", shape " << ShapeString(tensor)
                                   << "; it must have rank 2 or more: " << dims;
  }
  const int last = tensor.ndim() - 1;
  Matrix matrix{1, tensor.size(last), std::max<int64_t>(tensor.size(last), 1)};
  if (tensor.numel() == 0) {  // has any strides: numpy exports zeros
    for (int axis = 0; axis < last; ++axis) matrix.rows *= tensor.size(axis);
    return matrix;
  }
  CheckLastDimContiguous(tensor, name);
  bool has_stride = false;  // dimensions of size 1 have any stride
  int64_t next = 0;         // the stride that continues the rows so far
  for (int axis = last - 1; axis >= 0; --axis) {
    if (tensor.size(axis) == 1) continue;
    if (!has_stride) {
      matrix.row_stride = Stride(tensor, axis);
      has_stride = true;
    } else if (Stride(tensor, axis) != next) {
      TVM_INFER_THROW(ArgumentError) << "argument `" << name << "`, shape " << ShapeString(tensor) << ", has stride "
                                     << Stride(tensor, axis) << " in dimension " << axis << "; rows must be evenly spaced (stride " << next
                                     << " there) to be one matrix. Make it contiguous first";
    }
    matrix.rows *= tensor.size(axis);
    next = tensor.size(axis) * Stride(tensor, axis);
  }
  if (matrix.rows > 1 && matrix.row_stride < matrix.cols) {
    TVM_INFER_THROW(ArgumentError) << "argument `" << name << "`, shape " << ShapeString(tensor) << ", has row stride " << matrix.row_stride
                                   << "; rows must not overlap (at least " << matrix.cols << "). Make it contiguous first";
  }
  const int64_t limit = std::numeric_limits<int32_t>::max();
  if (matrix.rows > limit || matrix.cols > limit || matrix.row_stride > limit) {
    TVM_INFER_THROW(ArgumentError) << "argument `" << name << "`, shape " << ShapeString(tensor) << ", row stride " << matrix.row_stride
                                   << ": rows, columns and row stride must be at most " << limit << " (the BLAS counts in 32 bits)";
  }
  // BLAS checks leading dimensions of empty and single-row matrices too.
  matrix.row_stride = std::max<int64_t>({matrix.row_stride, matrix.cols, 1});
  return matrix;
}

void CheckSize(const TensorView& tensor, const char* name, int axis_from_end, int64_t expected, const char* what) {
  CheckDim(tensor, name, tensor.ndim() - axis_from_end, expected, what);
}

}  // namespace

void Matmul(TensorView a, TensorView b, int64_t transpose_b, TensorView out) {
  Guarded([&] {
    const Matrix a_mat = AsMatrix(a, "a", "[..., m, k]");
    CheckRank(b, "b", 2, transpose_b ? "[n, k]" : "[k, n]");
    const Matrix b_mat = AsMatrix(b, "b", transpose_b ? "[n, k]" : "[k, n]");
    const Matrix out_mat = AsMatrix(out, "out", "[..., m, n]");
    CheckSize(b, "b", transpose_b ? 1 : 2, a_mat.cols, "k, the last dimension of `a`");
    CheckSize(out, "out", 1, transpose_b ? b_mat.rows : b_mat.cols, "n of `b`");
    if (out_mat.rows != a_mat.rows) {
      TVM_INFER_THROW(ArgumentError) << "argument `out`, shape " << ShapeString(out) << ", has " << out_mat.rows << " rows; `a`, shape "
                                     << ShapeString(a) << ", has " << a_mat.rows;
    }
    const cpu::MatmulArgs args{
        a_mat.rows,       out_mat.cols,     a_mat.cols,          DataPtr<const float>(a), a_mat.row_stride, DataPtr<const float>(b),
        b_mat.row_stride, transpose_b != 0, DataPtr<float>(out), out_mat.row_stride};
    cpu::Matmul(args, 0);
  });
}

tvm::ffi::String SetBlas(tvm::ffi::String path, tvm::ffi::String prefix) {
  return Guarded([&] {
    cpu::SetBlas(path, prefix);
    return tvm::ffi::String(cpu::GetBlas().core);
  });
}

tvm::ffi::String BlasPath() { return tvm::ffi::String(cpu::HasBlas() ? cpu::GetBlas().path : ""); }

}  // namespace tvm_infer::ffi_api
