// The part of TVM's runtime that the program uses: tensors on a device, and an exported model as a virtual machine with functions of its
// own.
#pragma once

#include <dlfcn.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace example {

namespace ffi = tvm::ffi;
using ffi::Any;
using ffi::Function;
using ffi::Shape;
using ffi::String;
using ffi::Tensor;

constexpr int64_t kManifestFormat = 2;   // of the JSON that model.so holds (docs/deploy.md)
constexpr int64_t kPooledAllocator = 2;  // AllocatorType of TVM's runtime
constexpr size_t kAlignment = 64;        // bytes: what TVM's kernels assume of a tensor
constexpr DLDevice kHost{kDLCPU, 0};
constexpr DLDataType kInt64{kDLInt, 64, 1};

inline ffi::json::Value Field(const ffi::json::Object& object, const char* name) { return object.at(String(name)); }

// Numbers on the host as a tensor that shares them: good for as long as the vector is.
template <typename T>
inline Tensor HostView(const std::vector<T>& numbers, DLDataType dtype = kInt64) {
  struct Borrowed {
    T* data;
    void AllocData(DLTensor* tensor) { tensor->data = data; }
    void FreeData(DLTensor*) {}
  };
  const int64_t shape[] = {static_cast<int64_t>(numbers.size())};
  return Tensor::FromNDAlloc(Borrowed{const_cast<T*>(numbers.data())}, ffi::ShapeView(shape, 1), dtype, kHost);
}

// Memory of a device, and copies to and from it: functions that TVM's runtime registers under these names.
class DeviceMemory {
 public:
  explicit DeviceMemory(DLDevice device) : device_(device) {}
  Tensor Empty(Shape shape, DLDataType dtype) const { return allocate_(shape, dtype, device_, nullptr).cast<Tensor>(); }
  // The beginning of a tensor's memory in another shape.
  Tensor View(const Tensor& tensor, Shape shape) const { return view_(tensor, shape, tensor.dtype(), int64_t{0}).cast<Tensor>(); }

  // A tensor of the host on the device. On the CPU it is used in place, if kernels may.
  Tensor Put(const Tensor& host) const {
    const bool is_aligned = reinterpret_cast<uintptr_t>(host.data_ptr()) % kAlignment == 0;
    if (device_.device_type == kDLCPU && is_aligned) return host;
    const Tensor copy = Empty(Shape(host.shape().begin(), host.shape().end()), host.dtype());
    copy_(host, copy);
    return copy;
  }
  // Elements of a tensor of the device, T being their type. Waits for the work before it.
  template <typename T>
  std::vector<T> Get(const Tensor& tensor) const {
    std::vector<T> values(tensor.numel());
    to_bytes_(tensor, static_cast<void*>(values.data()), static_cast<int64_t>(values.size() * sizeof(T)));
    return values;
  }

 private:
  DLDevice device_;
  Function allocate_ = Function::GetGlobalRequired("runtime.TVMTensorAllocWithScope");
  Function view_ = Function::GetGlobalRequired("runtime.TVMTensorCreateView");
  Function copy_ = Function::GetGlobalRequired("runtime.TVMTensorCopyFromTo");
  Function to_bytes_ = Function::GetGlobalRequired("runtime.TVMTensorCopyToBytes");
};

// model.so: its manifest, its code in a virtual machine, and tvm_infer's functions of its own.
class Model {
 public:
  // The path is made absolute because the loader looks for a bare name in the system's folders.
  explicit Model(const std::string& path) : module_(Load(std::filesystem::absolute(path).string())) {
    manifest_ = ffi::json::Parse(Call("model_manifest").cast<String>()).cast<ffi::json::Object>();
    if (const auto format = Field(manifest_, "format").cast<int64_t>(); format != kManifestFormat) {
      throw std::runtime_error(path + " has a manifest of format " + std::to_string(format) + "; this program reads " +
                               std::to_string(kManifestFormat));
    }
    about_ = Field(manifest_, "model").cast<ffi::json::Object>();
    UseDevice();
    vm_ = Required(module_, "vm_load_executable")().cast<ffi::Module>();
    Function initialize = Required(vm_, "vm_initialization");
    if (device_.device_type == kDLCPU) {
      initialize(int64_t{kDLCPU}, int64_t{0}, kPooledAllocator);
    } else {  // and the CPU, where shapes are computed
      initialize(int64_t{device_.device_type}, int64_t{device_.device_id}, kPooledAllocator, int64_t{kDLCPU}, int64_t{0}, kPooledAllocator);
    }
  }

  // tvm_infer.<name> of this library, whatever else is loaded.
  template <typename... Args>
  Any Call(const std::string& name, Args&&... args) const {
    return Required(module_, "tvm_infer_" + name)(std::forward<Args>(args)...);
  }
  // A function of the model.
  Any Run(const std::string& function, const std::vector<Any>& arguments) const { return Apply(Required(vm_, function), arguments); }
  // The same with its arguments kept, as a function of none: what a captured graph needs, which replays addresses. It returns nothing.
  Function Saved(const std::string& function, const std::string& saved_name, const std::vector<Any>& arguments) const {
    std::vector<Any> all{String(function), String(saved_name), /*include_return=*/false};
    all.insert(all.end(), arguments.begin(), arguments.end());
    Apply(Required(vm_, "save_function"), all);
    return Required(vm_, saved_name);
  }
  const ffi::json::Object& manifest() const { return manifest_; }
  const ffi::json::Object& about() const { return about_; }
  DLDevice device() const { return device_; }

 private:
  // A library for GPUs holds kernels that only TVM's CUDA runtime can load, which is a library of its own.
  static ffi::Module Load(const std::string& path) {
    try {
      return ffi::Module::LoadFromFile(path);
    } catch (const ffi::Error& error) {
      if (error.message().find("load_from_bytes.cuda") == std::string::npos) throw;
    }
    if (dlopen("libtvm_runtime_cuda.so", RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      throw std::runtime_error(std::string("the model is for CUDA, and TVM's runtime for it cannot be loaded: ") + dlerror());
    }
    return ffi::Module::LoadFromFile(path);
  }
  void UseDevice() {
    if (Field(manifest_, "device").cast<String>() != "cuda") return;
    device_ = {kDLCUDA, 0};
    Call("model_check_cuda", int64_t{device_.device_id});
  }
  static Function Required(const ffi::Module& module, const std::string& name) {
    const auto function = module->GetFunction(name, true);
    if (!function.has_value())
      throw std::runtime_error("the library has no function " + name + "; export it with Executable.export_library");
    return *function;
  }

  static Any Apply(const Function& function, const std::vector<Any>& arguments) {
    const std::vector<ffi::AnyView> views(arguments.begin(), arguments.end());
    Any result;
    function.CallPacked(views.data(), static_cast<int32_t>(views.size()), &result);
    return result;
  }

  ffi::Module module_, vm_{ffi::UnsafeInit{}};
  ffi::json::Object manifest_, about_;
  DLDevice device_ = kHost;
};

}  // namespace example
