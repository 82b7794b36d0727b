#include "tvm_infer/mlc/masks.h"

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <algorithm>

namespace tvm_infer::mlc {
namespace {

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

const VariantCode& Masks::Find(const char* mask, std::optional<VariantCode>* code) const {
  if (!code->has_value()) *code = FindVariant(mask, rope_.turning(), config_);
  return code->value();
}

// A row of `width` bits for each new node: which of the last `width` tokens it sees.
void Masks::SetTreeBits(const std::vector<TokenTree>& trees, const Step& step, int64_t width) {
  int64_t num_bits = 0;
  first_bit_.host().clear();
  for (const int64_t length : step.append_lengths) {
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
    for (int64_t node = tree.size() - step.append_lengths[r]; node < tree.size(); ++node, row += width) {
      for (int64_t column = 0; column < text; ++column) set(column);
      for (int64_t seen = node; seen >= 0; seen = tree.parents[seen]) set(text + seen);
    }
  }
}

// Where each of the last `width` tokens stands, counted from the first of them: nodes at their depth behind the text.
void Masks::SetTreePlaces(const std::vector<TokenTree>& trees, int64_t width) {
  places_.host().clear();
  for (const TokenTree& tree : trees) {
    const int64_t text = width - tree.size();
    for (int64_t column = 0; column < text; ++column) places_.host().push_back(static_cast<int32_t>(column));
    for (const int32_t depth : tree.depths) places_.host().push_back(static_cast<int32_t>(text) + depth);
  }
}

void Masks::SetTrees(const std::vector<TokenTree>& trees, Step* step) {
  const VariantCode& code = Find("token_tree", &tree_code_);
  int64_t width = 0;
  for (const TokenTree& tree : trees) width = std::max(width, tree.size());
  SetTreeBits(trees, *step, width);
  Array<Tensor> tables = {bits_.Publish(config_.device), first_bit_.Publish(config_.device)};
  if (rope_.is_active()) {
    SetTreePlaces(trees, width);
    tables.push_back(places_.Publish(config_.device));
  }
  step->mask = rope_.Call(code, {width}, tables);
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
  const VariantCode& code = Find("kept_keys", &window_code_);
  step->mask = rope_.Call(code, {}, {sink_.Publish(config_.device), first_.Publish(config_.device)});
}

}  // namespace tvm_infer::mlc
