// The same in page-locked memory, which a device copies to and from by itself.
#pragma once

#include <memory>
#include <vector>

#include "tvm_infer/cuda/pinned_pool.h"
#include "tvm_infer/ffi/common.h"
#include "tvm_infer/ffi/page_store.h"

namespace tvm_infer::ffi_api {

std::unique_ptr<PageStore> NewCudaPageStore(std::shared_ptr<cuda::PinnedPool> pool, int64_t bytes);

// One copy for each run of pages, all layers in it, in the order of the current stream. `store` is of NewCudaPageStore. DeviceError on a
// stream that is being captured: a replay would copy what those pages hold then.
void CudaPagesOut(const PageMemory& memory, const std::vector<int32_t>& pages, PageStore* store, DLDevice device);
void CudaPagesIn(const PageMemory& memory, const std::vector<int32_t>& pages, PageStore* store, DLDevice device);

}  // namespace tvm_infer::ffi_api
