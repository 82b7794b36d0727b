#include "tvm_infer/cpu/thread_pool.h"

#include <unistd.h>

#include <chrono>
#include <system_error>
#include <utility>

#include "tvm_infer/error.h"

namespace tvm_infer::cpu {
namespace {

// A worker looks for the next job this long before it sleeps: longer than the gap between the attention and the merge of one call,
// shorter than what would take a core away from the matrix products between two layers.
constexpr std::chrono::microseconds kSpin{20};

inline void Pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Joins the threads when the library is unloaded or the process ends, unless this is a forked child, whose threads do not exist.
struct PoolHolder {
  std::atomic<ThreadPool*> pool{nullptr};
  ~PoolHolder() {
    ThreadPool* last = pool.load();
    if (last != nullptr && last->IsOfThisProcess()) delete last;
  }
};

}  // namespace

ThreadPool& ThreadPool::Get() {
  static PoolHolder holder;
  ThreadPool* pool = holder.pool.load(std::memory_order_acquire);
  if (pool != nullptr && pool->IsOfThisProcess()) return *pool;
  // In a forked child the former pool is left as it is: its locks may be held by threads that are gone.
  std::unique_ptr<ThreadPool> fresh(new ThreadPool());
  return holder.pool.compare_exchange_strong(pool, fresh.get()) ? *fresh.release() : *pool;
}

bool ThreadPool::IsOfThisProcess() const { return pid_ == getpid(); }

ThreadPool::ThreadPool() : pid_(getpid()) { scratch_.push_back(std::make_unique<ThreadScratch>()); }

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  job_number_.fetch_add(1);
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::StartWorkers(int count) {
  while (static_cast<int>(workers_.size()) < count) {
    auto scratch = std::make_unique<ThreadScratch>();
    try {
      workers_.emplace_back(&ThreadPool::WorkerLoop, this, scratch.get(), job_number_.load());
    } catch (const std::system_error& e) {
      TVM_INFER_THROW(ExecutorError) << "thread " << workers_.size() + 2 << " of " << count + 1 << " could not be started: " << e.what()
                                     << ". Set TVM_INFER_NUM_THREADS lower.";
    }
    scratch_.push_back(std::move(scratch));
  }
}

void ThreadPool::TakeUnits(ThreadScratch* scratch) {
  for (;;) {
    const int64_t unit = next_unit_.fetch_add(1, std::memory_order_relaxed);
    if (unit >= num_units_) return;
    try {
      task_(context_, unit, scratch);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (error_ == nullptr) error_ = std::current_exception();
    }
  }
}

void ThreadPool::WorkerLoop(ThreadScratch* scratch, uint64_t seen) {
  for (;;) {
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    while (job_number_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < deadline) {
      for (int i = 0; i < 16; ++i) Pause();
    }
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return stop_ || job_number_.load(std::memory_order_relaxed) != seen; });
      if (stop_) return;
      seen = job_number_.load(std::memory_order_relaxed);
      if (open_seats_ == 0) continue;
      --open_seats_;
      ++active_;
    }
    TakeUnits(scratch);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (--active_ == 0) idle_.notify_one();
    }
  }
}

void ThreadPool::Run(int num_threads, int64_t num_units, Task task, void* context) {
  if (num_units <= 0) return;
  std::lock_guard<std::mutex> run_lock(run_mutex_);
  const int helpers = static_cast<int>(num_units < num_threads ? num_units : num_threads) - 1;
  StartWorkers(helpers);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    task_ = task;
    context_ = context;
    num_units_ = num_units;
    next_unit_.store(0, std::memory_order_relaxed);
    error_ = nullptr;
    if (helpers > 0) {
      open_seats_ = helpers;
      job_number_.fetch_add(1, std::memory_order_release);
    }
  }
  for (int i = 0; i < helpers; ++i) wake_.notify_one();
  TakeUnits(scratch_[0].get());
  std::exception_ptr error;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    open_seats_ = 0;  // who is not here by now is not needed
    idle_.wait(lock, [&] { return active_ == 0; });
    error = error_;
    error_ = nullptr;
  }
  if (error != nullptr) std::rethrow_exception(error);
}

}  // namespace tvm_infer::cpu
