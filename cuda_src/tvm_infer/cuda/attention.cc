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

constexpr int32_t kMinBoxTokens = 8;  // smaller pages are gathered by token

// Shapes with a kernel, as rows of one table each; a new one is a new entry.
constexpr int32_t kPageSizes[] = {kRagged, 1, 2, 4, 8, 16, 32, 64};
constexpr int32_t kHeadDims[] = {64, 80, 96, 128, 192, 256};
constexpr int32_t kWideHeadDim = 192, kNarrowHeadDimVo = 128;  // keys wider than values: the pair that there is
constexpr DTypeTag kDTypes[] = {DTypeTag::kFloat16, DTypeTag::kBFloat16};
// Of scaled keys and values.
constexpr DTypeTag kScaledDTypes[] = {DTypeTag::kFloat8E4M3, DTypeTag::kFloat8E5M2};
constexpr int32_t kScaledPageSizes[] = {16, 32, 64};
constexpr int kNumScaledDTypes = sizeof(kScaledDTypes) / sizeof(kScaledDTypes[0]);
constexpr int kNumScaledPageSizes = sizeof(kScaledPageSizes) / sizeof(kScaledPageSizes[0]);
constexpr int kNumPageSizes = sizeof(kPageSizes) / sizeof(kPageSizes[0]);
constexpr int kNumHeadDims = sizeof(kHeadDims) / sizeof(kHeadDims[0]);
constexpr int kNumDTypes = sizeof(kDTypes) / sizeof(kDTypes[0]);

