#include "tvm_infer/ffi/kv_cache_object.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace tvm_infer::ffi_api {
namespace {

constexpr DLDevice kHost = {kDLCPU, 0};
constexpr DLDataType kInt32 = {kDLInt, 32, 1};
constexpr DLDataType kInt64 = {kDLInt, 64, 1};
constexpr DLDataType kFloat32 = {kDLFloat, 32, 1};
constexpr int64_t kMaxHeadDim = 256;
constexpr size_t kAlignment = 64;  // bytes: a cache line, an AVX-512 register
constexpr size_t kHugePage = size_t{2} << 20;

// Aligned memory that nobody has written: large blocks come from the system untouched and cost nothing until they are used.
struct AlignedAllocator {
  void AllocData(DLTensor* tensor) {
    const size_t bytes = std::max<size_t>(tvm::ffi::GetDataSize(*tensor), 1);
    const size_t alignment = bytes >= kHugePage ? kHugePage : kAlignment;
    const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    tensor->data = std::aligned_alloc(alignment, rounded);
    if (tensor->data == nullptr) {
      TVM_INFER_THROW(ArgumentError) << "the system has no " << bytes << " bytes for one layer's pages or a workspace of the KV cache; "
                                     << "create it with fewer pages (num_pages) or a smaller step (max_batch, max_tokens)";
    }
#if defined(__linux__)
    // Attention reads small rows all over the cache, and would otherwise miss in the table of address translations at most of them. A wish:
    // where the system does not grant it, reads are slower and nothing else changes.
    if (alignment == kHugePage) madvise(tensor->data, rounded, MADV_HUGEPAGE);
#endif
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

tvm::ffi::Tensor Allocate(std::initializer_list<int64_t> shape, DLDataType dtype) {
  return tvm::ffi::Tensor::FromNDAlloc(AlignedAllocator(), tvm::ffi::ShapeView(shape.begin(), shape.size()), dtype, kHost);
}

std::vector<tvm::ffi::Tensor> AllocatePages(const KVCacheConfig& c) {
  std::vector<tvm::ffi::Tensor> layers;
  for (int64_t layer = 0; layer < c.num_layers; ++layer) {
    layers.push_back(Allocate({c.num_pages, 2, c.num_kv_heads, c.page_size, c.head_dim}, c.dtype));
  }
  return layers;
}

template <typename T>
T* Data(const tvm::ffi::Tensor& tensor) {
  return DataPtr<T>(TensorView(tensor));
}

const KVCacheConfig& Checked(const KVCacheConfig& c) {
  const struct {
    const char* name;
    int64_t value;
    int64_t least;
  } counts[] = {{"num_layers", c.num_layers, 1},  {"num_qo_heads", c.num_qo_heads, 1}, {"num_kv_heads", c.num_kv_heads, 1},
                {"head_dim", c.head_dim, 8},      {"page_size", c.page_size, 1},       {"num_pages", c.num_pages, 1},
                {"max_batch", c.max_batch, 1},    {"max_tokens", c.max_tokens, 1},     {"num_ctas", c.num_ctas, 0},
                {"num_threads", c.num_threads, 0}};
  for (const auto& count : counts) {
    if (count.value < count.least || count.value > std::numeric_limits<int32_t>::max()) {
      TVM_INFER_THROW(ArgumentError) << "argument `" << count.name << "` is " << count.value << "; it must be from " << count.least
                                     << " to 2^31 - 1";
    }
  }
  if (c.num_qo_heads % c.num_kv_heads != 0) {
    TVM_INFER_THROW(ArgumentError) << "argument `num_qo_heads` is " << c.num_qo_heads
                                   << "; it must be a multiple of num_kv_heads = " << c.num_kv_heads;
  }
  if (c.head_dim > kMaxHeadDim || c.head_dim % 8 != 0) {
    TVM_INFER_THROW(ArgumentError) << "argument `head_dim` is " << c.head_dim << "; it must be a multiple of 8, from 8 to " << kMaxHeadDim
                                   << ". Pad the heads with zeros (and keep sm_scale that of the unpadded width)";
  }
  const bool is_float = c.dtype.lanes == 1 && ((c.dtype.code == kDLFloat && (c.dtype.bits == 32 || c.dtype.bits == 16)) ||
                                               (c.dtype.code == kDLBfloat && c.dtype.bits == 16));
  if (!is_float) {
    TVM_INFER_THROW(DTypeError) << "argument `dtype` is " << DTypeString(c.dtype) << "; it must be float32, float16 or bfloat16";
  }
  if (c.device.device_type != kDLCPU) {
    TVM_INFER_THROW(ExecutorError) << "argument `device` is of type " << static_cast<int>(c.device.device_type) << " (DLPack; cuda is "
                                   << static_cast<int>(kDLCUDA)
                                   << "), but the only executor there is runs on the cpu. Create the cache with "
                                   << "device=\"cpu\"";
  }
  // In floating point, where it cannot overflow: all sizes below are then sure to fit in 64 bits.
  const double bytes = 2.0 * c.num_layers * c.num_pages * c.num_kv_heads * c.page_size * c.head_dim * (c.dtype.bits / 8);
  if (bytes > static_cast<double>(int64_t{1} << 62)) {
    TVM_INFER_THROW(ArgumentError) << "argument `num_pages` is " << c.num_pages << ": the cache would have " << bytes
                                   << " bytes, which no address reaches; take fewer pages";
  }
  return c;
}

cpu::DType ExecutorDType(DLDataType dtype) {
  if (dtype.code == kDLBfloat) return cpu::DType::kBFloat16;
  return dtype.bits == 32 ? cpu::DType::kFloat32 : cpu::DType::kFloat16;
}

kv::CacheLimits Limits(const KVCacheConfig& c) {
  return {static_cast<int32_t>(c.page_size), static_cast<int32_t>(c.num_pages), static_cast<int32_t>(c.max_batch),
          static_cast<int32_t>(c.max_tokens)};
}

// q, k, v or o of a step: [num_tokens, heads, head_dim] of the cache's dtype, heads and head_dim, on the host.
void CheckRows(const TensorView& tensor, const char* name, const KVCacheConfig& config, int64_t heads, const char* heads_name,
               int64_t num_tokens) {
  CheckCpu(tensor, name);
  CheckDType(tensor, name, config.dtype, "the cache's");
  CheckRank(tensor, name, 3, "[num_tokens, heads, head_dim]");
  CheckDim(tensor, name, 1, heads, heads_name);
  CheckDim(tensor, name, 2, config.head_dim, "head_dim of the cache");
  CheckLastDimContiguous(tensor, name);
  if (tensor.size(0) != num_tokens) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `" << name << "` has shape " << ShapeString(tensor) << " but begin_forward announced "
                                       << num_tokens << " tokens; pass the step's tokens, all of them, in the order of its ids";
  }
}

}  // namespace

int32_t PagedKVCacheObj::_GetOrAllocRuntimeTypeIndex() {
  static const int32_t index = [] {
    TVMFFIByteArray key{_type_key, std::char_traits<char>::length(_type_key)};
    return TVMFFITypeGetOrAllocIndex(&key, -1, _type_depth, _type_child_slots, 0, tvm::ffi::Object::_GetOrAllocRuntimeTypeIndex());
  }();
  return index;
}

PagedKVCacheObj::PagedKVCacheObj(const KVCacheConfig& config)
    : config_(Checked(config)), dtype_(ExecutorDType(config.dtype)), pages_(AllocatePages(config)), manager_(Limits(config)) {
  if (config_.num_ctas == 0) config_.num_ctas = cpu::DefaultNumThreads();
  if (config_.num_threads == 0) config_.num_threads = cpu::DefaultNumThreads();
  tile_classes_ = cpu::TileTable(dtype_, static_cast<int32_t>(config_.head_dim), &num_tile_classes_);

  // A plan grows with the number of keys only where KV is cut at a fixed size.
  const PlanLimits limits{static_cast<int32_t>(config_.max_batch), static_cast<int32_t>(config_.max_tokens), 0};
  const PlanCapacity causal = ComputeCapacity(Params(true), limits), full = ComputeCapacity(Params(false), limits);
  const int64_t plan_bytes = std::max(causal.plan_bytes, full.plan_bytes);
  partial_rows_ = std::max(causal.partial_rows, full.partial_rows);

  bytes_per_page_ = 2 * config_.num_layers * config_.num_kv_heads * config_.page_size * config_.head_dim * (config_.dtype.bits / 8);
  plan_ = Allocate({plan_bytes / static_cast<int64_t>(sizeof(int32_t))}, kInt32);
  partial_o_ = Allocate({partial_rows_, config_.head_dim}, kFloat32);
  partial_lse_ = Allocate({partial_rows_}, kFloat32);
  query_positions_ = Allocate({config_.max_tokens}, kInt64);
}

PlanParams PagedKVCacheObj::Params(bool causal) const {
  PlanParams params;
  params.num_ctas = static_cast<int32_t>(config_.num_ctas);
  params.num_qo_heads = static_cast<int32_t>(config_.num_qo_heads);
  params.num_kv_heads = static_cast<int32_t>(config_.num_kv_heads);
  params.band = Band{kUnbounded, causal ? 0 : kUnbounded};
  params.fixed_split_size = kSplitAuto;
  params.tile_classes = tile_classes_;
  params.num_tile_classes = num_tile_classes_;
  return params;
}

void PagedKVCacheObj::BeginForward(const int64_t* ids, const int64_t* append_lengths, int64_t num_requests, bool causal) {
  const kv::Step& step = manager_.BeginForward(ids, append_lengths, num_requests);
  try {
    const TensorView plan(plan_);
    plan_bytes_ = planner_.Plan(Params(causal), step.qo_indptr.data(), step.kv_len.data(), step.num_requests(), DataPtr<void>(plan),
                                plan.numel() * static_cast<int64_t>(sizeof(int32_t)), partial_rows_);
  } catch (...) {
    manager_.CancelForward();
    throw;
  }
  causal_ = causal;
  CopySharedPages(step.copies);
  int64_t* positions = Data<int64_t>(query_positions_);
  for (int32_t r = 0; r < step.num_requests(); ++r) {
    const int64_t shift = step.kv_len[r] - step.qo_indptr[r + 1];
    for (int32_t t = step.qo_indptr[r]; t < step.qo_indptr[r + 1]; ++t) positions[t] = shift + t;
  }
}

// Only the slots that hold tokens: the rest of a page is never read.
void PagedKVCacheObj::CopySharedPages(const std::vector<kv::PageCopy>& copies) {
  const int64_t row_bytes = config_.head_dim * (config_.dtype.bits / 8);
  const int64_t plane_bytes = config_.page_size * row_bytes;  // one head's keys or values
  const int64_t num_planes = 2 * config_.num_kv_heads;
  const int64_t page_bytes = num_planes * plane_bytes;
  for (const tvm::ffi::Tensor& layer : pages_) {
    char* base = Data<char>(layer);
    for (const kv::PageCopy& copy : copies) {
      const char* src = base + copy.src * page_bytes;
      char* dst = base + copy.dst * page_bytes;
      for (int64_t plane = 0; plane < num_planes; ++plane) {
        std::memcpy(dst + plane * plane_bytes, src + plane * plane_bytes, copy.num_tokens * row_bytes);
      }
    }
  }
}

cpu::KVSource PagedKVCacheObj::Source(int64_t layer) const {
  cpu::KVSource source{};
  const int64_t head = config_.page_size * config_.head_dim, plane = config_.num_kv_heads * head;
  char* base = Data<char>(pages_[layer]);
  source.k = base;
  source.v = base + plane * (config_.dtype.bits / 8);
  source.k_page_stride = source.v_page_stride = 2 * plane;
  source.k_head_stride = source.v_head_stride = head;
  source.k_token_stride = source.v_token_stride = config_.head_dim;
  source.page_size = static_cast<int32_t>(config_.page_size);
  source.page_indptr = manager_.last_step().page_indptr.data();
  source.page_indices = manager_.last_step().page_indices.data();
  return source;
}

void PagedKVCacheObj::Attention(int64_t layer, const TensorView& q, const TensorView& k, const TensorView& v, double sm_scale, bool causal,
                                const TensorView& o) {
  const kv::Step& step = manager_.step();
  Pages(layer);
  CheckRows(q, "q", config_, config_.num_qo_heads, "num_qo_heads of the cache", step.num_tokens());
  CheckRows(k, "k", config_, config_.num_kv_heads, "num_kv_heads of the cache", step.num_tokens());
  CheckRows(v, "v", config_, config_.num_kv_heads, "num_kv_heads of the cache", step.num_tokens());
  CheckRows(o, "out", config_, config_.num_qo_heads, "num_qo_heads of the cache", step.num_tokens());
  if (!std::isfinite(sm_scale)) TVM_INFER_THROW(ArgumentError) << "argument `sm_scale` is " << sm_scale << "; it must be finite";
  if (causal != causal_) {
    TVM_INFER_THROW(PlanMismatchError) << "argument `causal` is " << causal
                                       << " but begin_forward planned the step with causal = " << causal_
                                       << "; a plan leaves out keys by its mask: begin the step with the same";
  }
  if (step.num_tokens() == 0) return;

  cpu::AppendArgs append{};
  append.dtype = dtype_;
  append.num_requests = step.num_requests();
  append.num_kv_heads = static_cast<int32_t>(config_.num_kv_heads);
  append.head_dim = static_cast<int32_t>(config_.head_dim);
  append.qo_indptr = step.qo_indptr.data();
  append.kv_len = step.kv_len.data();
  append.k = DataPtr<void>(k);
  append.v = DataPtr<void>(v);
  append.k_token_stride = Stride(k, 0);
  append.k_head_stride = Stride(k, 1);
  append.v_token_stride = Stride(v, 0);
  append.v_head_stride = Stride(v, 1);
  append.cache = Source(layer);
  const int num_threads = static_cast<int>(config_.num_threads);
  cpu::Append(append, num_threads);

  cpu::AttentionArgs attend{};
  attend.plan = Data<void>(plan_);
  attend.dtype = dtype_;
  attend.num_qo_heads = static_cast<int32_t>(config_.num_qo_heads);
  attend.num_kv_heads = append.num_kv_heads;
  attend.head_dim = append.head_dim;
  attend.q = DataPtr<void>(q);
  attend.q_token_stride = Stride(q, 0);
  attend.q_head_stride = Stride(q, 1);
  attend.kv = append.cache;
  attend.sm_scale = static_cast<float>(sm_scale);
  attend.o = DataPtr<void>(o);
  attend.o_token_stride = Stride(o, 0);
  attend.o_head_stride = Stride(o, 1);
  attend.partial_o = Data<float>(partial_o_);
  attend.partial_lse = Data<float>(partial_lse_);
  cpu::Attention(attend, num_threads);
}

tvm::ffi::Tensor PagedKVCacheObj::QueryPositions(int ndim) const {
  const int64_t num_tokens = manager_.step().num_tokens();
  const int64_t shape[] = {1, num_tokens}, strides[] = {num_tokens, 1};
  const int skip = 2 - ndim;
  return query_positions_.as_strided(tvm::ffi::ShapeView(shape + skip, ndim), tvm::ffi::ShapeView(strides + skip, ndim));
}

tvm::ffi::Tensor PagedKVCacheObj::CurrentPlan() const {
  if (plan_bytes_ == 0) TVM_INFER_THROW(CacheStateError) << "the cache has no plan yet; call begin_forward() first";
  const int64_t shape[] = {plan_bytes_ / static_cast<int64_t>(sizeof(int32_t))}, strides[] = {1};
  return plan_.as_strided(tvm::ffi::ShapeView(shape, 1), tvm::ffi::ShapeView(strides, 1));
}

const tvm::ffi::Tensor& PagedKVCacheObj::Pages(int64_t layer) const {
  if (layer < 0 || layer >= config_.num_layers) {
    TVM_INFER_THROW(ArgumentError) << "argument `layer` is " << layer << " but the cache has " << config_.num_layers
                                   << " layers; it must be from 0 to " << config_.num_layers - 1;
  }
  return pages_[layer];
}

void PagedKVCacheObj::Bind(int64_t token) {
  if (token == 0) TVM_INFER_THROW(ArgumentError) << "argument `token` is 0; an executable's token is any other number";
  if (owner_ != 0 && owner_ != token) {
    TVM_INFER_THROW(CacheStateError) << "the cache serves executable " << owner_ << " and cannot serve executable " << token
                                     << " too; give each its own cache, or release this one first";
  }
  owner_ = token;
}

void PagedKVCacheObj::Release(int64_t token) {
  if (owner_ != token) {
    TVM_INFER_THROW(CacheStateError) << "executable " << token << " released a cache that "
                                     << (owner_ == 0 ? "serves none" : "serves executable " + std::to_string(owner_));
  }
  owner_ = 0;
}

}  // namespace tvm_infer::ffi_api
