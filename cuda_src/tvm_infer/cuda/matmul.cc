#include "tvm_infer/cuda/matmul.h"

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <unordered_map>

#include "tvm_infer/cuda/cublas_api.h"
#include "tvm_infer/cuda/driver.h"
#include "tvm_infer/cuda/gemv.h"
#include "tvm_infer/cuda/matmul_workspace.h"
#include "tvm_infer/error.h"

namespace tvm_infer::cuda {
namespace {

// No kernel asks for more than a 16-byte boundary, the unit of TMA and of vector loads. Telling boundaries above apart would let a buffer's
// place in memory choose the algorithm: a step under a graph could then differ from the same step without.
constexpr uint32_t kMaxAlignment = 16;
// Problems that a device keeps, about 1 KB each: prefills of every length up to 4096 on 4 shapes. Beyond, all are found anew.
constexpr size_t kMaxProblems = 16384;

// Everything that the choice of an algorithm may depend on.
struct Problem {
  std::array<int64_t, 8> words;
  bool operator==(const Problem& other) const { return words == other.words; }
};

struct ProblemHash {
  size_t operator()(const Problem& problem) const {
    uint64_t hash = 0;
    for (const int64_t word : problem.words) {
      hash = (hash ^ static_cast<uint64_t>(word)) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

uint32_t AlignmentOf(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return static_cast<uint32_t>(std::min<uintptr_t>(address & (~address + 1), kMaxAlignment));
}

int64_t ProblemTag(const MatmulArgs& x) {
  int64_t tag = x.transpose_b ? 1 : 0;
  tag = tag * 2 + (x.allow_tf32 ? 1 : 0);
  tag = tag * 4 + static_cast<int64_t>(x.dtype);
  tag = tag * 4 + static_cast<int64_t>(x.out_dtype);
  for (const void* pointer : {x.a, x.b, x.c, static_cast<const void*>(x.out)}) tag = tag * 32 + AlignmentOf(pointer);  // null: 0
  return tag;
}

int TypeOf(DTypeTag dtype) {
  switch (dtype) {
    case DTypeTag::kFloat16:
      return kLtFloat16;
    case DTypeTag::kBFloat16:
      return kLtBFloat16;
    default:
      return kLtFloat32;
  }
}

std::string Describe(const MatmulArgs& x) {
  std::ostringstream os;
  os << "[" << x.m << ", " << x.k << "] (row stride " << x.lda << ") x [" << (x.transpose_b ? x.n : x.k) << ", "
     << (x.transpose_b ? x.k : x.n) << "]" << (x.transpose_b ? "^T" : "") << " (row stride " << x.ldb << ") in " << Suffix(x.dtype)
     << " to " << Suffix(x.out_dtype) << " (row stride " << x.ldo << ")";
  if (x.c != nullptr) os << " plus c (row stride " << x.ldc << ")";
  return os.str();
}

// A descriptor of cuBLASLt, destroyed by the function given.
struct Descriptor {
  void* handle = nullptr;
  int (*destroy)(void*) = nullptr;
  Descriptor() = default;
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (handle != nullptr) destroy(handle);
  }
};

// A problem's descriptors and its algorithm. cuBLASLt's matrices are column-major, so it is given out^T = op(b) a^T: a row-major [m, k]
// with row stride lda is the column-major [k, m] with leading dimension lda, and so for out; b stands first.
struct Prepared {
  Descriptor desc, first, second, result;
  Descriptor addend;  // of c where its row stride is not out's: in place cuBLASLt wants one layout for both
  LtAlgo algo;
  void* addend_layout() const { return addend.handle != nullptr ? addend.handle : result.handle; }
};

void MakeLayout(const CublasLt& cublas, Descriptor* layout, DTypeTag dtype, int64_t row_length, int64_t rows, int64_t stride) {
  layout->destroy = cublas.cublasLtMatrixLayoutDestroy;
  const int status = cublas.cublasLtMatrixLayoutCreate(&layout->handle, TypeOf(dtype), static_cast<uint64_t>(row_length),
                                                       static_cast<uint64_t>(rows), stride);
  CheckCublas(cublas, status, "cublasLtMatrixLayoutCreate");
}

void MakePreference(const CublasLt& cublas, Descriptor* preference, const MatmulArgs& x) {
  preference->destroy = cublas.cublasLtMatmulPreferenceDestroy;
  CheckCublas(cublas, cublas.cublasLtMatmulPreferenceCreate(&preference->handle), "cublasLtMatmulPreferenceCreate");
  const auto set = [&](int attribute, auto value) {
    CheckCublas(cublas, cublas.cublasLtMatmulPreferenceSetAttribute(preference->handle, attribute, &value, sizeof(value)),
                "cublasLtMatmulPreferenceSetAttribute");
  };
  set(kLtPrefMaxWorkspace, uint64_t{kMatmulWorkspaceBytes});
  // Partial sums of a split k stay fp32: the other schemes round them to out's type.
  set(kLtPrefReductionMask, kLtReduceCompute);
  set(kLtPrefAlignmentA, AlignmentOf(x.b));
  set(kLtPrefAlignmentB, AlignmentOf(x.a));
  set(kLtPrefAlignmentC, AlignmentOf(x.c != nullptr ? x.c : x.out));
  set(kLtPrefAlignmentD, AlignmentOf(x.out));
}

std::shared_ptr<const Prepared> Prepare(const CublasLt& cublas, void* handle, const MatmulArgs& x) {
  const auto prepared = std::make_shared<Prepared>();
  prepared->desc.destroy = cublas.cublasLtMatmulDescDestroy;
  const int compute = x.dtype == DTypeTag::kFloat32 && x.allow_tf32 ? kLtCompute32FTf32 : kLtCompute32F;
  CheckCublas(cublas, cublas.cublasLtMatmulDescCreate(&prepared->desc.handle, compute, kLtFloat32), "cublasLtMatmulDescCreate");
  if (x.transpose_b) {
    const int32_t transpose = kLtOpT;
    CheckCublas(cublas, cublas.cublasLtMatmulDescSetAttribute(prepared->desc.handle, kLtDescTransA, &transpose, sizeof(transpose)),
                "cublasLtMatmulDescSetAttribute");
  }
  MakeLayout(cublas, &prepared->first, x.dtype, x.transpose_b ? x.k : x.n, x.transpose_b ? x.n : x.k, x.ldb);
  MakeLayout(cublas, &prepared->second, x.dtype, x.k, x.m, x.lda);
  MakeLayout(cublas, &prepared->result, x.out_dtype, x.n, x.m, x.ldo);
  if (x.c != nullptr && x.ldc != x.ldo) MakeLayout(cublas, &prepared->addend, x.out_dtype, x.n, x.m, x.ldc);
  Descriptor preference;
  MakePreference(cublas, &preference, x);

  LtHeuristicResult best{};
  int count = 0;
  int status =
      cublas.cublasLtMatmulAlgoGetHeuristic(handle, prepared->desc.handle, prepared->first.handle, prepared->second.handle,
                                            prepared->addend_layout(), prepared->result.handle, preference.handle, 1, &best, &count);
  if (status == kLtSuccess) status = count > 0 ? best.status : kLtNotSupported;
  if (status != kLtSuccess) CheckCublas(cublas, status, "cublasLtMatmulAlgoGetHeuristic for " + Describe(x));
  prepared->algo = best.algo;
  return prepared;
}

// A device's handle and problems. Never destroyed: graphs and other static objects may launch until the end.
class LtDevice {
 public:
  struct Found {
    void* handle;
    std::shared_ptr<const Prepared> prepared;
    bool is_new;
  };

  // The stream has its workspace. So where it is captured, another product made the handle before.
  Found Find(const CublasLt& cublas, const MatmulArgs& x) {
    const Problem problem{{x.m, x.n, x.k, x.lda, x.ldb, x.ldo, x.ldc, ProblemTag(x)}};
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const auto found = problems_.find(problem); found != problems_.end()) return {handle_, found->second, false};
    const RelaxedCaptureMode relaxed;
    if (handle_ == nullptr) {
      void* handle = nullptr;
      CheckCublas(cublas, cublas.cublasLtCreate(&handle), "cublasLtCreate (does the driver run this version?)");
      handle_ = handle;
    }
    if (problems_.size() >= kMaxProblems) problems_.clear();  // those under way are held by their callers
    return {handle_, problems_.emplace(problem, Prepare(cublas, handle_, x)).first->second, true};
  }

 private:
  std::mutex mutex_;
  void* handle_ = nullptr;
  std::unordered_map<Problem, std::shared_ptr<const Prepared>, ProblemHash> problems_;
};

LtDevice& LtDeviceOf(int32_t device_id) {
  static auto* const devices = new std::array<LtDevice, kMaxDevices>;
  return (*devices)[device_id];
}

// A product of no summands: c, or zeros.
void SetToAddend(const MatmulArgs& x, void* stream) {
  const size_t bytes = x.out_dtype == DTypeTag::kFloat32 ? 4 : 2;
  const auto out = reinterpret_cast<DevicePointer>(x.out);
  if (x.c == nullptr) {
    CheckDriver(Driver().cuMemsetD2D8Async(out, x.ldo * bytes, 0, x.n * bytes, x.m, stream), "cuMemsetD2D8Async");
  } else if (x.c != x.out) {
    const auto side = [&](DevicePointer data, int64_t stride) {
      return Memcpy2D::Side{.memory_type = kMemoryTypeDevice, .device = data, .pitch = stride * bytes};
    };
    const Memcpy2D copy{side(reinterpret_cast<DevicePointer>(x.c), x.ldc), side(out, x.ldo), x.n * bytes, static_cast<size_t>(x.m)};
    CheckDriver(Driver().cuMemcpy2DAsync_v2(&copy, stream), "cuMemcpy2DAsync");
  }
}

}  // namespace

void LaunchMatmul(int32_t device_id, void* stream, const MatmulArgs& args) {
  if (args.m == 0 || args.n == 0) return;
  if (args.k == 0) return SetToAddend(args, stream);
  if (args.allow_gemv && IsGemv(args) && HasKernels(GetDevice(device_id))) return LaunchGemv(device_id, stream, args);
  const CublasLt& cublas = Cublas();
  void* workspace = MatmulWorkspace(device_id, stream);
  const LtDevice::Found found = LtDeviceOf(device_id).Find(cublas, args);
  const Prepared& prepared = *found.prepared;
  std::optional<RelaxedCaptureMode> relaxed;  // a problem's first launch may load its kernel
  if (found.is_new) relaxed.emplace();
  constexpr float kOne = 1.0f, kZero = 0.0f;  // the scale type is fp32, read from the host during the call
  const bool adds = args.c != nullptr;
  const int status =
      cublas.cublasLtMatmul(found.handle, prepared.desc.handle, &kOne, args.b, prepared.first.handle, args.a, prepared.second.handle,
                            adds ? &kOne : &kZero, adds ? args.c : args.out, prepared.addend_layout(), args.out, prepared.result.handle,
                            &prepared.algo, workspace, kMatmulWorkspaceBytes, stream);
  if (status != kLtSuccess) CheckCublas(cublas, status, "cublasLtMatmul of " + Describe(args));
}

}  // namespace tvm_infer::cuda
