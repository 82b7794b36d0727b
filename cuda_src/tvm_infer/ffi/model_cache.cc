// Caches of an exported model. What its layers compute is in the manifest (tvm_infer/runtime/library.py writes it, docs/deploy.md has the
// fields): "model" is what the compiler says; "variants" has a row for each entry of the model's "variants", with what is found out when a
// model is exported, so that nothing of an expression has to be understood here.
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/extra/base64.h>
#include <tvm/ffi/function.h>

#include <string>
#include <utility>
#include <vector>

#include "tvm_infer/embedded.h"
#include "tvm_infer/ffi/kv_cache.h"
#include "tvm_infer/ffi/kv_cache_selection.h"
#include "tvm_infer/ffi/kv_dtype.h"
#include "tvm_infer/ffi/model.h"
#include "tvm_infer/ffi/plan.h"

namespace tvm_infer::ffi_api {
namespace {

using tvm::ffi::Any;
using tvm::ffi::Array;
using tvm::ffi::Shape;
using tvm::ffi::String;
using tvm::ffi::Tensor;
using JsonObject = tvm::ffi::Map<Any, Any>;
using JsonArray = Array<Any>;

JsonObject ParseManifest() {
  // By its global name: libtvm_ffi's C++ functions are not of its stable interface.
  return tvm::ffi::Function::GetGlobalRequired("ffi.json.Parse")(ModelManifest()).cast<JsonObject>();
}

template <typename T>
T Field(const JsonObject& object, const char* name) {
  return object.at(String(name)).cast<T>();
}

std::vector<int64_t> Integers(const JsonArray& array) {
  std::vector<int64_t> values;
  for (const Any& value : array) values.push_back(value.cast<int64_t>());
  return values;
}

Shape ToShape(const std::vector<int64_t>& values) { return Shape(values.begin(), values.end()); }

DLDataType ToDType(const JsonObject& entry) { return tvm::ffi::StringToDLDataType(Field<String>(entry, "dtype")); }

// Throws ArgumentError for a device of another kind than the model's.
void CheckModelDevice(const JsonObject& manifest, DLDevice device) {
  const std::string kind = Field<String>(manifest, "device");
  if ((kind == "cuda") == (device.device_type == kDLCUDA)) return;
  TVM_INFER_THROW(ArgumentError) << "argument `device` is " << DeviceString(device) << "; the model was compiled for " << kind
                                 << ": pass such a device, or compile the model for this one";
}

DLDataType KVDTypeOf(const String& name) {
  CheckKVDTypeName(name, "kv_dtype");
  return tvm::ffi::StringToDLDataType(name);
}

// What the manifest says that caches are (tvm_infer/runtime/cache_defaults.py).
class CacheDefaults {
 public:
  explicit CacheDefaults(const JsonObject& manifest) : row_(Field<JsonObject>(manifest, "cache")) {}

  DLDataType kv_dtype() const { return KVDTypeOf(Field<String>(row_, "kv_dtype")); }
  bool shares_prefixes() const { return Field<bool>(row_, "shared_prefix"); }

  // Of tokens or of pages, as it was exported (tvm_infer/runtime/page_budget.py).
  void SetPageBudget(const PagedKVCache& kv) const {
    const Any given = row_.count(String("page_budget")) == 0 ? Any() : row_.at(String("page_budget"));
    if (given == nullptr) return;
    const auto budget = given.cast<JsonObject>();
    const auto value = [&](const char* name) {
      const Any number = budget.at(String(name));
      return number == nullptr ? int64_t{0} : number.cast<int64_t>();
    };
    const int64_t page_size = kv->config().page_size, num_pages = value("num_pages"), num_tokens = value("num_tokens");
    KVCacheSetPageBudget(kv, num_pages > 0 ? num_pages : (num_tokens + page_size - 1) / page_size, value("num_sink_pages"),
                         value("num_recent_pages"), Field<String>(budget, "group_reduce") == "sum", value("max_pages"),
                         ToShape(Integers(Field<JsonArray>(budget, "dense_layers"))));
  }

