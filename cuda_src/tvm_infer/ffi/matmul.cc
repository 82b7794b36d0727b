#include "tvm_infer/ffi/matmul.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>

#include "tvm_infer/cpu/blas.h"
#include "tvm_infer/cpu/matmul.h"
#include "tvm_infer/ffi/common.h"
#include "tvm_infer/ffi/matmul_cuda.h"

namespace tvm_infer::ffi_api {
namespace {

Matrix AsMatrix(const TensorView& tensor, const char* name, const char* dims) {
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
                                   << ": rows, columns and row stride must be at most " << limit
                                   << " (BLAS libraries count in 32 bits). Multiply in parts";
  }
  // BLAS checks leading dimensions of empty and single-row matrices too.
  matrix.row_stride = std::max<int64_t>({matrix.row_stride, matrix.cols, 1});
  return matrix;
}

void CheckSize(const TensorView& tensor, const char* name, int axis_from_end, int64_t expected, const char* what) {
  CheckDim(tensor, name, tensor.ndim() - axis_from_end, expected, what);
}

Product CheckProduct(const TensorView& a, const TensorView& b, bool transpose_b, const TensorView& out) {
  const char* b_dims = transpose_b ? "[n, k]" : "[k, n]";
  Product product{AsMatrix(a, "a", "[..., m, k]"), {}, {}, transpose_b, {}};
  CheckRank(b, "b", 2, b_dims);
  product.b = AsMatrix(b, "b", b_dims);
  product.out = AsMatrix(out, "out", "[..., m, n]");
  CheckSize(b, "b", transpose_b ? 1 : 2, product.a.cols, "k, the last dimension of `a`");
  CheckSize(out, "out", 1, transpose_b ? product.b.rows : product.b.cols, "n of `b`");
  if (product.out.rows != product.a.rows) {
    TVM_INFER_THROW(ArgumentError) << "argument `out`, shape " << ShapeString(out) << ", has " << product.out.rows << " rows; `a`, shape "
                                   << ShapeString(a) << ", has " << product.a.rows;
  }
  return product;
}

// Whether c and out have elements in common, both of `rows` x `cols`. Where row strides differ, whether their ranges of memory meet.
bool Overlaps(const TensorView& c, const Matrix& at, const TensorView& out, const Matrix& to) {
  const int64_t bytes = out.dtype().bits / 8, width = to.cols * bytes;
  const auto c_begin = reinterpret_cast<intptr_t>(DataPtr<const void>(c)), begin = reinterpret_cast<intptr_t>(DataPtr<const void>(out));
  const auto extent = [&](const Matrix& x) { return (x.rows - 1) * x.row_stride * bytes + width; };
  if (c_begin >= begin + extent(to) || begin >= c_begin + extent(at)) return false;
  if (at.row_stride != to.row_stride) return true;
  const int64_t pitch = to.row_stride * bytes, shift = std::abs(c_begin - begin) % pitch;  // of columns
  return shift < width || pitch - shift < width;
}

Addend CheckAddend(const TensorView& c, const TensorView& out, const Matrix& to) {
  CheckDType(c, "c", out.dtype(), "c is added in `out`'s dtype; cast it");
  const Matrix matrix = AsMatrix(c, "c", "[..., m, n]");
  CheckSize(c, "c", 1, to.cols, "n, the last dimension of `out`");
  if (matrix.rows != to.rows) {
    TVM_INFER_THROW(ArgumentError) << "argument `c`, shape " << ShapeString(c) << ", has " << matrix.rows << " rows; `out`, shape "
                                   << ShapeString(out) << ", has " << to.rows << ". A bias of one row is not broadcast: add it afterwards";
  }
  if (to.rows == 0 || to.cols == 0) return {};
  const bool in_place = DataPtr<const void>(c) == DataPtr<const void>(out) && matrix.row_stride == to.row_stride;
  if (!in_place && Overlaps(c, matrix, out, to)) {
    TVM_INFER_THROW(ArgumentError)
        << "argument `c`, shape " << ShapeString(c) << ", row stride " << matrix.row_stride << ", overlaps `out`, row stride "
        << to.row_stride << ", in part; c must be out itself (the same first element and row stride) or apart from it. Copy c first";
  }
  return {DataPtr<const void>(c), matrix.row_stride};
}

void CheckHostTypes(const TensorView& a, const TensorView& b, const TensorView& out) {
  const char* names[] = {"a", "b", "out"};
  const TensorView* tensors[] = {&a, &b, &out};
  for (int i = 0; i < 3; ++i) {
    CheckDType(*tensors[i], names[i], DLDataType{kDLFloat, 32, 1}, "matmul computes in float32 on the cpu; cast a, b and out to float32");
  }
}

void OnHost(const Product& x, const TensorView& a, const TensorView& b, const TensorView& out) {
  const cpu::MatmulArgs args{x.a.rows,
                             x.out.cols,
                             x.a.cols,
                             DataPtr<const float>(a),
                             x.a.row_stride,
                             DataPtr<const float>(b),
                             x.b.row_stride,
                             x.transpose_b,
                             DataPtr<float>(out),
                             x.out.row_stride,
                             static_cast<const float*>(x.c.data),
                             x.c.row_stride};
  cpu::Matmul(args, 0);
}

struct RightSide {
  const TensorView& tensor;
  bool is_transposed, is_constant;
};

// c: null where nothing is added.
void Multiply(const TensorView& a, const RightSide& right, const TensorView* c, const TensorView& out) {
  const TensorView& b = right.tensor;
  const Place place = PlaceOf(a, "a");
  CheckPlace(b, "b", place);
  if (c != nullptr) CheckPlace(*c, "c", place);
  CheckPlace(out, "out", place);
  place.is_cuda() ? on_cuda::CheckMatmulTypes(a, b, out) : CheckHostTypes(a, b, out);
  Product product = CheckProduct(a, b, right.is_transposed, out);
  product.b_is_constant = right.is_constant;
  if (c != nullptr) product.c = CheckAddend(*c, out, product.out);
  place.is_cuda() ? on_cuda::Matmul(place, product, a, b, out) : OnHost(product, a, b, out);
}

}  // namespace

void Matmul(TensorView a, TensorView b, int64_t transpose_b, TensorView out) {
  Guarded([&] { Multiply(a, {b, transpose_b != 0, false}, nullptr, out); });
}

void MatmulAdd(TensorView a, TensorView b, int64_t transpose_b, TensorView c, TensorView out) {
  Guarded([&] { Multiply(a, {b, transpose_b != 0, false}, &c, out); });
}

void Linear(TensorView x, TensorView weight, TensorView out) {
  Guarded([&] { Multiply(x, {weight, true, true}, nullptr, out); });
}

void LinearAdd(TensorView x, TensorView weight, TensorView c, TensorView out) {
  Guarded([&] { Multiply(x, {weight, true, true}, &c, out); });
}

tvm::ffi::String SetBlas(tvm::ffi::String path, tvm::ffi::String prefix) {
  return Guarded([&] {
    cpu::SetBlas(path, prefix);
    return tvm::ffi::String(cpu::GetBlas().core);
  });
}

tvm::ffi::String BlasPath() { return tvm::ffi::String(cpu::HasBlas() ? cpu::GetBlas().path : ""); }

}  // namespace tvm_infer::ffi_api
