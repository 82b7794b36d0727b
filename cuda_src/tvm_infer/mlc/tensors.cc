#include "tvm_infer/mlc/tensors.h"

#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <algorithm>
#include <string>

namespace tvm_infer::mlc {
namespace {

constexpr DLDataType kInt32 = {kDLInt, 32, 1};

bool Same(DLDataType a, DLDataType b) { return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes; }
bool Same(DLDevice a, DLDevice b) { return a.device_type == b.device_type && (a.device_id == b.device_id || a.device_type == kDLCPU); }

std::string DTypeText(DLDataType dtype) { return std::string(tvm::ffi::DLDataTypeToString(dtype)); }
std::string DeviceText(DLDevice device) {
  const char* kind = device.device_type == kDLCPU ? "cpu" : device.device_type == kDLCUDA ? "cuda" : "device type ";
  const bool is_known = device.device_type == kDLCPU || device.device_type == kDLCUDA;
  return kind + (is_known ? "" : std::to_string(device.device_type)) + ":" + std::to_string(device.device_id);
}

void CheckPlace(const Tensor& tensor, const char* name, DLDataType dtype, const char* whose, const Config& config) {
  if (!Same(tensor->dtype, dtype)) {
    TVM_FFI_THROW(DTypeError) << "argument `" << name << "` has dtype " << DTypeText(tensor->dtype) << "; it must be " << DTypeText(dtype)
                              << whose;
  }
  if (!Same(tensor->device, config.device)) {
    TVM_FFI_THROW(ArgumentError) << "argument `" << name << "` is on " << DeviceText(tensor->device) << " and the cache on "
                                 << DeviceText(config.device) << "; move it there, or create the cache with an `init` tensor there";
  }
}

void CheckRows(const Tensor& tensor, const char* name, int64_t num_tokens, bool may_be_padded) {
  const int64_t rows = tensor->shape[0];
  if (rows == num_tokens || (may_be_padded && rows > num_tokens)) return;
  TVM_FFI_THROW(PlanMismatchError) << "argument `" << name << "` has shape " << DimsText(*tensor.GetDLTensorPtr())
                                   << " but begin_forward announced " << num_tokens
                                   << " tokens; pass the step's tokens, all of them, in the order of its sequences";
}

}  // namespace

int64_t StrideOf(const DLTensor& tensor, int axis) {
  if (tensor.strides != nullptr) return tensor.strides[axis];
  int64_t stride = 1;
  for (int i = tensor.ndim - 1; i > axis; --i) stride *= tensor.shape[i];
  return stride;
}

int64_t ElementBytes(DLDataType dtype) { return (dtype.bits * dtype.lanes + 7) / 8; }

std::string DimsText(const DLTensor& tensor) {
  std::string text = "[";
  for (int i = 0; i < tensor.ndim; ++i) text += (i == 0 ? "" : ", ") + std::to_string(tensor.shape[i]);
  return text + "]";
}

void CheckTokens(const Tensor& tensor, const char* name, const Config& config, int64_t heads, const char* heads_name, int64_t num_tokens,
                 bool may_be_padded) {
  CheckPlace(tensor, name, config.dtype, ", the cache's", config);
  if (tensor->ndim != 3 || tensor->shape[1] != heads || tensor->shape[2] != config.head_dim) {
    TVM_FFI_THROW(ArgumentError) << "argument `" << name << "` has shape " << DimsText(*tensor.GetDLTensorPtr())
                                 << "; it must be [num_tokens, " << heads << ", " << config.head_dim << "]: " << heads_name
                                 << " and head_dim of the cache";
  }
  if (tensor->shape[0] > 0 && StrideOf(*tensor.GetDLTensorPtr(), 2) != 1) {
    TVM_FFI_THROW(ArgumentError) << "argument `" << name << "` has stride " << StrideOf(*tensor.GetDLTensorPtr(), 2)
                                 << " along head_dim; elements of a head must lie one after another";
  }
  CheckRows(tensor, name, num_tokens, may_be_padded);
}

void CheckLse(const Tensor& tensor, const char* name, const Config& config, int64_t num_tokens) {
  CheckPlace(tensor, name, {kDLFloat, 32, 1}, "", config);
  if (tensor->ndim != 2 || tensor->shape[1] != config.num_qo_heads) {
    TVM_FFI_THROW(ArgumentError) << "argument `" << name << "` has shape " << DimsText(*tensor.GetDLTensorPtr())
                                 << "; it must be [num_tokens, " << config.num_qo_heads << "]: num_qo_heads of the cache";
  }
  CheckRows(tensor, name, num_tokens, false);
}

TokensView::TokensView(const Tensor& tensor, int64_t num_rows, int64_t head_begin, int64_t num_heads)
    : shape_{num_rows, num_heads, tensor->shape[2]},
      strides_{StrideOf(*tensor.GetDLTensorPtr(), 0), StrideOf(*tensor.GetDLTensorPtr(), 1), StrideOf(*tensor.GetDLTensorPtr(), 2)},
      view_(*tensor.GetDLTensorPtr()) {
  view_.shape = shape_;
  view_.strides = strides_;
  view_.byte_offset += head_begin * strides_[1] * ElementBytes(view_.dtype);
}

void IndexArray::Publish(DLDevice device) {
  size_ = static_cast<int64_t>(host_.size());
  on_host_ = DLTensor{};
  on_host_.data = host_.data();
  on_host_.device = {kDLCPU, 0};
  on_host_.ndim = 1;
  on_host_.dtype = kInt32;
  on_host_.shape = &size_;
  here_ = on_host_;
  if (device.device_type == kDLCPU) return;
  if (!device_.defined() || device_->shape[0] < size_) {
    device_ = Tensor::Empty({std::max<int64_t>(2 * size_, 64)}, kInt32, device);
  }
  here_.data = device_->data;
  here_.byte_offset = device_->byte_offset;
  here_.device = device;
  // From pageable memory: the driver has taken the values when this returns.
  if (size_ > 0) Tensor::CopyFromTo(&on_host_, &here_, TVMFFIEnvGetStream(device.device_type, device.device_id));
}

}  // namespace tvm_infer::mlc
