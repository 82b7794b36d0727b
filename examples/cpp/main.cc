// Generates tokens with a model that tvm_infer compiled and exported. No Python, no compiler, no tvm_infer beside model.so: this program
// links TVM's runtime (libtvm_ffi.so, libtvm_runtime.so; on a GPU also libtvm_runtime_cuda.so) and nothing else.
//
//   generate MODEL.so WEIGHTS.safetensors PROMPTS.txt [--max-new-tokens N] [--page-size N] [--stop TOKEN] [--blas PATH [--blas-prefix P]]
//
// A line of PROMPTS.txt is one prompt, as token ids with spaces between; a line of the output is its continuation. All prompts run
// together: every step takes one token of each sequence that decodes, and of the others as much prompt as fits.
#include <dlfcn.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "safetensors.h"

namespace example {

namespace ffi = tvm::ffi;
using ffi::Any;
using ffi::Function;
using ffi::Shape;
using ffi::String;
using ffi::Tensor;

constexpr int64_t kManifestFormat = 1;   // of the JSON that model.so holds (docs/deploy.md)
constexpr int64_t kPooledAllocator = 2;  // AllocatorType of TVM's runtime
constexpr size_t kAlignment = 64;        // bytes: what TVM's kernels assume of a tensor
constexpr DLDevice kHost{kDLCPU, 0};

struct Options {
  std::string model, weights, prompts, blas, blas_prefix;
  int64_t max_new_tokens = 32, page_size = 16, stop = -1;
};

// Memory of a device, and copies to and from it: functions that TVM's runtime registers under these names.
class DeviceMemory {
 public:
  explicit DeviceMemory(DLDevice device) : device_(device) {}
  Tensor Empty(Shape shape, DLDataType dtype) const { return allocate_(shape, dtype, device_, nullptr).cast<Tensor>(); }

  // A tensor of the host on the device. On the CPU it is used in place, if kernels may.
  Tensor Put(const Tensor& host) const {
    const bool is_aligned = reinterpret_cast<uintptr_t>(host.data_ptr()) % kAlignment == 0;
    if (device_.device_type == kDLCPU && is_aligned) return host;
    return Copied(host, Empty(Shape(host.shape().begin(), host.shape().end()), host.dtype()));
  }
  Tensor PutIds(const std::vector<int64_t>& ids, Shape shape, DLDataType dtype) const {
    const std::vector<int32_t> narrow(ids.begin(), ids.end());
    const Tensor tensor = Empty(shape, dtype);
    void* data = const_cast<void*>(dtype.bits == 32 ? static_cast<const void*>(narrow.data()) : ids.data());
    from_bytes_(tensor, data, static_cast<int64_t>(ids.size() * dtype.bits / 8));  // has arrived when it returns
    return tensor;
  }
  // Values of a tensor of the device, as float.
  std::vector<float> Get(const Tensor& tensor) const {
    const DLDataType dtype = tensor.dtype();
    const size_t count = tensor.numel();
    std::vector<float> values(count);
    if (dtype.code == kDLFloat && dtype.bits == 32) {
      to_bytes_(tensor, static_cast<void*>(values.data()), static_cast<int64_t>(count * 4));
    } else if (dtype.code == kDLBfloat) {
      std::vector<uint16_t> halves(count);
      to_bytes_(tensor, static_cast<void*>(halves.data()), static_cast<int64_t>(count * 2));
      for (size_t i = 0; i < count; ++i) {  // the upper half of a float
        const uint32_t bits = uint32_t{halves[i]} << 16;
        std::memcpy(&values[i], &bits, 4);
      }
    } else {
      throw std::runtime_error("the model's logits are neither float32 nor bfloat16");
    }
    return values;
  }