  // Those given; where they are not, the manifest's, if they are of pages of this type; else 1, which they are.
  void SetScales(const PagedKVCache& kv, const OptionalTensor& k_scales, const OptionalTensor& v_scales) const {
    const std::vector<float> own_k = Scales(kv, "k_scales"), own_v = Scales(kv, "v_scales");
    if (!k_scales.has_value() && !v_scales.has_value() && own_k.empty()) return;
    int64_t shape[] = {kv->config().num_layers, kv->config().num_kv_heads}, strides[] = {shape[1], 1};
    const auto choose = [&](const OptionalTensor& given, const std::vector<float>& own, DLTensor* tensor) {
      *tensor = {const_cast<float*>(own.data()), DLDevice{kDLCPU, 0}, 2, DLDataType{kDLFloat, 32, 1}, shape, strides, 0};
      return given.has_value() ? given.value() : TensorView(tensor);
    };
    const std::vector<float> ones(static_cast<size_t>(shape[0] * shape[1]), 1.f);
    DLTensor k{}, v{};
    kv->SetScales(choose(k_scales, own_k.empty() ? ones : own_k, &k), choose(v_scales, own_v.empty() ? ones : own_v, &v));
  }

 private:
  // [num_layers, num_kv_heads]; empty where the manifest's are of pages of another type, or of one that has none.
  std::vector<float> Scales(const PagedKVCache& kv, const char* name) const {
    std::vector<float> scales;
    const Any rows = row_.at(String(name));
    const DLDataType own = kv_dtype(), type = kv->config().kv_dtype;
    if (rows == nullptr || own.code != type.code || own.bits != type.bits) return scales;
    for (const Any& row : rows.cast<JsonArray>()) {
      for (const Any& scale : row.cast<JsonArray>()) scales.push_back(static_cast<float>(scale.cast<double>()));
    }
    return scales;
  }

  JsonObject row_;
};

// The weights that a program hands over, checked as they are asked for.
class Weights {
 public:
  Weights(const JsonObject& manifest, const Array<Tensor>& tensors, const Place& place)
      : entries_(Field<JsonArray>(manifest, "weights")), tensors_(tensors), place_(place) {
    if (tensors.size() == entries_.size()) return;
    TVM_INFER_THROW(ArgumentError) << "argument `weights` has " << tensors.size() << " tensors; the model has " << entries_.size()
                                   << " weights: pass all, in the order of the manifest";
  }

  Tensor Get(const std::string& name) const {
    for (size_t i = 0; i < entries_.size(); ++i) {
      const auto entry = entries_[i].cast<JsonObject>();
      if (Field<String>(entry, "name") == name) return Checked(tensors_[i], entry, "weights[" + std::to_string(i) + "] (" + name + ")");
    }
    TVM_INFER_THROW(ModelError) << "the attention of the model reads a weight `" << name
                                << "`, which its manifest does not have: the library is damaged, export the model again";
  }

 private:
  Tensor Checked(const Tensor& tensor, const JsonObject& entry, const std::string& what) const {
    const TensorView view(tensor);
    CheckPlace(view, what.c_str(), place_);
    CheckDType(view, what.c_str(), ToDType(entry), "what the model was compiled for");
    const std::vector<int64_t> shape = Integers(Field<JsonArray>(entry, "shape"));
    const std::string expected = "one dimension for each of the weight's " + std::to_string(shape.size());
    CheckRank(view, what.c_str(), static_cast<int>(shape.size()), expected.c_str());
    for (size_t axis = 0; axis < shape.size(); ++axis) CheckDim(view, what.c_str(), static_cast<int>(axis), shape[axis], "the weight's");
    return tensor;
  }

