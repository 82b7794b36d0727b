#include "tvm_infer/mlc/masks.h"

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include <algorithm>

#include "tvm_infer/mlc/registry.h"

namespace tvm_infer::mlc {
namespace {

using tvm::ffi::Any;
using tvm::ffi::Array;

constexpr int64_t kMaxBits = int64_t{1} << 31;

}  // namespace

const Tensor& TableArray::Publish(DLDevice device) {
  constexpr DLDataType kInt32 = {kDLInt, 32, 1};
  int64_t size = static_cast<int64_t>(host_.size());
  if (!tensor_.defined() || tensor_->shape[0] < size) tensor_ = Tensor::Empty({std::max<int64_t>(2 * size, 64)}, kInt32, device);
  if (size == 0) return tensor_;
  DLTensor from{host_.data(), {kDLCPU, 0}, 1, kInt32, &size, nullptr, 0}, to = *tensor_.GetDLTensorPtr();
  to.shape = &size;
  // From pageable memory: the driver has taken the values when this returns.
  Tensor::CopyFromTo(&from, &to, TVMFFIEnvGetStream(device.device_type, device.device_id));
  return tensor_;
}

// Compiled at the first use, or found in the library: which is Python's to know (tvm_infer/runtime/mlc_masks.py).
void Masks::Find(const char* name, Code* code) const {
  if (code->is_there) return;
  const auto find = tvm::ffi::Function::GetGlobal("tvm_infer.mlc_mask");
  if (!find.has_value()) {
    TVM_FFI_THROW(CacheStateError) << "the mask " << name << " of this step is found by Python, which has not loaded the adapter: call "
                                   << "tvm_infer.runtime.mlc_library.load()";
  }
  const auto found = (*find)(tvm::ffi::String(name), config_.is_cuda()).cast<Array<Any>>();
  code->digest = found[0].cast<tvm::ffi::String>();
  code->cpu_functions = found[1].cast<int64_t>();
  code->is_there = true;
}

void Masks::SetTrees(const std::vector<TokenTree>& trees, Step* step) {
  Find("token_tree", &tree_code_);
  int64_t width = 0, num_bits = 0;
  for (const TokenTree& tree : trees) width = std::max(width, tree.size());
  first_bit_.host().clear();
  for (const int64_t length : step->append_lengths) {
    first_bit_.host().push_back(static_cast<int32_t>(num_bits));
    num_bits += length * width;
    if (num_bits >= kMaxBits) {
      TVM_FFI_THROW(ArgumentError) << "argument `token_tree_parent_ptr` makes trees of up to " << width << " nodes, whose masks have "
                                   << num_bits << " bits, as many for each new token; they must be fewer than 2^31: take smaller trees";
    }
  }
  bits_.host().assign((num_bits + 31) / 32, 0);
  int64_t row = 0;
  const auto set = [&](int64_t column) {  // bytes, lowest bit first, all the same
    bits_.host()[(row + column) / 32] |= static_cast<int32_t>(uint32_t{1} << ((row + column) % 32));
  };
  for (size_t r = 0; r < trees.size(); ++r) {
    const TokenTree& tree = trees[r];
    const int64_t text = width - tree.size();  // of the last `width` tokens
    for (int64_t node = tree.size() - step->append_lengths[r]; node < tree.size(); ++node, row += width) {
      for (int64_t column = 0; column < text; ++column) set(column);
      for (int64_t seen = node; seen >= 0; seen = tree.parents[seen]) set(text + seen);
    }
  }
  const Array<Tensor> tables = {bits_.Publish(config_.device), first_bit_.Publish(config_.device)};
  step->mask = Library().variant_call(tree_code_.digest, tree_code_.cpu_functions, Array<int64_t>({width}), tables);
  step->has_tree = true;
}

void Masks::SetWindows(const SequenceWindows& windows, Step* step) {
  bool hides = false;
  sink_.host().clear();
  first_.host().clear();
  for (int64_t id : step->ids) {
    const SequenceWindow* window = windows.Find(id);
    sink_.host().push_back(window == nullptr ? 0 : static_cast<int32_t>(window->sink));
    first_.host().push_back(window == nullptr ? 0 : static_cast<int32_t>(window->first));
    hides = hides || (window != nullptr && window->num_hidden() > 0);
  }
  if (!hides) return;
  Find("kept_keys", &window_code_);
  const Array<Tensor> tables = {sink_.Publish(config_.device), first_.Publish(config_.device)};
  step->mask = Library().variant_call(window_code_.digest, window_code_.cpu_functions, Array<int64_t>(), tables);
}

}  // namespace tvm_infer::mlc
