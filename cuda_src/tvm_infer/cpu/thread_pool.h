// Threads that wait for work between calls. The caller takes part; results never depend on who runs what.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "tvm_infer/cpu/kernels.h"

namespace tvm_infer::cpu {

inline constexpr int kMaxThreads = 1024;

// What a thread keeps between works: allocated once, grown to the largest tile.
struct ThreadScratch {
  Scratch tile;
  std::vector<int32_t> tokens, heads, visible_begin, visible_end;
  std::vector<const void*> inputs;
  std::vector<void*> outputs;
  std::vector<float*> lse_rows;
  std::vector<float> lse_values;
  std::vector<variant::Row> variant_rows;
};

class ThreadPool {
 public:
  // A function of (context, unit, scratch of the thread that runs it).
  using Task = void (*)(void* context, int64_t unit, ThreadScratch* scratch);

  // The pool of this process. After fork() the child gets a new one: threads do not survive a fork.
  static ThreadPool& Get();

  // Runs `task` for units 0 … num_units - 1, each once, on at most `num_threads` threads with the caller among them; returns when all
  // are done. Threads take the next unit from a counter. A thread that is slow to wake up is not waited for. Several callers take
  // turns. The first exception of a task is thrown here, after the rest.
  void Run(int num_threads, int64_t num_units, Task task, void* context);

  bool IsOfThisProcess() const;
  ~ThreadPool();

 private:
  ThreadPool();
  void StartWorkers(int count);
  void WorkerLoop(ThreadScratch* scratch, uint64_t seen);
  void TakeUnits(ThreadScratch* scratch);

  const pid_t pid_;
  std::mutex run_mutex_;  // one job at a time
  std::mutex mutex_;      // guards what follows, up to the workers
  std::condition_variable wake_, idle_;
  int open_seats_ = 0;  // workers that may still join the job
  int active_ = 0;      // workers inside the job
  bool stop_ = false;
  std::atomic<uint64_t> job_number_{0};  // also read without the mutex, by workers that spin
  Task task_ = nullptr;
  void* context_ = nullptr;
  int64_t num_units_ = 0;
  std::atomic<int64_t> next_unit_{0};
  std::exception_ptr error_;
  std::vector<std::thread> workers_;
  std::vector<std::unique_ptr<ThreadScratch>> scratch_;  // 0: the caller's
};

}  // namespace tvm_infer::cpu
