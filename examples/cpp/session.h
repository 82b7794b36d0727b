// Steps of a model over a cache: new tokens of some sequences in, the most likely next token of some rows out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime.h"
#include "safetensors.h"

namespace example {

// The model's weights in the order of its parameters.
std::vector<Tensor> LoadWeights(const Model& model, const DeviceMemory& memory, const std::string& path) {
  const Safetensors file(path);
  const std::string abi = std::to_string(Field(model.about(), "abi_version").cast<int64_t>());
  if (const std::string written = file.Metadata("tvm_infer.abi_version"); !written.empty() && written != abi) {
    throw std::runtime_error(path + " was written with tvm_infer ABI " + written + ", the model has ABI " + abi);
  }
  std::vector<Tensor> weights;
  for (const Any& item : Field(model.manifest(), "weights").cast<ffi::json::Array>()) {
    const auto about = item.cast<ffi::json::Object>();
    const std::string name = Field(about, "name").cast<String>();
    const Tensor weight = file.Get(name);
    std::vector<int64_t> shape;
    for (const Any& n : Field(about, "shape").cast<ffi::json::Array>()) shape.push_back(n.cast<int64_t>());
    if (!std::equal(shape.begin(), shape.end(), weight.shape().begin(), weight.shape().end())) {
      throw std::runtime_error("weight " + name + " of " + path +
                               " has another shape than the model's: these are weights of another model");
    }
    weights.push_back(memory.Put(weight));
  }
  return weights;
}

// A cache of the model's layers, with pages for that many tokens of every sequence. It rotates queries and keys, caps logits, … where the
// model leaves that to its attention, by numbers and weights that the library knows of. kv_dtype: of its pages, "float8_e4m3fn", say; "":
// what the model was exported with, as are their scales.
Any MakeCache(const Model& model, const std::vector<Tensor>& weights, const std::vector<int64_t>& lengths, int64_t page_size,
              int64_t max_tokens, const std::string& kv_dtype) {
  int64_t num_pages = 0;
  for (int64_t length : lengths) num_pages += (length + page_size - 1) / page_size;
  const int64_t max_batch = static_cast<int64_t>(lengths.size());
  const ffi::Array<Tensor> given(weights.begin(), weights.end());
  return model.Call("model_create_scaled_cache", given, kv_dtype, nullptr, nullptr, page_size, num_pages, max_batch, max_tokens,
                    model.device());
}

// The tokens of one step: those of sequence ids[0], lengths[0] of them, then those of ids[1], … rows: tokens whose successor is asked for.
struct Batch {
  std::vector<int64_t> ids, lengths, tokens, rows;
};

// Runs steps. On a GPU a step of one token each is a single launch: the model's function `decode` was compiled to be captured as a CUDA
// graph, once for each of a few batch sizes (buckets), and a step is padded to the next of them.
class Session {
 public:
  Session(const Model& model, const DeviceMemory& memory, const std::string& weights, const std::vector<int64_t>& lengths,
          int64_t page_size, const std::string& kv_dtype)
      : model_(model), memory_(memory), weights_(LoadWeights(model, memory, weights)) {
    const int64_t max_batch = static_cast<int64_t>(lengths.size());
    cache_ = MakeCache(model, weights_, lengths, page_size, max_tokens(), kv_dtype);
    for (int64_t id = 0; id < max_batch; ++id) model.Call("kv_cache_add", cache_, id);
    if (model.device().device_type == kDLCPU) return;
    const int64_t limit = std::min(Field(model.about(), "decode_rows").cast<int64_t>(), std::min(max_batch, max_tokens()));
    for (const Any& bucket : Field(model.about(), "buckets").cast<ffi::json::Array>()) {
      if (bucket.cast<int64_t>() < limit) buckets_.push_back(bucket.cast<int64_t>());
    }
    buckets_.push_back(limit);
    logits_ = memory.Empty({limit, Vocabulary()}, ffi::StringToDLDataType(Field(model.about(), "logits_dtype").cast<String>()));
    tokens_ = memory.Empty({limit}, kInt64);
  }

  int64_t Vocabulary() const { return Field(model_.about(), "vocab_size").cast<int64_t>(); }
  // Tokens of a step, at most.
  int64_t max_tokens() const { return Field(model_.about(), "max_tokens").cast<int64_t>(); }
  // The sequence has ended: its pages are free for others.
  void Remove(int64_t id) const { model_.Call("kv_cache_remove", cache_, id); }

  // The most likely token after each of the batch's rows.
  std::vector<int64_t> Step(const Batch& batch) {
    const bool is_decode = std::all_of(batch.lengths.begin(), batch.lengths.end(), [](int64_t length) { return length == 1; });
    const bool is_graph = is_decode && !buckets_.empty() && static_cast<int64_t>(batch.ids.size()) <= buckets_.back();
    std::vector<int64_t> tokens = is_graph ? Decode(batch) : Prefill(batch);
    model_.Call("kv_cache_end_forward", cache_);
    return tokens;
  }

