// Tensors as the adapter takes and passes them: checks with typed errors, and views without allocation.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/runtime/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "tvm_infer/mlc/config.h"

namespace tvm_infer::mlc {

using tvm::ffi::TensorView;

// Elements between neighbours along `axis`; dense tensors may come with no strides at all.
int64_t StrideOf(const DLTensor& tensor, int axis);
int64_t ElementBytes(DLDataType dtype);
std::string DimsText(const DLTensor& tensor);

// `tensor` is [rows, heads, head_dim] of the cache's dtype, head_dim and device, head_dim contiguous. Its rows are the step's tokens;
// `may_be_padded`: rows may follow, which nobody reads or writes.
void CheckTokens(const Tensor& tensor, const char* name, const Config& config, int64_t heads, const char* heads_name, int64_t num_tokens,
                 bool may_be_padded);
// [rows, num_qo_heads] of float32 on the cache's device.
void CheckLse(const Tensor& tensor, const char* name, const Config& config, int64_t num_tokens);

// Rows [0, num_rows) and heads [head_begin, head_begin + num_heads) of a tensor [rows, heads, head_dim]; valid while both live.
class TokensView {
 public:
  TokensView(const Tensor& tensor, int64_t num_rows, int64_t head_begin, int64_t num_heads);
  TokensView(const TokensView&) = delete;
  operator TensorView() const { return TensorView(&view_); }  // NOLINT(google-explicit-constructor)

 private:
  int64_t shape_[3], strides_[3];
  DLTensor view_;
};

// int32 values that the host makes and the executor reads: on the cpu the same memory, on a device a copy. Keeps its memory from step to
// step.
class IndexArray {
 public:
  std::vector<int32_t>& host() { return host_; }
  // Copies host() to `device` in the order of its current stream.
  void Publish(DLDevice device);
  // What Publish() made, until host() is changed; OnHost() is the host's side of it.
  TensorView Here() const { return TensorView(&here_); }
  TensorView OnHost() const { return TensorView(&on_host_); }

 private:
  std::vector<int32_t> host_;
  int64_t size_ = 0;
  DLTensor on_host_{}, here_{};
  Tensor device_;
};

}  // namespace tvm_infer::mlc
