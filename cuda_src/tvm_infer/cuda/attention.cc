#include "tvm_infer/cuda/attention.h"

#include <string>

#include "tvm_infer/cuda/kernels.h"
#include "tvm_infer/cuda/tile_table.h"
#include "tvm_infer/error.h"

namespace tvm_infer::cuda {
namespace {

constexpr int kPanelElements = 64;         // 128 bytes: the swizzle's span
constexpr uint32_t kRaggedTileKeys = 128;  // of one copy, attention/config_sm90.cuh

constexpr int32_t kMinBoxTokens = 8;  // smaller pages are gathered by token

// Shapes with a kernel, as rows of one table each; a new one is a new entry.
constexpr int32_t kPageSizes[] = {kRagged, 1, 2, 4, 8, 16, 32, 64};
constexpr int32_t kHeadDims[] = {64, 128};
constexpr DTypeTag kDTypes[] = {DTypeTag::kFloat16, DTypeTag::kBFloat16};
constexpr int kNumPageSizes = sizeof(kPageSizes) / sizeof(kPageSizes[0]);
constexpr int kNumHeadDims = sizeof(kHeadDims) / sizeof(kHeadDims[0]);
constexpr int kNumDTypes = sizeof(kDTypes) / sizeof(kDTypes[0]);

std::string KernelName(DTypeTag dtype, int32_t head_dim, int32_t page_size) {
  return std::string("attention_") + Suffix(dtype) + "_h" + std::to_string(head_dim) +
         (page_size == kRagged ? "_ragged" : "_p" + std::to_string(page_size));
}

// One CachedKernel for each shape; never destroyed.
struct KernelTable {
  CachedKernel* of[kNumDTypes][kNumHeadDims][kNumPageSizes];
  KernelTable() {
    for (int d = 0; d < kNumDTypes; ++d) {
      for (int h = 0; h < kNumHeadDims; ++h) {
        for (int p = 0; p < kNumPageSizes; ++p) of[d][h][p] = new CachedKernel(KernelName(kDTypes[d], kHeadDims[h], kPageSizes[p]));
      }
    }
  }
};

template <typename T, int kCount>
int IndexOf(const T (&values)[kCount], T value) {
  int i = 0;
  while (i < kCount && values[i] != value) ++i;
  return i;
}

CachedKernel& KernelFor(DTypeTag dtype, int32_t head_dim, int32_t page_size) {
  static const KernelTable& table = *new KernelTable;
  CheckKernelShape(dtype, head_dim, "q");
  const int page_index = IndexOf(kPageSizes, page_size);
  if (page_index == kNumPageSizes) {
    TVM_INFER_THROW(ExecutorError) << "argument `k_cache` has page_size " << page_size
                                   << "; the cuda executor has kernels for pages of 1, 2, 4, 8, "
                                   << "16, 32 and 64 tokens. Lay the cache out in such pages, or pass host tensors (the cpu executor takes "
                                      "any page_size)";
  }
  return *table.of[IndexOf(kDTypes, dtype)][IndexOf(kHeadDims, head_dim)][page_index];
}

// K or V for the copy engine.
struct KvView {
  const void* base;
  int64_t stride_page, stride_head, stride_token;  // elements
};

// The stride of an axis of one entry is never used, but the driver holds it to its rules all the same; tensors have anything there.
uint64_t StrideBytes(int64_t stride, uint64_t size, int32_t head_dim) { return 2 * static_cast<uint64_t>(size > 1 ? stride : head_dim); }

TensorMap EncodeKv(const AttentionLaunch& launch, const KvView& view, uint32_t box_panels) {
  const bool ragged = launch.page_size == kRagged;
  const uint64_t panels = static_cast<uint64_t>(launch.head_dim / kPanelElements);
  const uint64_t num_pages = launch.num_pages > 0 ? static_cast<uint64_t>(launch.num_pages) : 1;
  const uint64_t heads = static_cast<uint64_t>(launch.params.expected.num_kv_heads);
  const uint64_t tokens = ragged ? num_pages : static_cast<uint64_t>(launch.page_size);
  const uint64_t pages = ragged ? 1 : num_pages;
  // A pool without pages has no address; no key is read then, but a map must have one.
  const void* base = launch.num_pages > 0 ? view.base : launch.params.q;
  return EncodeTensorMap(launch.dtype == DTypeTag::kBFloat16, base, {kPanelElements, tokens, panels, heads, pages},
                         {StrideBytes(view.stride_token, tokens, launch.head_dim), 2 * kPanelElements,
                          StrideBytes(view.stride_head, heads, launch.head_dim), StrideBytes(view.stride_page, pages, launch.head_dim)},
                         {kPanelElements, ragged ? kRaggedTileKeys : static_cast<uint32_t>(launch.page_size), box_panels, 1, 1});
}

KvTensorMaps EncodeMaps(const AttentionLaunch& launch) {
  const AttentionParams& p = launch.params;
  const KvView k{p.k, p.k_stride_page, p.k_stride_head, p.k_stride_token};
  const KvView v{p.v, p.v_stride_page, p.v_stride_head, p.v_stride_token};
  const auto panels = static_cast<uint32_t>(launch.head_dim / kPanelElements);
  KvTensorMaps maps;
  maps.k_pages = EncodeKv(launch, k, panels);
  maps.v_pages = EncodeKv(launch, v, panels);
  // A page of head_dim 64 is one panel; ragged keys do not use the third map, but the kernel prefetches all of them.
  maps.k_panels = panels == 1 || launch.page_size == kRagged ? maps.k_pages : EncodeKv(launch, k, 1);
  return maps;
}

// Gathers keep a page's and a token's stride in 32 bits of bytes.
void CheckGatherStride(int64_t stride, const char* name, const char* of) {
  constexpr int64_t kMaxBytes = int64_t{1} << 32;
  if (2 * stride < kMaxBytes) return;
  TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` has a stride of " << 2 * stride << " bytes between " << of
                                 << "; with pages of fewer than " << kMinBoxTokens
                                 << " tokens it must be below 4 GiB on CUDA. Make the cache "
                                    "contiguous, or use larger pages";
}

void CheckGather(const AttentionLaunch& launch) {
  const AttentionParams& p = launch.params;
  if (launch.num_pages > 1) {
    CheckGatherStride(p.k_stride_page, "k_cache", "pages");
    CheckGatherStride(p.v_stride_page, "v_cache", "pages");
  }
  if (launch.page_size > 1) {
    CheckGatherStride(p.k_stride_token, "k_cache", "tokens");
    CheckGatherStride(p.v_stride_token, "v_cache", "tokens");
  }
}

}  // namespace

void LaunchAttention(const AttentionLaunch& launch) {
  CachedKernel& cached = KernelFor(launch.dtype, launch.head_dim, launch.page_size);
  const Device& device = GetDevice(launch.device_id);
  const Kernel& kernel = cached.Get(launch.device_id, launch.stream);
  if (launch.params.expected.max_tokens == 0) return;  // no row to write, whatever the plan
  KvTensorMaps maps{};                                 // gathers take no maps
  if (launch.page_size == kRagged || launch.page_size >= kMinBoxTokens) {
    maps = EncodeMaps(launch);
  } else {
    CheckGather(launch);
  }
  AttentionParams params = launch.params;
  void* arguments[] = {&params, &maps};
  LaunchKernel(kernel, device.num_sms * kernel.info.ctas_per_sm, launch.stream, arguments);
}

}  // namespace tvm_infer::cuda
