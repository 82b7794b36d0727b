#include "tvm_infer/ffi/page_store_cuda.h"

#include <utility>

#include "tvm_infer/cuda/driver_api.h"
#include "tvm_infer/cuda/memory.h"
#include "tvm_infer/ffi/cuda_scope.h"

namespace tvm_infer::ffi_api {
namespace {

class CudaPageStore final : public PageStore {
 public:
  CudaPageStore(std::shared_ptr<cuda::PinnedPool> pool, int64_t bytes)
      : pool_(std::move(pool)), block_(pool_->Acquire(bytes)), bytes_(bytes) {}
  ~CudaPageStore() override { pool_->Release(std::move(block_)); }
  char* data() override { return static_cast<char*>(block_.data); }
  int64_t bytes() const override { return bytes_; }
  void Wait() override { block_.copied->Wait(); }
  void Record(void* stream) { block_.copied->Record(stream); }

 private:
  std::shared_ptr<cuda::PinnedPool> pool_;
  cuda::PinnedPool::Block block_;
  int64_t bytes_;
};

void Copy(const PageMemory& memory, const std::vector<int32_t>& pages, PageStore* store, DLDevice device, bool is_out) {
  const CudaScope scope(device);
  if (cuda::IsCapturing(scope.stream())) {
    TVM_INFER_THROW(DeviceError)
        << "the contents of a sequence were to be copied between device and host on a stream that is being captured "
           "for a graph: a replay would copy what its pages hold then. Swap, export and import between steps, "
           "outside of the graph";
  }
  auto& target = static_cast<CudaPageStore&>(*store);
  cuda::Memcpy3D copy{};
  copy.width_bytes = static_cast<size_t>(memory.page_bytes);
  copy.depth = static_cast<size_t>(memory.num_layers);
  cuda::Memcpy3D::Side cache, host;
  cache.memory_type = cuda::kMemoryTypeDevice;
  cache.device = reinterpret_cast<cuda::DevicePointer>(memory.data);
  host.memory_type = cuda::kMemoryTypeHost;
  host.host = target.data();
  cache.pitch = host.pitch = copy.width_bytes;
  cache.plane_rows = static_cast<size_t>(memory.num_pages);
  host.plane_rows = pages.size();
  try {
    for (const PageRun& run : RunsOf(pages)) {
      cache.y = static_cast<size_t>(run.first_page);
      host.y = static_cast<size_t>(run.first_entry);
      copy.height = static_cast<size_t>(run.count);
      copy.from = is_out ? cache : host;
      copy.to = is_out ? host : cache;
      cuda::CheckDriver(cuda::Driver().cuMemcpy3DAsync_v2(&copy, scope.stream()), "cuMemcpy3DAsync");
    }
    target.Record(scope.stream());
  } catch (...) {  // no event stands behind the copies that were begun: the memory may be given to others only when they are done
    cuda::Driver().cuStreamSynchronize(scope.stream());
    throw;
  }
}

}  // namespace

std::unique_ptr<PageStore> NewCudaPageStore(std::shared_ptr<cuda::PinnedPool> pool, int64_t bytes) {
  return std::make_unique<CudaPageStore>(std::move(pool), bytes);
}

void CudaPagesOut(const PageMemory& memory, const std::vector<int32_t>& pages, PageStore* store, DLDevice device) {
  Copy(memory, pages, store, device, true);
}

void CudaPagesIn(const PageMemory& memory, const std::vector<int32_t>& pages, PageStore* store, DLDevice device) {
  Copy(memory, pages, store, device, false);
}

}  // namespace tvm_infer::ffi_api
