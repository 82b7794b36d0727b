#include "tvm_infer/cpu/blas.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>

#include "tvm_infer/error.h"

namespace tvm_infer::cpu {
namespace {

std::atomic<const Blas*> g_blas{nullptr};
std::mutex g_set_mutex;

// An environment variable for as long as the library loads, unless the user has set it.
class DefaultEnv {
 public:
  DefaultEnv(const char* name, const char* value) : name_(getenv(name) == nullptr ? name : nullptr) {
    if (name_ != nullptr) setenv(name_, value, 1);
  }
  ~DefaultEnv() {
    if (name_ != nullptr) unsetenv(name_);
  }
  DefaultEnv(const DefaultEnv&) = delete;
  DefaultEnv& operator=(const DefaultEnv&) = delete;

 private:
  const char* name_;
};

template <typename F>
F Symbol(void* handle, const std::string& path, const std::string& name, bool is_required) {
  void* symbol = dlsym(handle, name.c_str());
  if (symbol == nullptr && is_required) {
    TVM_INFER_THROW(ArgumentError) << "argument `path`: " << path << " has no symbol " << name
                                   << ". Pass the prefix of its symbols (\"scipy_\" for scipy-openblas32, \"\" for a plain BLAS)";
  }
  return reinterpret_cast<F>(symbol);
}

}  // namespace

void SetBlas(const std::string& path, const std::string& prefix) {
  std::lock_guard<std::mutex> lock(g_set_mutex);
  void* handle = nullptr;
  {
    // No threads of its own: they would spin against ours.
    DefaultEnv threads("OPENBLAS_NUM_THREADS", "1");
    handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  }
  if (handle == nullptr) {
    TVM_INFER_THROW(ArgumentError) << "argument `path`: the BLAS library " << path << " cannot be opened (" << dlerror()
                                   << "). Install one with: pip install 'tvm_infer[blas]'";
  }
  auto blas = std::make_unique<Blas>();
  blas->sgemm = Symbol<SgemmFn>(handle, path, prefix + "cblas_sgemm", true);
  blas->sgemv = Symbol<SgemvFn>(handle, path, prefix + "cblas_sgemv", true);
  blas->path = path;
  if (auto set_threads = Symbol<void (*)(int)>(handle, path, prefix + "openblas_set_num_threads", false)) set_threads(1);
  if (auto core = Symbol<char* (*)()>(handle, path, prefix + "openblas_get_corename", false)) blas->core = core();
  blas->has_small_kernel = blas->core == "SkylakeX" || blas->core == "Cooperlake" || blas->core == "Sapphirerapids";
  // A library that was set before stays: a matmul on another thread may be inside it.
  g_blas.store(blas.release(), std::memory_order_release);
}

const Blas& GetBlas() {
  const Blas* blas = g_blas.load(std::memory_order_acquire);
  if (blas == nullptr) {
    TVM_INFER_THROW(MissingDependencyError) << "matmul needs a BLAS library and none is set. Install one with "
                                            << "`pip install 'tvm_infer[blas]'` and call tvm_infer.set_blas()";
  }
  return *blas;
}

bool HasBlas() { return g_blas.load(std::memory_order_acquire) != nullptr; }

}  // namespace tvm_infer::cpu