 private:
  Tensor Copied(const Tensor& from, const Tensor& to) const {
    copy_(from, to);
    return to;
  }
  DLDevice device_;
  Function allocate_ = Function::GetGlobalRequired("runtime.TVMTensorAllocWithScope");
  Function copy_ = Function::GetGlobalRequired("runtime.TVMTensorCopyFromTo");
  Function from_bytes_ = Function::GetGlobalRequired("runtime.TVMTensorCopyFromBytes");
  Function to_bytes_ = Function::GetGlobalRequired("runtime.TVMTensorCopyToBytes");
};

ffi::json::Value Field(const ffi::json::Object& object, const char* name) { return object.at(String(name)); }

// model.so: its manifest, its code in a virtual machine, and tvm_infer's functions of its own.
class Model {
 public:
  // The path is made absolute because the loader looks for a bare name in the system's folders.
  explicit Model(const Options& options) : module_(ffi::Module::LoadFromFile(std::filesystem::absolute(options.model).string())) {
    manifest_ = ffi::json::Parse(Call("model_manifest").cast<String>()).cast<ffi::json::Object>();
    if (const auto format = Field(manifest_, "format").cast<int64_t>(); format != kManifestFormat) {
      throw std::runtime_error(options.model + " has a manifest of format " + std::to_string(format) + "; this program reads " +
                               std::to_string(kManifestFormat));
    }
    about_ = Field(manifest_, "model").cast<ffi::json::Object>();
    UseDevice();
    if (!options.blas.empty()) Call("set_blas", options.blas, options.blas_prefix);
    vm_ = Required(module_, "vm_load_executable")().cast<ffi::Module>();
    Function initialize = Required(vm_, "vm_initialization");
    if (device_.device_type == kDLCPU) {
      initialize(int64_t{kDLCPU}, int64_t{0}, kPooledAllocator);
    } else {  // and the CPU, where shapes are computed
      initialize(int64_t{device_.device_type}, int64_t{device_.device_id}, kPooledAllocator, int64_t{kDLCPU}, int64_t{0}, kPooledAllocator);
    }
    main_ = Required(vm_, std::string(Field(about_, "function").cast<String>()));
  }

  // tvm_infer.<name> of this library, whatever else is loaded.
  template <typename... Args>
  Any Call(const std::string& name, Args&&... args) const {
    return Required(module_, "tvm_infer_" + name)(std::forward<Args>(args)...);
  }
  Any Run(const std::vector<Any>& arguments) const {
    std::vector<ffi::AnyView> views(arguments.begin(), arguments.end());
    Any result;
    main_.CallPacked(views.data(), static_cast<int32_t>(views.size()), &result);
    return result;
  }
  const ffi::json::Object& manifest() const { return manifest_; }
  const ffi::json::Object& about() const { return about_; }
  DLDevice device() const { return device_; }

