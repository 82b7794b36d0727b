// A libcublasLt.so.13 for tests on machines without a GPU. It multiplies, in float64, what the descriptors say lies in (host) memory, and
// records its calls. FAKE_CUBLAS_OLD: a library that lacks functions.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>

#include "tvm_infer/cuda/cublas_api.h"

using tvm_infer::cuda::LtAlgo;
using tvm_infer::cuda::LtHeuristicResult;

#define FAKE extern "C" __attribute__((visibility("default")))

#if defined(FAKE_CUBLAS_OLD)
FAKE int cublasLtCreate(void**) { return 1; }
#else
namespace {

std::string log_text;                // one line a call
std::map<std::string, int> failure;  // function -> what its next call returns
int num_results = 1;                 // of the next heuristic query
int descriptors = 0;                 // alive

struct Desc {
  int compute_type, scale_type, transpose_a = 0;
};
struct Layout {
  int type;
  uint64_t rows, cols;
  int64_t leading_dim;
};
struct Preference {
  uint64_t workspace = 0;
  uint32_t reduction = 7, alignment[4] = {256, 256, 256, 256};
};

int Called(const char* name, const std::string& text = "") {
  log_text += std::string(name) + (text.empty() ? "" : " ") + text + "\n";
  const auto it = failure.find(name);
  if (it == failure.end()) return 0;
  const int code = it->second;
  failure.erase(it);
  return code;
}

template <typename... T>
std::string Numbers(T... values) {
  std::string text;
  ((text += (text.empty() ? "" : ",") + std::to_string(values)), ...);
  return text;
}

std::string Text(const Layout& l) { return Numbers(l.type, l.rows, l.cols, l.leading_dim); }

float FromHalf(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(float(mantissa), -24)
                                          : std::ldexp(float(mantissa | 1024), exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

double Load(const void* data, int type, int64_t i) {
  if (type == tvm_infer::cuda::kLtFloat32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  if (type == tvm_infer::cuda::kLtFloat16) return FromHalf(bits);
  const uint32_t word = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

void Store(void* data, int type, int64_t i, float value) {
  if (type == tvm_infer::cuda::kLtFloat32) {
    static_cast<float*>(data)[i] = value;
    return;
  }
  uint32_t word;
  std::memcpy(&word, &value, 4);
  uint16_t bits = static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
  if (type == tvm_infer::cuda::kLtFloat16) {  // tests multiply small integers: exact, or the nearest by search
    bits = 0;
    for (uint32_t h = 0; h < 0x7c00; ++h) {
      if (std::fabs(FromHalf(h) - std::fabs(value)) < std::fabs(FromHalf(bits) - std::fabs(value))) bits = h;
    }
    if (value < 0) bits |= 0x8000;
  }
  static_cast<uint16_t*>(data)[i] = bits;
}

}  // namespace

// What tests ask.
FAKE const char* fake_cublas_log() { return log_text.c_str(); }
FAKE void fake_cublas_clear() {
  log_text.clear();
  failure.clear();
  num_results = 1;
}
FAKE void fake_cublas_fail(const char* function, int code) { failure[function] = code; }
FAKE void fake_cublas_results(int count) { num_results = count; }
FAKE int fake_cublas_descriptors() { return descriptors; }

FAKE size_t cublasLtGetVersion() { return 130100; }
FAKE const char* cublasLtGetStatusName(int status) {
  return status == 13 ? "CUBLAS_STATUS_EXECUTION_FAILED" : status == 15 ? "CUBLAS_STATUS_NOT_SUPPORTED" : "CUBLAS_STATUS_FAKE";
}
FAKE int cublasLtCreate(void** handle) { return *handle = &log_text, Called("cublasLtCreate"); }
FAKE int cublasLtMatmulDescCreate(void** desc, int compute_type, int scale_type) {
  return *desc = new Desc{compute_type, scale_type}, ++descriptors, 0;
}
FAKE int cublasLtMatmulDescDestroy(void* desc) { return delete static_cast<Desc*>(desc), --descriptors, 0; }
FAKE int cublasLtMatmulDescSetAttribute(void* desc, int attribute, const void* value, size_t bytes) {
  if (attribute != 3 || bytes != 4) return 7;
  std::memcpy(&static_cast<Desc*>(desc)->transpose_a, value, 4);
  return 0;
}
FAKE int cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t cols, int64_t leading_dim) {
  if (leading_dim < int64_t(rows)) return 7;
  return *layout = new Layout{type, rows, cols, leading_dim}, ++descriptors, 0;
}
FAKE int cublasLtMatrixLayoutDestroy(void* layout) { return delete static_cast<Layout*>(layout), --descriptors, 0; }
FAKE int cublasLtMatmulPreferenceCreate(void** preference) { return *preference = new Preference, ++descriptors, 0; }
FAKE int cublasLtMatmulPreferenceDestroy(void* preference) { return delete static_cast<Preference*>(preference), --descriptors, 0; }
FAKE int cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* value, size_t bytes) {
  auto* p = static_cast<Preference*>(preference);
  if (bytes != (attribute == 1 ? 8 : 4)) return 7;
  void* const to[] = {nullptr,      &p->workspace,    nullptr,          &p->reduction,   nullptr,
                      p->alignment, p->alignment + 1, p->alignment + 2, p->alignment + 3};
  if (attribute < 0 || attribute > 8 || to[attribute] == nullptr) return 7;
  std::memcpy(to[attribute], value, bytes);
  return 0;
}
FAKE int cublasLtMatmulAlgoGetHeuristic(void*, void* desc, void* a, void* b, void* c, void* d, void* preference, int max_results,
                                        LtHeuristicResult* results, int* count) {
  const auto& x = *static_cast<Desc*>(desc);
  const auto& p = *static_cast<Preference*>(preference);
  *count = num_results < max_results ? num_results : max_results;
  for (int i = 0; i < *count; ++i) results[i] = LtHeuristicResult{{{42}}, 1 << 20, 0, 1.0f, {}};
  return Called("cublasLtMatmulAlgoGetHeuristic",
                "compute=" + Numbers(x.compute_type, x.scale_type, x.transpose_a) + " a=" + Text(*static_cast<Layout*>(a)) +
                    " b=" + Text(*static_cast<Layout*>(b)) + " c=" + Text(*static_cast<Layout*>(c)) +
                    " d=" + Text(*static_cast<Layout*>(d)) + " preference=" + Numbers(p.workspace, p.reduction) +
                    " alignment=" + Numbers(p.alignment[0], p.alignment[1], p.alignment[2], p.alignment[3]));
}
FAKE int cublasLtMatmul(void* handle, void* desc, const void* alpha, const void* a, void* a_layout, const void* b, void* b_layout,
                        const void* beta, const void* c, void* c_layout, void* d, void* d_layout, const LtAlgo* algo, void* workspace,
                        size_t workspace_bytes, void* stream) {
  const auto& x = *static_cast<Desc*>(desc);
  const auto &la = *static_cast<Layout*>(a_layout), &lb = *static_cast<Layout*>(b_layout), &ld = *static_cast<Layout*>(d_layout);
  const uint64_t k = x.transpose_a ? la.rows : la.cols, rows = x.transpose_a ? la.cols : la.rows;
  const auto& lc = *static_cast<Layout*>(c_layout);
  const float scale = *static_cast<const float*>(beta);
  if (handle != &log_text || algo->data[0] != 42 || *static_cast<const float*>(alpha) != 1) return 7;
  if (c == d && c_layout != d_layout) return 7;  // in place: one layout
  if (scale != 1 && (scale != 0 || c != d)) return 7;
  if (lc.type != ld.type || lc.rows != ld.rows || lc.cols != ld.cols) return 7;
  if (lb.rows != k || ld.rows != rows || ld.cols != lb.cols || la.type != lb.type) return 7;
  const int status = Called("cublasLtMatmul", "workspace=" + Numbers(reinterpret_cast<uintptr_t>(workspace), workspace_bytes) + " stream=" +
                                                  Numbers(reinterpret_cast<uintptr_t>(stream)) + " beta=" + Numbers(int(scale)));
  if (status != 0) return status;
  for (uint64_t j = 0; j < ld.cols; ++j) {
    for (uint64_t i = 0; i < ld.rows; ++i) {
      double sum = scale == 0 ? 0 : Load(c, lc.type, i + int64_t(j) * lc.leading_dim);
      for (uint64_t p = 0; p < k; ++p) {
        const int64_t at = x.transpose_a ? p + int64_t(i) * la.leading_dim : i + int64_t(p) * la.leading_dim;
        sum += Load(a, la.type, at) * Load(b, lb.type, p + int64_t(j) * lb.leading_dim);
      }
      Store(d, ld.type, i + int64_t(j) * ld.leading_dim, float(sum));
    }
  }
  return 0;
}
#endif
