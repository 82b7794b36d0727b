#include "tvm_infer/cuda/attention.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "tvm_infer/cuda/kernels.h"
#include "tvm_infer/cuda/tile_table.h"
#include "tvm_infer/error.h"

namespace tvm_infer::cuda {
namespace {

constexpr int kPanelElements = 64;  // 128 bytes: the swizzle's span

constexpr int32_t kMinBoxTokens = 8;  // smaller pages are gathered by token

// Shapes with a kernel, as rows of one table each; a new one is a new entry.
constexpr int32_t kPageSizes[] = {kRagged, 1, 2, 4, 8, 16, 32, 64};
constexpr int32_t kHeadDims[] = {64, 80, 96, 128, 192, 256};
constexpr DTypeTag kDTypes[] = {DTypeTag::kFloat16, DTypeTag::kBFloat16};
constexpr int kNumPageSizes = sizeof(kPageSizes) / sizeof(kPageSizes[0]);
constexpr int kNumHeadDims = sizeof(kHeadDims) / sizeof(kHeadDims[0]);
constexpr int kNumDTypes = sizeof(kDTypes) / sizeof(kDTypes[0]);

std::string KernelName(DTypeTag dtype, int32_t head_dim, int32_t page_size) {
  return std::string("attention_") + Suffix(dtype) + "_h" + std::to_string(head_dim) +
         (page_size == kRagged ? "_ragged" : "_p" + std::to_string(page_size));
}

// Kernels of variants, by name; never destroyed.
CachedKernel& VariantKernelFor(const std::string& name) {
  static std::mutex& mutex = *new std::mutex;
  static auto& kernels = *new std::unordered_map<std::string, std::unique_ptr<CachedKernel>>;
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<CachedKernel>& kernel = kernels[name];
  if (kernel == nullptr) kernel = std::make_unique<CachedKernel>(name);
  return *kernel;
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

CachedKernel& KernelFor(DTypeTag dtype, int32_t head_dim, int32_t page_size, const variant::Call* variant) {
  static const KernelTable& table = *new KernelTable;
  CheckKernelShape(dtype, head_dim, "q");
  const int page_index = IndexOf(kPageSizes, page_size);
  if (page_index == kNumPageSizes) {
    TVM_INFER_THROW(ExecutorError) << "argument `k_cache` has page_size " << page_size
                                   << "; the cuda executor has kernels for pages of 1, 2, 4, 8, "
                                   << "16, 32 and 64 tokens. Lay the cache out in such pages, or pass host tensors (the cpu executor takes "
                                      "any page_size)";
  }
  if (variant != nullptr) return VariantKernelFor(KernelName(dtype, head_dim, page_size) + "_v" + variant->digest);
  return *table.of[IndexOf(kDTypes, dtype)][IndexOf(kHeadDims, head_dim)][page_index];
}

// K or V for the copy engine.
struct KvView {
  const void* base;
  int64_t stride_page, stride_head, stride_token;  // elements
};

// The stride of an axis of one entry is never used, but the driver holds it to its rules all the same; tensors have anything there.
uint64_t StrideBytes(int64_t stride, uint64_t size, int32_t head_dim) { return 2 * static_cast<uint64_t>(size > 1 ? stride : head_dim); }

// Heads of whole panels have an axis of them; others are one axis, whose end the copy engine knows (cuda/params.h).
bool HasWholePanels(int32_t head_dim) { return head_dim % kPanelElements == 0; }

TensorMap EncodeKv(const AttentionLaunch& launch, const KernelInfo& kernel, const KvView& view, uint32_t box_panels) {
  const bool ragged = launch.page_size == kRagged, whole = HasWholePanels(launch.head_dim);
  const uint64_t panels = whole ? static_cast<uint64_t>(launch.head_dim / kPanelElements) : 1;
  const uint64_t columns = whole ? kPanelElements : static_cast<uint64_t>(launch.head_dim);
  const uint64_t num_pages = launch.num_pages > 0 ? static_cast<uint64_t>(launch.num_pages) : 1;
  const uint64_t heads = static_cast<uint64_t>(launch.params.expected.num_kv_heads);
  const uint64_t tokens = ragged ? num_pages : static_cast<uint64_t>(launch.page_size);
  const uint64_t pages = ragged ? 1 : num_pages;
  // A pool without pages has no address; no key is read then, but a map must have one.
  const void* base = launch.num_pages > 0 ? view.base : launch.params.q;
  return EncodeTensorMap(launch.dtype == DTypeTag::kBFloat16, base, {columns, tokens, panels, heads, pages},
                         {StrideBytes(view.stride_token, tokens, launch.head_dim), 2 * kPanelElements,
                          StrideBytes(view.stride_head, heads, launch.head_dim), StrideBytes(view.stride_page, pages, launch.head_dim)},
                         {kPanelElements, static_cast<uint32_t>(ragged ? kernel.tile_keys : launch.page_size), box_panels, 1, 1});
}

KvTensorMaps EncodeMaps(const AttentionLaunch& launch, const KernelInfo& kernel) {
  const AttentionParams& p = launch.params;
  const KvView k{p.k, p.k_stride_page, p.k_stride_head, p.k_stride_token};
  const KvView v{p.v, p.v_stride_page, p.v_stride_head, p.v_stride_token};
  const uint32_t panels = HasWholePanels(launch.head_dim) ? static_cast<uint32_t>(launch.head_dim / kPanelElements) : 1;
  KvTensorMaps maps;
  maps.k_pages = EncodeKv(launch, kernel, k, panels);
  maps.v_pages = EncodeKv(launch, kernel, v, panels);
  // Boxes of one panel are those of pages already; ragged keys do not use the third map, but the kernel prefetches all of them.
  maps.k_panels = panels == 1 || launch.page_size == kRagged ? maps.k_pages : EncodeKv(launch, kernel, k, 1);
  return maps;
}

// Kernels keep offsets of rows in 32 bits of 16-byte units. `last`: of the last element's row, in elements.
void CheckSpan(int64_t last, const char* name, const char* way_out) {
  constexpr int64_t kMaxBytes = int64_t{1} << 36;
  if (2 * last < kMaxBytes - 16) return;
  TVM_INFER_THROW(ArgumentError) << "argument `" << name << "` spans " << 2 * last << " bytes; it must be less than 64 GiB on CUDA. "
                                 << way_out;
}

void CheckSpans(const AttentionLaunch& launch) {
  const AttentionParams& p = launch.params;
  const int64_t tokens = p.expected.max_tokens, heads = int64_t{p.expected.num_kv_heads} * p.expected.group_size;
  CheckSpan((tokens - 1) * p.q_stride_token + (heads - 1) * p.q_stride_head, "q", "Attend to fewer tokens in one call");
  CheckSpan((tokens - 1) * p.o_stride_token + (heads - 1) * p.o_stride_head, "out", "Attend to fewer tokens in one call");
  if (tokens * heads > INT32_MAX) {
    TVM_INFER_THROW(ArgumentError) << "argument `q` has " << tokens << " tokens of " << heads << " heads; together they must be at most "
                                   << INT32_MAX << " rows on CUDA. Attend to fewer tokens in one call";
  }
  if (launch.page_size == kRagged || launch.page_size >= kMinBoxTokens) return;
  const int64_t pages = launch.num_pages > 0 ? launch.num_pages - 1 : 0, slots = launch.page_size - 1;
  const char* way_out = "With pages of fewer than 8 tokens keep the cache in several tensors, or use larger pages";
  CheckSpan(pages * p.k_stride_page + slots * p.k_stride_token, "k_cache", way_out);
  CheckSpan(pages * p.v_stride_page + slots * p.v_stride_token, "v_cache", way_out);
}

}  // namespace

bool HasPageSize(int32_t page_size) { return page_size != kRagged && IndexOf(kPageSizes, page_size) < kNumPageSizes; }

void LaunchAttention(const AttentionLaunch& launch) {
  CachedKernel& cached = KernelFor(launch.dtype, launch.head_dim, launch.page_size, launch.variant);
  const Device& device = GetDevice(launch.device_id);
  const Kernel& kernel = cached.Get(launch.device_id, launch.stream);
  if (launch.params.expected.max_tokens == 0) return;  // no row to write, whatever the plan
  CheckSpans(launch);
  KvTensorMaps maps{};  // gathers take no maps
  if (launch.page_size == kRagged || launch.page_size >= kMinBoxTokens) {
    maps = EncodeMaps(launch, kernel.info);
  }
  AttentionParams params = launch.params;
  variant::Args args{};
  if (launch.variant != nullptr) args = *launch.variant->args;
  void* arguments[] = {&params, &maps, &args};  // a kernel without a variant has two parameters
  // A CTA reads its first work before it knows how many CTAs the plan has: not beyond the plan's tensor.
  const int32_t grid = std::min(device.num_sms * kernel.info.ctas_per_sm, launch.max_plan_ctas);
  LaunchKernel(kernel, grid, launch.stream, arguments);
}

}  // namespace tvm_infer::cuda
