// The choice of instruction set and thread count, once per process.
#if defined(__linux__)
#include <sched.h>
#endif

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "tvm_infer/cpu/attention.h"
#include "tvm_infer/cpu/kernels.h"
#include "tvm_infer/cpu/thread_pool.h"
#include "tvm_infer/embedded.h"
#include "tvm_infer/error.h"

namespace tvm_infer::cpu {
namespace {

// Ascending in speed.
struct Choice {
  const KernelTable* table;
  bool is_available;
};

const KernelTable& Choose() {
  const Choice choices[] = {
      {&PortableKernels(), true},
#if defined(TVM_INFER_CPU_X86)
      {&Avx2Kernels(), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
      {&Avx512Kernels(), __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                             __builtin_cpu_supports("avx512dq")},
#endif
  };
  const char* wanted = std::getenv("TVM_INFER_CPU_ISA");
  const KernelTable* best = nullptr;
  std::string available;
  for (const Choice& choice : choices) {
    if (!choice.is_available) continue;
    best = choice.table;
    available += (available.empty() ? "" : ", ") + std::string(choice.table->name);
    if (wanted != nullptr && std::strcmp(wanted, choice.table->name) == 0) return *choice.table;
  }
  if (wanted != nullptr && *wanted != '\0') {
    TVM_INFER_THROW(ArgumentError) << "TVM_INFER_CPU_ISA is '" << wanted << "', which this machine or build does not have; it has "
                                   << available << ". Set one of those, or unset the variable for the fastest.";
  }
  return *best;
}

int CountThreads() {
  const char* text = std::getenv("TVM_INFER_NUM_THREADS");
  if (text != nullptr && *text != '\0') {
    int count = 0;
    const char* end = text + std::strlen(text);
    const auto [stop, error] = std::from_chars(text, end, count);
    if (error != std::errc() || stop != end || count < 1 || count > kMaxThreads) {
      TVM_INFER_THROW(ArgumentError) << "TVM_INFER_NUM_THREADS is '" << text << "', but must be an integer from 1 to " << kMaxThreads
                                     << ". Unset it to use every processor this process may run on.";
    }
    return count;
  }
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0 && CPU_COUNT(&set) > 0) return CPU_COUNT(&set);
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count == 0 ? 1 : static_cast<int>(count < kMaxThreads ? count : kMaxThreads);
}

}  // namespace

Scratch::~Scratch() { ::operator delete[](data_, std::align_val_t(64)); }

char* Scratch::Reserve(size_t bytes) {
  if (bytes > size_) {
    ::operator delete[](data_, std::align_val_t(64));
    data_ = nullptr;
    size_ = 0;
    data_ = static_cast<char*>(::operator new[](bytes, std::align_val_t(64)));
    size_ = bytes;
  }
  return data_;
}

const KernelTable& ChosenKernels() {
  static const KernelTable& table = Choose();
  return table;
}

const char* IsaName() { return ChosenKernels().name; }

const variant::CpuFunctions* VariantFunctions(const char* digest) {
  const KernelTable& chosen = ChosenKernels();
  const StandardVariants& variants = *chosen.standard_variants;
  const std::string name = std::string("variant_") + digest;
  for (size_t i = 0; i < variants.count; ++i) {
    if (name == variants.entries[i].name) return &variants.entries[i].functions;
  }
  for (size_t i = 0; i < tvm_infer_embedded.num_variants; ++i) {
    const EmbeddedVariant& embedded = tvm_infer_embedded.variants[i];
    if (std::strcmp(embedded.isa, chosen.name) == 0 && std::strcmp(embedded.digest, digest) == 0) return embedded.functions;
  }
  return nullptr;
}

int DefaultNumThreads() {
  static const int count = CountThreads();
  return count;
}

}  // namespace tvm_infer::cpu