// `heads`: "h128".
std::string KernelName(DTypeTag dtype, DTypeTag kv_dtype, const std::string& heads, int32_t page_size) {
  const std::string kv = IsScaled(kv_dtype) ? std::string("_") + Suffix(kv_dtype) : std::string();
  return std::string("attention_") + Suffix(dtype) + kv + "_" + heads +
         (page_size == kRagged ? "_ragged" : "_p" + std::to_string(page_size));
}
std::string KernelName(DTypeTag dtype, DTypeTag kv_dtype, int32_t head_dim, int32_t page_size) {
  return KernelName(dtype, kv_dtype, "h" + std::to_string(head_dim), page_size);
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
        for (int p = 0; p < kNumPageSizes; ++p)
          of[d][h][p] = new CachedKernel(KernelName(kDTypes[d], kDTypes[d], kHeadDims[h], kPageSizes[p]));
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
template <typename T, int kCount>
bool Has(const T (&values)[kCount], T value) {
  return IndexOf(values, value) < kCount;
}

// One CachedKernel for each shape with scaled keys; never destroyed.
struct ScaledKernelTable {
  CachedKernel* of[kNumDTypes][kNumScaledDTypes][kNumHeadDims][kNumScaledPageSizes];
  ScaledKernelTable() {
    for (int d = 0; d < kNumDTypes; ++d) {
      for (int kv = 0; kv < kNumScaledDTypes; ++kv) {
        for (int h = 0; h < kNumHeadDims; ++h) {
          for (int p = 0; p < kNumScaledPageSizes; ++p)
            of[d][kv][h][p] = new CachedKernel(KernelName(kDTypes[d], kScaledDTypes[kv], kHeadDims[h], kScaledPageSizes[p]));
        }
      }
    }
  }
};

// The same of keys wider than values.
struct UnequalKernelTable {
  CachedKernel* of[kNumDTypes][kNumPageSizes];
  UnequalKernelTable() {
    const std::string heads = "h" + std::to_string(kWideHeadDim) + "_v" + std::to_string(kNarrowHeadDimVo);
    for (int d = 0; d < kNumDTypes; ++d) {
      for (int p = 0; p < kNumPageSizes; ++p) of[d][p] = new CachedKernel(KernelName(kDTypes[d], kDTypes[d], heads, kPageSizes[p]));
    }
  }
};

CachedKernel& KernelFor(const AttentionLaunch& launch) {
  CheckKernelShape(launch.dtype, launch.kv_dtype, launch.head_dim, launch.head_dim_vo, "q");
  if (launch.page_size != kRagged || IsScaled(launch.kv_dtype)) CheckPageSize(launch.kv_dtype, launch.page_size, "k_cache");
  if (launch.variant != nullptr) {
    CheckTakesVariant(launch.head_dim, launch.head_dim_vo, "q");
    return VariantKernelFor(KernelName(launch.dtype, launch.kv_dtype, launch.head_dim, launch.page_size) + "_v" + launch.variant->digest);
  }
  const int dtype = IndexOf(kDTypes, launch.dtype);
  if (IsScaled(launch.kv_dtype)) {
    static const ScaledKernelTable& table = *new ScaledKernelTable;
    return *table.of[dtype][IndexOf(kScaledDTypes, launch.kv_dtype)][IndexOf(kHeadDims, launch.head_dim)]
                    [IndexOf(kScaledPageSizes, launch.page_size)];
  }
  if (launch.head_dim != launch.head_dim_vo) {
    static const UnequalKernelTable& table = *new UnequalKernelTable;
    return *table.of[dtype][IndexOf(kPageSizes, launch.page_size)];
  }
  static const KernelTable& table = *new KernelTable;
  return *table.of[dtype][IndexOf(kHeadDims, launch.head_dim)][IndexOf(kPageSizes, launch.page_size)];
}

// K or V for the copy engine.
struct KvView {
  const void* base;
  int64_t stride_page, stride_head, stride_token;  // elements
  int32_t head_dim;
};

// The stride of an axis of one entry is never used, but the driver holds it to its rules all the same; tensors have anything there.
uint64_t StrideBytes(const AttentionLaunch& launch, const KvView& view, int64_t stride, uint64_t size) {
  return ElementBytes(launch.kv_dtype) * static_cast<uint64_t>(size > 1 ? stride : view.head_dim);
}

// Heads of whole panels have an axis of them; others are one axis, whose end the copy engine knows (cuda/params.h).
uint32_t PanelBytes(const AttentionLaunch& launch, const KvView& view) {
  return static_cast<uint32_t>(KvPanelBytes(view.head_dim, ElementBytes(launch.kv_dtype)));
}
uint32_t PanelElements(const AttentionLaunch& launch, const KvView& view) {
  return PanelBytes(launch, view) / static_cast<uint32_t>(ElementBytes(launch.kv_dtype));
}
uint32_t NumPanels(const AttentionLaunch& launch, const KvView& view) {
  const auto head_dim = static_cast<uint32_t>(view.head_dim), panel = PanelElements(launch, view);
  return head_dim % panel == 0 ? head_dim / panel : 1;
}

TensorMap EncodeKv(const AttentionLaunch& launch, const KernelInfo& kernel, const KvView& view, uint32_t box_panels) {
  const bool ragged = launch.page_size == kRagged;
  const uint64_t panels = NumPanels(launch, view), columns = static_cast<uint64_t>(view.head_dim) / panels;
  const uint64_t num_pages = launch.num_pages > 0 ? static_cast<uint64_t>(launch.num_pages) : 1;
  const uint64_t heads = static_cast<uint64_t>(launch.params.expected.num_kv_heads);
  const uint64_t tokens = ragged ? num_pages : static_cast<uint64_t>(launch.page_size);
  const uint64_t pages = ragged ? 1 : num_pages;
  // A pool without pages has no address; no key is read then, but a map must have one.
  const void* base = launch.num_pages > 0 ? view.base : launch.params.q;
  return EncodeTensorMap(
      launch.kv_dtype, base, {columns, tokens, panels, heads, pages},
      {StrideBytes(launch, view, view.stride_token, tokens), PanelBytes(launch, view), StrideBytes(launch, view, view.stride_head, heads),
       StrideBytes(launch, view, view.stride_page, pages)},
      {PanelElements(launch, view), static_cast<uint32_t>(ragged ? kernel.tile_keys : launch.page_size), box_panels, 1, 1},
      int64_t{view.head_dim} * ElementBytes(launch.kv_dtype));
}

KvTensorMaps EncodeMaps(const AttentionLaunch& launch, const KernelInfo& kernel) {
  const AttentionParams& p = launch.params;
  const KvView k{p.k, p.k_stride_page, p.k_stride_head, p.k_stride_token, launch.head_dim};
  const KvView v{p.v, p.v_stride_page, p.v_stride_head, p.v_stride_token, launch.head_dim_vo};
  const uint32_t panels = NumPanels(launch, k);
  KvTensorMaps maps;
  maps.k_pages = EncodeKv(launch, kernel, k, panels);
  maps.v_pages = EncodeKv(launch, kernel, v, NumPanels(launch, v));
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

bool HasPageSize(DTypeTag kv_dtype, int32_t page_size) {
  return page_size != kRagged && (IsScaled(kv_dtype) ? Has(kScaledPageSizes, page_size) : Has(kPageSizes, page_size));
}

const char* PageSizes(DTypeTag kv_dtype) {
  return IsScaled(kv_dtype) ? "8-bit elements in pages of 16, 32 and 64 tokens" : "pages of 1, 2, 4, 8, 16, 32 and 64 tokens";
}

void CheckPageSize(DTypeTag kv_dtype, int32_t page_size, const char* name) {
  if (HasPageSize(kv_dtype, page_size)) return;
  TVM_INFER_THROW(ExecutorError) << "argument `" << name << "` has " << (page_size == kRagged ? "no pages" : "page_size ")
                                 << (page_size == kRagged ? std::string() : std::to_string(page_size)) << "; the cuda executor has kernels "
                                 << "for " << PageSizes(kv_dtype) << ". Lay the cache out in such pages, or pass host tensors (the cpu "
                                 << "executor takes any page_size)";
}

void CheckTakesVariant(int32_t head_dim, int32_t head_dim_vo, const char* name) {
  if (head_dim == head_dim_vo) return;
  TVM_INFER_THROW(ExecutorError) << "argument `" << name << "` has head_dim " << head_dim << " beside head_dim_vo " << head_dim_vo
                                 << ", with which the cuda executor has plain attention only, no variant. Pad the values with zeros, or "
                                    "pass host tensors (the cpu executor takes both)";
}

const Kernel& PrepareAttention(const AttentionLaunch& launch) {
  const Kernel& kernel = KernelFor(launch).Get(launch.device_id, launch.stream);
  if (launch.params.expected.max_tokens > 0) CheckSpans(launch);
  return kernel;
}

void LaunchAttention(const AttentionLaunch& launch, const Kernel& kernel) {
  if (launch.params.expected.max_tokens == 0) return;  // no row to write, whatever the plan
  KvTensorMaps maps{};                                 // gathers take no maps
  if (launch.page_size == kRagged || launch.page_size >= kMinBoxTokens) {
    maps = EncodeMaps(launch, kernel.info);
  }
  AttentionParams params = launch.params;
  variant::Args args{};
  if (launch.variant != nullptr) args = *launch.variant->args;
  void* arguments[] = {&params, &maps, &args};  // a kernel without a variant has two parameters
  // A CTA reads its first work before it knows how many CTAs the plan has: not beyond the plan's tensor.
  const int32_t grid = std::min(GetDevice(launch.device_id).num_sms * kernel.info.ctas_per_sm, launch.max_plan_ctas);
  LaunchKernel(kernel, grid, launch.stream, arguments);
}

}  // namespace tvm_infer::cuda