 private:
  void UseDevice() {
    if (Field(manifest_, "device").cast<String>() != "cuda") return;
    device_ = {kDLCUDA, 0};
    // It registers the device and the loader of the model's own kernels.
    if (dlopen("libtvm_runtime_cuda.so", RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      throw std::runtime_error(std::string("the model is for CUDA, and TVM's runtime for it cannot be loaded: ") + dlerror());
    }
    Call("model_check_cuda", int64_t{device_.device_id});
  }
  static Function Required(const ffi::Module& module, const std::string& name) {
    const auto function = module->GetFunction(name, true);
    if (!function.has_value())
      throw std::runtime_error("the library has no function " + name + "; export it with Executable.export_library");
    return *function;
  }

  ffi::Module module_, vm_{ffi::UnsafeInit{}};
  ffi::json::Object manifest_, about_;
  DLDevice device_ = kHost;
  Function main_;
};

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

// A cache of the model's layers, with pages for that many tokens of every sequence.
Any MakeCache(const Model& model, const std::vector<int64_t>& lengths, int64_t page_size, int64_t max_tokens) {
  const auto layers = Field(model.about(), "layers").cast<ffi::json::Array>();
  const auto layer = layers[0].cast<ffi::json::Object>();
  int64_t num_pages = 0;
  for (int64_t length : lengths) num_pages += (length + page_size - 1) / page_size;
  const int64_t max_batch = static_cast<int64_t>(lengths.size());
  const DLDataType dtype = ffi::StringToDLDataType(Field(layer, "dtype").cast<String>());
  return model.Call("kv_cache_create", static_cast<int64_t>(layers.size()), Field(layer, "num_qo_heads").cast<int64_t>(),
                    Field(layer, "num_kv_heads").cast<int64_t>(), Field(layer, "head_dim").cast<int64_t>(), dtype, page_size, num_pages,
                    max_batch, max_tokens, /*num_ctas=*/int64_t{0}, /*num_threads=*/int64_t{0}, model.device());
}

struct Sequence {
  std::vector<int64_t> pending;  // tokens that the model has not seen: the rest of the prompt, or the last one generated
  std::vector<int64_t> generated;
  bool is_done = false;
};

// The tokens of one step.
struct Batch {
  std::vector<int64_t> ids, lengths, tokens, rows;
  std::vector<size_t> sampling;  // sequences whose last token is in this step, one of `rows` each
};

Batch NextBatch(std::vector<Sequence>& sequences, int64_t max_tokens) {
  Batch batch;
  for (size_t i = 0; i < sequences.size(); ++i) {
    std::vector<int64_t>& pending = sequences[i].pending;
    const int64_t room = max_tokens - static_cast<int64_t>(batch.tokens.size());
    const int64_t take = std::min<int64_t>(static_cast<int64_t>(pending.size()), room);
    if (sequences[i].is_done || take == 0) continue;
    batch.ids.push_back(static_cast<int64_t>(i));
    batch.lengths.push_back(take);
    batch.tokens.insert(batch.tokens.end(), pending.begin(), pending.begin() + take);
    pending.erase(pending.begin(), pending.begin() + take);
    if (!pending.empty()) continue;
    batch.rows.push_back(static_cast<int64_t>(batch.tokens.size()) - 1);
    batch.sampling.push_back(i);
  }
  return batch;
}

// One step of the model: logits [rows, vocab_size] of the batch's rows.
std::vector<float> Step(const Model& model, const DeviceMemory& memory, const Any& cache, const std::vector<Tensor>& weights,
                        const Batch& batch) {
  model.Call("kv_cache_begin_forward", cache, Shape(batch.ids.begin(), batch.ids.end()), Shape(batch.lengths.begin(), batch.lengths.end()),
             /*causal=*/int64_t{1});
  const int64_t num_tokens = static_cast<int64_t>(batch.tokens.size());
  // Operators are compiled for one row at least.
  const std::vector<int64_t> rows = batch.rows.empty() ? std::vector<int64_t>{0} : batch.rows;
  std::vector<Any> arguments;
  for (const Any& item : Field(model.about(), "inputs").cast<ffi::json::Array>()) {
    const auto input = item.cast<ffi::json::Array>();
    const std::string name = input[0].cast<String>();
    const DLDataType dtype = ffi::StringToDLDataType(input[1].cast<String>());
    if (name == "input_ids") {
      arguments.push_back(memory.PutIds(batch.tokens, {1, num_tokens}, dtype));
    } else if (name == "position_ids") {
      arguments.push_back(model.Call("kv_cache_position_ids", cache));
    } else if (name == "logit_indices") {
      arguments.push_back(memory.PutIds(rows, {static_cast<int64_t>(rows.size())}, dtype));
    } else {
      throw std::runtime_error("the model has an input " + name + ", which this program cannot feed");
    }
  }
  arguments.push_back(cache);
  arguments.insert(arguments.end(), weights.begin(), weights.end());
  const Any result = model.Run(arguments);
  const auto logits = result.as<Tensor>();
  std::vector<float> values = memory.Get(logits.has_value() ? *logits : result.cast<ffi::Array<Any>>()[0].cast<Tensor>());
  model.Call("kv_cache_end_forward", cache);
  return values;
}

void Generate(const Options& options, std::vector<Sequence> sequences) {
  const Model model(options);
  const DeviceMemory memory(model.device());
  const std::vector<Tensor> weights = LoadWeights(model, memory, options.weights);
  const int64_t max_tokens = Field(model.about(), "max_tokens").cast<int64_t>();
  const int64_t vocab_size = Field(model.about(), "vocab_size").cast<int64_t>();
  std::vector<int64_t> lengths;
  for (const Sequence& sequence : sequences) {
    for (int64_t token : sequence.pending) {
      if (token < 0 || token >= vocab_size) {
        throw std::runtime_error(options.prompts + " has the token " + std::to_string(token) + "; the vocabulary is 0 to " +
                                 std::to_string(vocab_size - 1));
      }
    }
    lengths.push_back(static_cast<int64_t>(sequence.pending.size()) + options.max_new_tokens);
  }
  const Any cache = MakeCache(model, lengths, options.page_size, max_tokens);
  for (size_t i = 0; i < sequences.size(); ++i) model.Call("kv_cache_add", cache, static_cast<int64_t>(i));

  for (Batch batch = NextBatch(sequences, max_tokens); !batch.ids.empty(); batch = NextBatch(sequences, max_tokens)) {
    const std::vector<float> logits = Step(model, memory, cache, weights, batch);
    for (size_t row = 0; row < batch.sampling.size(); ++row) {
      Sequence& sequence = sequences[batch.sampling[row]];
      const float* scores = logits.data() + row * vocab_size;
      const int64_t token = std::max_element(scores, scores + vocab_size) - scores;
      sequence.generated.push_back(token);
      sequence.is_done = token == options.stop || static_cast<int64_t>(sequence.generated.size()) >= options.max_new_tokens;
      if (sequence.is_done) {
        model.Call("kv_cache_remove", cache, static_cast<int64_t>(batch.sampling[row]));  // its pages are free for others
      } else {
        sequence.pending.push_back(token);
      }
    }
  }
  for (const Sequence& sequence : sequences) {
    for (size_t i = 0; i < sequence.generated.size(); ++i)
      std::printf("%s%ld", i == 0 ? "" : " ", static_cast<long>(sequence.generated[i]));
    std::printf("\n");
  }
}

std::vector<Sequence> ReadPrompts(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot open " + path);
  std::vector<Sequence> sequences;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    Sequence sequence;
    for (int64_t token; words >> token;) sequence.pending.push_back(token);
    if (!words.eof()) throw std::runtime_error(path + ", line " + std::to_string(sequences.size() + 1) + ", is no list of token ids");
    if (sequence.pending.empty()) throw std::runtime_error(path + ", line " + std::to_string(sequences.size() + 1) + ", is empty");
    sequences.push_back(sequence);
  }
  if (sequences.empty()) throw std::runtime_error(path + " has no prompts");
  return sequences;
}

Options ParseOptions(int argc, char** argv) {
  const char* usage =
      "usage: generate MODEL.so WEIGHTS.safetensors PROMPTS.txt [--max-new-tokens N] [--page-size N] [--stop TOKEN] [--blas PATH "
      "[--blas-prefix P]]";
  Options options;
  std::vector<std::string> files;
  const std::map<std::string, int64_t*> numbers{
      {"--max-new-tokens", &options.max_new_tokens}, {"--page-size", &options.page_size}, {"--stop", &options.stop}};
  const std::map<std::string, std::string*> texts{{"--blas", &options.blas}, {"--blas-prefix", &options.blas_prefix}};
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const bool has_value = i + 1 < argc;
    if (numbers.count(word) != 0 && has_value) {
      *numbers.at(word) = std::stoll(argv[++i]);
    } else if (texts.count(word) != 0 && has_value) {
      *texts.at(word) = argv[++i];
    } else if (word.rfind("--", 0) == 0) {
      throw std::runtime_error("unknown option, or no value for it: " + word + "\n" + usage);
    } else {
      files.push_back(word);
    }
  }
  if (files.size() != 3) throw std::runtime_error(usage);
  if (options.max_new_tokens < 1 || options.page_size < 1) throw std::runtime_error("--max-new-tokens and --page-size must be at least 1");
  options.model = files[0], options.weights = files[1], options.prompts = files[2];
  return options;
}

}  // namespace example

int main(int argc, char** argv) {
  try {
    const example::Options options = example::ParseOptions(argc, argv);
    example::Generate(options, example::ReadPrompts(options.prompts));
    return 0;
  } catch (const tvm::ffi::Error& error) {
    std::cerr << "generate: " << error.kind() << ": " << error.message() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "generate: " << error.what() << "\n";
  }
  return 1;
}
