#include "tvm_infer/cpu/blas.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>

#include "tvm_infer/error.h"

namespace tvm_infer::cpu {
namespace {

std::atomic<const Blas*> g_blas{nullptr};
std::mutex g_set_mutex;

// An environment variable for as long as the library loads, unless the user has set it.
class DefaultEnv {
 public:
  DefaultEnv(const char* name, const char* value) : name_(getenv(name) == nullptr && value != nullptr ? name : nullptr) {
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

// OpenBLAS (up to 0.3.34) takes an AMD processor newer than it knows for a Haswell. Its AVX-512 kernels are named after SkylakeX;
// measured on a family 26 processor, [256,576] x [576,1536]: 1.1 ms instead of 2.0.
const char* CoreOverride() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd")) {
    return "SkylakeX";
  }
#endif
  return nullptr;
}

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
    DefaultEnv core("OPENBLAS_CORETYPE", CoreOverride());
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

}  // namespace tvm_infer::cpu
