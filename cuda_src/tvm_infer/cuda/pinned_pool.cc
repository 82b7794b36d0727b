#include "tvm_infer/cuda/pinned_pool.h"

#include <algorithm>
#include <utility>

#include "tvm_infer/cuda/driver.h"

namespace tvm_infer::cuda {
namespace {

constexpr int64_t kGranule = int64_t{2} << 20;  // bytes: a huge page; blocks of like sequences get one size

void Free(int32_t device_id, PinnedPool::Block* block) noexcept {
  try {
    const DeviceGuard guard(device_id);
    block->copied->Wait();
  } catch (...) {  // a driver that is shutting down copies no more
  }
  FreePinned(device_id, block->data);
}

}  // namespace

PinnedPool::~PinnedPool() {
  for (Block& block : free_) Free(device_id_, &block);
}

PinnedPool::Block PinnedPool::Acquire(int64_t bytes) {
  const int64_t needed = std::max<int64_t>(1, (bytes + kGranule - 1) / kGranule) * kGranule;
  auto best = free_.end();
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    if (it->bytes >= needed && it->bytes < 2 * needed && (best == free_.end() || it->bytes < best->bytes)) best = it;
  }
  if (best != free_.end()) {
    const DeviceGuard guard(device_id_);
    best->copied->Wait();
    Block block = std::move(*best);
    free_.erase(best);
    return block;
  }
  Block block;
  block.copied = std::make_unique<Event>(device_id_);
  block.data = AllocatePinned(device_id_, needed);
  block.bytes = needed;
  return block;
}

void PinnedPool::Release(Block block) noexcept {
  try {
    free_.push_back(std::move(block));
  } catch (...) {  // no room to remember it, and it was not moved from
    Free(device_id_, &block);
  }
}

}  // namespace tvm_infer::cuda