 private:
  // `rows` of the step's tensors: as many as tokens, or more, which are padding. Brings tokens, positions and plan to the device.
  void Begin(const Batch& batch, int64_t rows, const Any& logit_rows) const {
    const Shape ids(batch.ids.begin(), batch.ids.end()), lengths(batch.lengths.begin(), batch.lengths.end());
    model_.Call("kv_cache_begin_step", cache_, ids, lengths, /*causal=*/int64_t{1}, rows, HostView(batch.tokens), logit_rows);
  }

  // The model's inputs in the order of its parameters. They lie in the cache.
  std::vector<Any> Inputs(int64_t num_rows, int64_t num_logits, bool has_logit_rows) const {
    const auto given = model_.Call("kv_cache_step_inputs", cache_, num_rows, num_logits).cast<ffi::Array<Tensor>>();
    const std::map<std::string, int> places{{"input_ids", 0}, {"position_ids", 1}, {"logit_indices", 2}};
    std::vector<Any> arguments;
    for (const Any& item : Field(model_.about(), "inputs").cast<ffi::json::Array>()) {
      const auto input = item.cast<ffi::json::Array>();
      const auto place = places.find(input[0].cast<String>());
      if (place == places.end() || input[1].cast<String>() != "int64") {
        throw std::runtime_error("the model has an input " + std::string(input[0].cast<String>()) + " of type " +
                                 std::string(input[1].cast<String>()) + ", which this program cannot feed");
      }
      if (place->second < 2 || has_logit_rows) arguments.push_back(given[place->second]);
    }
    arguments.push_back(cache_);
    arguments.insert(arguments.end(), weights_.begin(), weights_.end());
    return arguments;
  }

  std::vector<int64_t> Prefill(const Batch& batch) const {
    // Operators are compiled for one row at least.
    const std::vector<int64_t> rows = batch.rows.empty() ? std::vector<int64_t>{0} : batch.rows;
    const int64_t num_tokens = static_cast<int64_t>(batch.tokens.size()), num_rows = static_cast<int64_t>(rows.size());
    Begin(batch, num_tokens, HostView(rows));
    const Any result = model_.Run(Field(model_.about(), "function").cast<String>(), Inputs(num_tokens, num_rows, true));
    std::vector<int64_t> tokens;
    if (model_.device().device_type != kDLCPU) {  // (logits, tokens): found on the device
      tokens = memory_.Get<int64_t>(result.cast<ffi::Array<Any>>()[1].cast<Tensor>());
    } else {
      const auto whole = result.as<Tensor>();
      const Tensor logits = whole.has_value() ? *whole : result.cast<ffi::Array<Any>>()[0].cast<Tensor>();
      if (logits.dtype().code != kDLFloat || logits.dtype().bits != 32) throw std::runtime_error("the model's logits are not float32");
      tokens = Largest(memory_.Get<float>(logits));
    }
    tokens.resize(batch.rows.size());
    return tokens;
  }

  // The index of the largest of every Vocabulary() logits.
  std::vector<int64_t> Largest(const std::vector<float>& logits) const {
    std::vector<int64_t> tokens;
    for (auto row = logits.begin(); row != logits.end(); row += Vocabulary()) {
      tokens.push_back(std::max_element(row, row + Vocabulary()) - row);
    }
    return tokens;
  }

  std::vector<int64_t> Decode(const Batch& batch) {
    const int64_t count = static_cast<int64_t>(batch.ids.size());
    const int64_t bucket = *std::lower_bound(buckets_.begin(), buckets_.end(), count);
    Begin(batch, bucket, nullptr);
    const auto known = graphs_.find(bucket);
    const Function launch = known != graphs_.end() ? known->second : graphs_.emplace(bucket, Bind(bucket)).first->second;
    launch();  // captured at the first call
    return memory_.Get<int64_t>(memory_.View(tokens_, {count}));
  }

  Function Bind(int64_t bucket) const {
    std::vector<Any> arguments = Inputs(bucket, 0, false);
    const bool is_rank_3 = Field(model_.about(), "logits_rank").cast<int64_t>() == 3;
    arguments.push_back(memory_.View(logits_, is_rank_3 ? Shape({1, bucket, Vocabulary()}) : Shape({bucket, Vocabulary()})));
    arguments.push_back(memory_.View(tokens_, {1, bucket}));
    const std::string function = Field(model_.about(), "decode_function").cast<String>();
    return model_.Saved(function, "decode_of_" + std::to_string(bucket) + "_rows", arguments);
  }

  const Model& model_;
  const DeviceMemory& memory_;
  std::vector<Tensor> weights_;
  Any cache_;
  // On a GPU.
  std::vector<int64_t> buckets_;  // ascending
  Tensor logits_, tokens_;        // outputs of the largest bucket; smaller ones use the beginning
  std::map<int64_t, Function> graphs_;
};

}  // namespace example
