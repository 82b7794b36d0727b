#include "tvm_infer/cpu/blas.h"

#include <dlfcn.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>

#include "tvm_infer/embedded.h"
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

// Opens the BLAS that an exported model carries: the loader wants a file, so it gets one that exists in memory alone.
void SetEmbeddedBlas() {
  const EmbeddedBytes& blas = tvm_infer_embedded.blas;
#if defined(__linux__)
  const int file = memfd_create("tvm_infer_blas.so", MFD_CLOEXEC);
  size_t written = 0;
  while (file >= 0 && written < blas.size()) {
    const ssize_t n = write(file, blas.begin + written, blas.size() - written);
    if (n <= 0) break;
    written += static_cast<size_t>(n);
  }
  if (file >= 0 && written == blas.size()) {
    // NOTE: the file stays open for good. The loader takes libraries of one path for the same, and a number that is free again would make
    // a path anew.
    return SetBlas("/proc/self/fd/" + std::to_string(file), tvm_infer_embedded.blas_prefix);
  }
#endif
  TVM_INFER_THROW(MissingDependencyError) << "the BLAS library inside this exported model (" << blas.size()
                                          << " bytes) cannot be unpacked into memory here; name one with tvm_infer_set_blas(path, prefix)";
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
  if (blas == nullptr && tvm_infer_embedded.blas.size() != 0) {
    static std::once_flag once;
    std::call_once(once, SetEmbeddedBlas);
    blas = g_blas.load(std::memory_order_acquire);
  }
  if (blas == nullptr) {
    TVM_INFER_THROW(MissingDependencyError)
        << "matmul needs a BLAS library and none is set. Install one with "
        << "`pip install 'tvm_infer[blas]'` and call tvm_infer.set_blas(); outside Python call an exported "
        << "model's tvm_infer_set_blas(path, prefix), or export it with its BLAS";
  }
  return *blas;
}

bool HasBlas() { return g_blas.load(std::memory_order_acquire) != nullptr || tvm_infer_embedded.blas.size() != 0; }

}  // namespace tvm_infer::cpu
