// Page-locked blocks that are used again: to lock memory takes the system longer than to copy it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "tvm_infer/cuda/memory.h"

namespace tvm_infer::cuda {

class PinnedPool {
 public:
  explicit PinnedPool(int32_t device_id) : device_id_(device_id) {}
  ~PinnedPool();  // waits for the copies of its blocks, which have all come back
  PinnedPool(const PinnedPool&) = delete;
  PinnedPool& operator=(const PinnedPool&) = delete;

  struct Block {
    void* data = nullptr;
    int64_t bytes = 0;
    std::unique_ptr<Event> copied;  // recorded behind the last copy to or from it
  };
  // At least `bytes`, and less than twice as many where it is an old one; nothing copies to or from it any more.
  Block Acquire(int64_t bytes);
  void Release(Block block) noexcept;

 private:
  int32_t device_id_;
  std::vector<Block> free_;
};

}  // namespace tvm_infer::cuda