  JsonArray entries_;
  const Array<Tensor>& tensors_;
  Place place_;
};

// What the layers of one variant get.
struct BoundLayers {
  std::vector<int64_t> layers;
  Optional<VariantCall> call;  // none: plain attention in the band
  int64_t causal;
  std::vector<int64_t> band;  // as of kv_cache_set_variant
};

// An array of the model's own, copied to where the cache is. `value`: dtype, shape, data (base64).
Tensor Constant(const PagedKVCache& kv, const JsonObject& value, const std::string& name) {
  const DLDataType dtype = ToDType(value);
  const Shape shape = ToShape(Integers(Field<JsonArray>(value, "shape")));
  const tvm::ffi::Bytes data = tvm::ffi::Base64Decode(Field<String>(value, "data"));
  if (static_cast<int64_t>(data.size()) != shape.Product() * dtype.bits / 8) {
    TVM_INFER_THROW(ModelError) << "the parameter `" << name << "` of an attention variant has " << data.size()
                                << " bytes in the manifest, not those of its shape: the library is damaged, export the model again";
  }
  return kv->Keep(data.data(), shape, dtype, ("a table of attention, `" + name + "`").c_str());
}

int64_t CpuFunctionsOf(const String& digest, const std::vector<int64_t>& layers) {
  const int64_t address = FindStandardVariant(digest);
  if (address == 0) {
    TVM_INFER_THROW(ExecutorError) << "this library has no code of attention variant " << std::string(digest) << ", of layer "
                                   << layers.front() << ", for the instruction set " << cpu::IsaName()
                                   << ": export the model again, or name another one with TVM_INFER_CPU_ISA";
  }
  return address;
}

// `row`: of the library's "variants"; `stored`: the entry of the model's "variants" that it is about.
BoundLayers Bind(const PagedKVCache& kv, const JsonObject& row, const JsonObject& stored, const Weights& weights) {
  BoundLayers bound{Integers(Field<JsonArray>(row, "layers")), {}, Field<int64_t>(row, "causal"), Integers(Field<JsonArray>(row, "band"))};
  const auto digest = Field<String>(row, "digest");
  if (digest.size() == 0) return bound;
  const auto values = Field<JsonObject>(stored, "values");
  Array<Tensor> tables;
  for (const Any& table : Field<JsonArray>(row, "tables")) {
    const std::string name = table.cast<String>();
    const auto value = Field<JsonObject>(values, name.c_str());
    const bool is_weight = value.count(String("weight")) != 0;
    tables.push_back(is_weight ? weights.Get(Field<String>(value, "weight")) : Constant(kv, value, name));
  }
  const std::vector<int64_t> scalars = Integers(Field<JsonArray>(row, "scalars"));
  const bool is_cuda = kv->config().device.device_type == kDLCUDA;
  bound.call = MakeVariantCall(digest, is_cuda ? 0 : CpuFunctionsOf(digest, bound.layers), Array<int64_t>(scalars.begin(), scalars.end()),
                               std::move(tables), Field<int64_t>(row, "takes_shared_keys"));
  return bound;
}

// On the way there are no more bands than at the end: a variant is given to all layers of its band first, those behind it get their own.
void SetAll(const PagedKVCache& kv, const std::vector<BoundLayers>& variants) {
  std::vector<int64_t> all(kv->config().num_layers);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int64_t>(i);
  kv->SetVariant(ToShape(all), {}, -1, MaskBand());
  for (auto own = variants.begin(); own != variants.end(); ++own) {
    std::vector<int64_t> layers;
    for (auto other = own; other != variants.end(); ++other) {
      if (other->band == own->band) layers.insert(layers.end(), other->layers.begin(), other->layers.end());
    }
    kv->SetVariant(ToShape(layers), own->call, own->causal, MakeBand(ToShape(own->band)));
  }
}

// Of values: 0 in the manifest where it is head_dim.
int64_t HeadDimVo(const JsonObject& layer) {
  const int64_t width = layer.count(String("head_dim_vo")) == 0 ? 0 : Field<int64_t>(layer, "head_dim_vo");
  return width == 0 ? Field<int64_t>(layer, "head_dim") : width;
}

std::string WidthsOf(int64_t head_dim, int64_t head_dim_vo) {
  return std::to_string(head_dim) + (head_dim_vo == head_dim ? "" : " (values " + std::to_string(head_dim_vo) + ")");
}

void CheckLayers(const PagedKVCache& kv, const JsonObject& model) {
  const auto layers = Field<JsonArray>(model, "layers");
  const auto layer = layers[0].cast<JsonObject>();
  const KVCacheConfig& have = kv->config();
  const auto heads = Field<int64_t>(layer, "num_qo_heads"), kv_heads = Field<int64_t>(layer, "num_kv_heads");
  const auto head_dim = Field<int64_t>(layer, "head_dim"), head_dim_vo = HeadDimVo(layer);
  if (have.num_layers == static_cast<int64_t>(layers.size()) && have.num_qo_heads == heads && have.num_kv_heads == kv_heads &&
      have.head_dim == head_dim && have.head_dim_vo == head_dim_vo) {
    return;
  }
  TVM_INFER_THROW(ArgumentError) << "argument `kv` has " << have.num_layers << " layers of " << have.num_qo_heads << " / "
                                 << have.num_kv_heads << " heads of " << WidthsOf(have.head_dim, have.head_dim_vo)
                                 << " elements; the model has " << layers.size() << " of " << heads << " / " << kv_heads << " of "
                                 << WidthsOf(head_dim, head_dim_vo) << ": make it with model_create_cache";
}

void SetVariants(const PagedKVCache& kv, const JsonObject& manifest, const Array<Tensor>& weights) {
  const auto model = Field<JsonObject>(manifest, "model");
  const auto rows = Field<JsonArray>(manifest, "variants"), stored = Field<JsonArray>(model, "variants");
  CheckLayers(kv, model);
  const Weights given(manifest, weights, {kv->config().device, "kv"});
  std::vector<BoundLayers> bound;
  for (size_t i = 0; i < rows.size(); ++i) bound.push_back(Bind(kv, rows[i].cast<JsonObject>(), stored[i].cast<JsonObject>(), given));
  SetAll(kv, bound);
}

void SetRope(const PagedKVCache& kv, const JsonObject& rope) {
  std::vector<float> inv_freq;
  for (const Any& frequency : Field<JsonArray>(rope, "inv_freq")) inv_freq.push_back(static_cast<float>(frequency.cast<double>()));
  int64_t shape = static_cast<int64_t>(inv_freq.size()), stride = 1;
  DLTensor tensor{inv_freq.data(), DLDevice{kDLCPU, 0}, 1, DLDataType{kDLFloat, 32, 1}, &shape, &stride, 0};
  KVCacheSetRope(kv, TensorView(&tensor), Field<bool>(rope, "interleaved") ? 1 : 0, Field<double>(rope, "magnitude"));
}

}  // namespace

PagedKVCache ModelCreateCache(Array<Tensor> weights, int64_t page_size, int64_t num_pages, int64_t max_batch, int64_t max_tokens,
                              DLDevice device) {
  return ModelCreateScaledCache(std::move(weights), "", {}, {}, page_size, num_pages, max_batch, max_tokens, device);
}

PagedKVCache ModelCreateScaledCache(Array<Tensor> weights, String kv_dtype, OptionalTensor k_scales, OptionalTensor v_scales,
                                    int64_t page_size, int64_t num_pages, int64_t max_batch, int64_t max_tokens, DLDevice device) {
  return Guarded([&] {
    const JsonObject manifest = ParseManifest();
    CheckModelDevice(manifest, device);
    const auto model = Field<JsonObject>(manifest, "model");
    const auto layers = Field<JsonArray>(model, "layers");
    const auto layer = layers[0].cast<JsonObject>();
    const CacheDefaults defaults(manifest);
    KVCacheConfig config{};
    config.num_layers = static_cast<int64_t>(layers.size());
    config.num_qo_heads = Field<int64_t>(layer, "num_qo_heads");
    config.num_kv_heads = Field<int64_t>(layer, "num_kv_heads");
    config.head_dim = Field<int64_t>(layer, "head_dim");
    config.head_dim_vo = HeadDimVo(layer);
    config.dtype = ToDType(layer);
    config.kv_dtype = kv_dtype.empty() ? defaults.kv_dtype() : KVDTypeOf(kv_dtype);
    config.page_size = page_size;
    config.num_pages = num_pages;
    config.max_batch = max_batch;
    config.max_tokens = max_tokens == 0 ? Field<int64_t>(model, "max_tokens") : max_tokens;
    config.device = device;
    PagedKVCache kv = MakeKVCache(config);
    defaults.SetScales(kv, k_scales, v_scales);
    if (!defaults.shares_prefixes()) kv->SetSharedPrefix(false);
    if (const Any rope = model.at(String("rope")); rope != nullptr) SetRope(kv, rope.cast<JsonObject>());
    SetVariants(kv, manifest, weights);
    defaults.SetPageBudget(kv);
    return kv;
  });
}

void ModelSetVariants(PagedKVCache kv, Array<Tensor> weights) {
  Guarded([&] { SetVariants(kv, ParseManifest(), weights); });
}

void CheckModelIsPlain() {
  if (tvm_infer_embedded.manifest.size() == 0) return;  // tvm_infer's own library
  const JsonObject manifest = ParseManifest();
  if (manifest.count(String("variants")) == 0 || Field<JsonArray>(manifest, "variants").empty()) return;
  TVM_INFER_THROW(ModelError) << "the layers of this model have attention variants (caps, windows, biases, sinks), which a cache of "
                                 "kv_cache_create would not compute: make it with tvm_infer_model_create_cache(weights, …)";
}

}  // namespace tvm_infer::ffi_api
