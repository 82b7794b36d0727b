#include "tvm_infer/cuda/cublas_api.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "tvm_infer/cuda/driver_api.h"
#include "tvm_infer/error.h"

namespace tvm_infer::cuda {
namespace {

constexpr int kCuda13Driver = 13000;  // the first driver (580) that runs a cuBLAS of CUDA 13

std::mutex g_mutex;
std::atomic<const CublasLt*> g_cublas{nullptr};

// All functions of an open library; throws ArgumentError for one that is no cuBLASLt. named_by: what led to it, for messages.
std::unique_ptr<CublasLt> Table(void* library, const std::string& path, const char* named_by) {
  const auto find = [&](const char* name) {
    void* symbol = dlsym(library, name);
    if (symbol == nullptr) {
      TVM_INFER_THROW(ArgumentError) << named_by << " is " << path << ", which has no function " << name
                                     << "; it must be a libcublasLt.so of CUDA 12 or 13. Install one with `pip install nvidia-cublas`";
    }
    return symbol;
  };
  auto table = std::make_unique<CublasLt>();
#define TVM_INFER_CUBLASLT_FIND(name, parameters) table->name = reinterpret_cast<decltype(table->name)>(find(#name));
  TVM_INFER_CUBLASLT_FUNCTIONS(TVM_INFER_CUBLASLT_FIND)
#undef TVM_INFER_CUBLASLT_FIND
  table->cublasLtGetVersion = reinterpret_cast<decltype(table->cublasLtGetVersion)>(find("cublasLtGetVersion"));
  table->cublasLtGetStatusName = reinterpret_cast<decltype(table->cublasLtGetStatusName)>(find("cublasLtGetStatusName"));
  Dl_info info;
  const bool has_file = dladdr(reinterpret_cast<void*>(table->cublasLtMatmul), &info) != 0 && info.dli_fname != nullptr;
  table->path = has_file ? info.dli_fname : path;
  return table;
}

const CublasLt& Keep(std::unique_ptr<CublasLt> table) {
  const CublasLt* kept = table.release();  // never destroyed: graphs and other static objects may run until the end
  g_cublas.store(kept, std::memory_order_release);
  return *kept;
}

std::unique_ptr<CublasLt> OpenFile(const std::string& path, const char* named_by) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    TVM_INFER_THROW(ArgumentError) << named_by << " is " << path << ", which cannot be opened (" << (reason ? reason : "no reason given")
                                   << "). Name a libcublasLt.so, or install one with `pip install nvidia-cublas`";
  }
  return Table(library, path, named_by);
}

// Names that the dynamic loader is asked for, best first.
std::vector<const char*> SoNames() {
  int version = 0;
  CheckDriver(Driver().cuDriverGetVersion(&version), "cuDriverGetVersion");
  return version >= kCuda13Driver ? std::vector<const char*>{"libcublasLt.so.13", "libcublasLt.so.12"}
                                  : std::vector<const char*>{"libcublasLt.so.12"};
}

const CublasLt& OpenDefault() {
  if (const char* path = std::getenv("TVM_INFER_CUBLASLT"); path != nullptr && *path != '\0')
    return Keep(OpenFile(path, "setting TVM_INFER_CUBLASLT"));
  const std::vector<const char*> names = SoNames();
  // A second copy beside torch's would cost its memory again, on the host and on the device.
  for (const int mode : {RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD, RTLD_NOW | RTLD_LOCAL}) {
    for (const char* name : names) {
      if (void* library = dlopen(name, mode)) return Keep(Table(library, name, "what the dynamic loader found"));
    }
  }
  TVM_INFER_THROW(MissingDependencyError) << "matmul on a CUDA device needs cuBLASLt, and the dynamic loader finds no " << names.front()
                                          << ". Install it with `pip install 'tvm_infer[cuda]'` or `pip install nvidia-cublas` (for "
                                             "drivers before 580: nvidia-cublas-cu12), or with a CUDA toolkit, and set TVM_INFER_CUBLASLT "
                                             "to the path of libcublasLt.so where it is not found by itself";
}

}  // namespace

int64_t SetCublas(const std::string& path) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  std::unique_ptr<CublasLt> table = OpenFile(path, "argument `path`");
  if (const CublasLt* former = g_cublas.load(std::memory_order_acquire)) {
    if (former->cublasLtMatmul != table->cublasLtMatmul) {
      TVM_INFER_THROW(ArgumentError) << "argument `path`: this process runs its products on " << former->path << " already, so "
                                     << table->path << " cannot take its place. Set the library before the first product";
    }
    return static_cast<int64_t>(former->cublasLtGetVersion());
  }
  return static_cast<int64_t>(Keep(std::move(table)).cublasLtGetVersion());
}

const CublasLt* FindCublas() { return g_cublas.load(std::memory_order_acquire); }

const CublasLt& Cublas() {
  if (const CublasLt* cublas = FindCublas()) return *cublas;
  const std::lock_guard<std::mutex> lock(g_mutex);
  if (const CublasLt* cublas = FindCublas()) return *cublas;
  return OpenDefault();
}

void CheckCublas(const CublasLt& cublas, int status, const std::string& what) {
  if (status == kLtSuccess) return;
  TVM_INFER_THROW(DeviceError) << what << " failed: " << cublas.cublasLtGetStatusName(status) << " (" << status << "), cuBLASLt "
                               << cublas.cublasLtGetVersion() << " of " << cublas.path;
}

}  // namespace tvm_infer::cuda
