#include "tvm_infer/cpu/matmul.h"

#include <algorithm>

#include "tvm_infer/cpu/attention.h"
#include "tvm_infer/cpu/blas.h"
#include "tvm_infer/cpu/thread_pool.h"

namespace tvm_infer::cpu {
namespace {

constexpr int kRowMajor = 101, kNoTrans = 111, kTrans = 112;

// Up to here a product reads b about as fast as memory gives it, if b is not packed first (packing writes and reads it once more).
constexpr int64_t kSmallRows = 32;
// Without OpenBLAS's small-matrix kernels, row after row over a block of b that stays in L2 beats packing up to here.
constexpr int64_t kGemvRows = 4;
constexpr int64_t kGemvBlock = 64;       // rows of b: 64 * 576 * 4 B = 147 KB
constexpr int64_t kVector = 16;          // pieces begin at multiples of an AVX-512 register
constexpr int64_t kMaxSmallSlice = 96;   // rows of b a piece: more brings nothing (64 to 192 measure the same)
constexpr int64_t kMinUnitWork = 40000;  // multiply-adds a piece at least (about 2 µs): taking a piece costs 0.1 µs
// Below this much work (about 10 µs) waking a thread costs more than it brings.
constexpr int64_t kSerialWork = 400000;
// OpenBLAS keeps buffers for so many callers at a time; more than that and it ends the process.
constexpr int kMaxCallers = 64;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum class Method { kSgemm, kGemv };

// Pieces of rows_per_unit x cols_per_unit of the output; unit u is piece (u / col_units, u % col_units).
struct Split {
  Method method;
  int64_t rows_per_unit, cols_per_unit;
  int64_t row_units, col_units;
};

Split MakeSplit(const MatmulArgs& x, Method method, int64_t rows, int64_t cols) {
  return Split{method, rows, cols, CeilDiv(x.m, rows), CeilDiv(x.n, cols)};
}

// Few rows: slices of b, small enough for kernels that do not pack.
bool SplitSmall(const MatmulArgs& x, const Blas& blas, Split* split) {
  if (blas.has_small_kernel && x.m <= kSmallRows) {
    const int64_t cols = std::min(kMaxSmallSlice, kSmallMatrixLimit / (x.m * x.k)) / kVector * kVector;
    if (cols >= kVector) {
      const int64_t least = CeilDiv(kMinUnitWork, x.m * x.k * kVector) * kVector;
      *split = MakeSplit(x, Method::kSgemm, x.m, std::min(std::max(cols, least), kSmallMatrixLimit / (x.m * x.k)));
      return true;
    }
  }
  if (!blas.has_small_kernel && x.transpose_b && x.m <= kGemvRows) {
    *split = MakeSplit(x, Method::kGemv, x.m, kGemvBlock);
    return true;
  }
  return false;
}

// Many rows: as many pieces as threads, cut so that the parts of a and b that all pieces pack together are least.
Split SplitLarge(const MatmulArgs& x, int num_threads) {
  Split best = MakeSplit(x, Method::kSgemm, x.m, x.n);
  int64_t least_packed = INT64_MAX;
  for (int row_parts = 1; row_parts <= num_threads; ++row_parts) {
    if (num_threads % row_parts != 0) continue;
    const int64_t rows = CeilDiv(CeilDiv(x.m, row_parts), kVector) * kVector;
    const int64_t cols = CeilDiv(CeilDiv(x.n, num_threads / row_parts), kVector) * kVector;
    const Split split = MakeSplit(x, Method::kSgemm, rows, cols);
    // The slowest piece counts first; then what is packed.
    const int64_t cost = std::min(rows, x.m) * std::min(cols, x.n) / 8 + std::min(rows, x.m) + std::min(cols, x.n);
    if (cost < least_packed) least_packed = cost, best = split;
  }
  return best;
}

// Puts rows x cols of c, or zeros where there is none, into out. Where c is out itself they lie there already.
void Start(const MatmulArgs& x, int64_t row, int64_t col, int64_t rows, int64_t cols) {
  if (x.c == x.out) return;
  for (int64_t i = row; i < row + rows; ++i) {
    float* to = x.out + i * x.ldo + col;
    x.c != nullptr ? std::copy_n(x.c + i * x.ldc + col, cols, to) : std::fill_n(to, cols, 0.0f);
  }
}

struct Job {
  const MatmulArgs* args;
  const Blas* blas;
  Split split;
};

void RunUnit(void* context, int64_t unit, ThreadScratch*) {
  const Job& job = *static_cast<const Job*>(context);
  const MatmulArgs& x = *job.args;
  const int64_t row = unit / job.split.col_units * job.split.rows_per_unit;
  const int64_t col = unit % job.split.col_units * job.split.cols_per_unit;
  const int64_t rows = std::min(job.split.rows_per_unit, x.m - row), cols = std::min(job.split.cols_per_unit, x.n - col);
  const float* a = x.a + row * x.lda;
  const float* b = x.b + (x.transpose_b ? col * x.ldb : col);
  float* out = x.out + row * x.ldo + col;
  const float beta = x.c != nullptr ? 1.0f : 0.0f;
  if (job.split.method == Method::kSgemm) {
    if (x.c != nullptr) Start(x, row, col, rows, cols);
    job.blas->sgemm(kRowMajor, kNoTrans, x.transpose_b ? kTrans : kNoTrans, rows, cols, x.k, 1.0f, a, x.lda, b, x.ldb, beta, out, x.ldo);
    return;
  }
  Start(x, row, col, rows, cols);  // gemv scales y by beta: what it held must not matter, NaN included
  for (int64_t i = 0; i < rows; ++i) {
    job.blas->sgemv(kRowMajor, kNoTrans, cols, x.k, 1.0f, b, x.ldb, a + i * x.lda, 1, beta, out + i * x.ldo, 1);
  }
}

}  // namespace

void Matmul(const MatmulArgs& args, int num_threads) {
  const Blas& blas = GetBlas();
  if (args.m == 0 || args.n == 0) return;
  if (args.k == 0) return Start(args, 0, 0, args.m, args.n);
  if (num_threads <= 0) num_threads = DefaultNumThreads();
  num_threads = std::min(num_threads, kMaxCallers);
  if (args.m * args.n * args.k < kSerialWork) num_threads = 1;
  Job job{&args, &blas, {}};
  if (!SplitSmall(args, blas, &job.split)) job.split = SplitLarge(args, num_threads);
  ThreadPool::Get().Run(num_threads, job.split.row_units * job.split.col_units, RunUnit, &job);
}

}  // namespace tvm_infer::cpu
