#include "tvm_infer/cpu/rope_append.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "tvm_infer/cpu/kernels.h"
#include "tvm_infer/cpu/thread_pool.h"

namespace tvm_infer::cpu {
namespace {

constexpr int64_t kUnitBytes = 64 * 1024;  // as append_merge.cc: taking a unit from the counter is free beside it

struct Context {
  const RopeAppendArgs& args;
  void (*turn_row)(const TurnRowJob&);
  // Where the cache is scaled, else null: a key is turned to float, then rounded once; a value is rounded as it is.
  void (*turn_to_float)(const TurnRowJob&);
  void (*quantise_float)(const QuantiseRowJob&);
  void (*quantise)(const QuantiseRowJob&);
  int64_t element_size, cache_element_size;  // bytes
  int32_t tokens_per_unit;
};

// Cosines and sines of a position, once a token for all its heads. In double, where position * inv_freq is exact up to position 2^29: 64
// pairs take about as long as moving the token's 48 heads of 128 floats does, 1 us of two threads.
struct Angles {
  alignas(64) float cos[kMaxRotaryDim / 2], sin[kMaxRotaryDim / 2];

  void Set(const RopeAppendArgs& args, int32_t position) {
    for (int32_t i = 0; i < args.rotary_dim / 2; ++i) {
      const double angle = static_cast<double>(position) * args.inv_freq[i];
      cos[i] = static_cast<float>(std::cos(angle) * args.magnitude);
      sin[i] = static_cast<float>(std::sin(angle) * args.magnitude);
    }
  }
};

// The heads of a token: [num_heads, head_dim] at a stride in bytes.
struct Heads {
  char* data;
  int64_t stride;
};

Heads HeadsOf(int64_t element_size, const void* tensor, int64_t row, int64_t head_stride) {
  // The cache is written through: KVSource is const only because attention reads through it.
  return {const_cast<char*>(static_cast<const char*>(tensor)) + row * element_size, head_stride * element_size};
}

void TurnHeads(const Context& ctx, const Angles& angles, int32_t num_heads, const Heads& from, const Heads& to) {
  const RopeAppendArgs& args = ctx.args;
  for (int32_t h = 0; h < num_heads; ++h) {
    ctx.turn_row({args.append.head_dim, args.rotary_dim, args.is_interleaved, angles.cos, angles.sin, from.data + h * from.stride,
                  to.data + h * to.stride});
  }
}

void AppendKeys(const Context& ctx, const Angles& angles, const Heads& from, const Heads& to) {
  const RopeAppendArgs& args = ctx.args;
  const AppendArgs& append = args.append;
  if (ctx.turn_to_float == nullptr) return TurnHeads(ctx, angles, append.num_kv_heads, from, to);
  alignas(64) float turned[256];
  for (int32_t h = 0; h < append.num_kv_heads; ++h) {
    ctx.turn_to_float({append.head_dim, args.rotary_dim, args.is_interleaved, angles.cos, angles.sin, from.data + h * from.stride, turned});
    ctx.quantise_float({append.head_dim, append.cache.k_scale.Of(h), turned, to.data + h * to.stride});
  }
}

void AppendValues(const Context& ctx, const Heads& from, const Heads& to) {
  const AppendArgs& append = ctx.args.append;
  const size_t row_bytes = static_cast<size_t>(append.head_dim_vo * ctx.element_size);
  for (int32_t h = 0; h < append.num_kv_heads; ++h) {
    if (ctx.quantise != nullptr) {
      ctx.quantise({append.head_dim_vo, append.cache.v_scale.Of(h), from.data + h * from.stride, to.data + h * to.stride});
    } else {
      std::memcpy(to.data + h * to.stride, from.data + h * from.stride, row_bytes);
    }
  }
}

void AppendToken(const Context& ctx, int32_t token, int32_t request, Angles* angles) {
  const RopeAppendArgs& args = ctx.args;
  const AppendArgs& append = args.append;
  const KVSource& cache = append.cache;
  const int32_t position = append.kv_len[request] - (append.qo_indptr[request + 1] - token);
  const int64_t page = cache.page_indices[cache.page_indptr[request] + position / cache.page_size];
  const int64_t slot = position % cache.page_size;
  angles->Set(args, position);
  const int64_t size = ctx.element_size, cache_size = ctx.cache_element_size;
  TurnHeads(ctx, *angles, args.num_qo_heads, HeadsOf(size, args.q, token * args.q_token_stride, args.q_head_stride),
            HeadsOf(size, args.q_out, token * args.q_out_token_stride, args.q_out_head_stride));
  AppendKeys(ctx, *angles, HeadsOf(size, append.k, token * append.k_token_stride, append.k_head_stride),
             HeadsOf(cache_size, cache.k, page * cache.k_page_stride + slot * cache.k_token_stride, cache.k_head_stride));
  AppendValues(ctx, HeadsOf(size, append.v, token * append.v_token_stride, append.v_head_stride),
               HeadsOf(cache_size, cache.v, page * cache.v_page_stride + slot * cache.v_token_stride, cache.v_head_stride));
}

void ClearQuery(const Context& ctx, int32_t token) {
  const RopeAppendArgs& args = ctx.args;
  const Heads to = HeadsOf(ctx.element_size, args.q_out, token * args.q_out_token_stride, args.q_out_head_stride);
  const size_t row_bytes = static_cast<size_t>(args.append.head_dim * ctx.element_size);
  for (int32_t h = 0; h < args.num_qo_heads; ++h) std::memset(to.data + h * to.stride, 0, row_bytes);
}

void RunUnit(void* context, int64_t unit, ThreadScratch*) {
  const Context& ctx = *static_cast<const Context*>(context);
  const int32_t begin = static_cast<int32_t>(unit * ctx.tokens_per_unit);
  const int32_t end = std::min(ctx.args.num_tokens, begin + ctx.tokens_per_unit);
  const int32_t num_requests = ctx.args.append.num_requests;
  const int32_t* indptr = ctx.args.append.qo_indptr;
  int32_t request = static_cast<int32_t>(std::upper_bound(indptr, indptr + num_requests + 1, begin) - indptr) - 1;
  Angles angles;
  for (int32_t token = begin; token < end; ++token) {
    while (request < num_requests && token >= indptr[request + 1]) ++request;
    if (request < num_requests) {
      AppendToken(ctx, token, request, &angles);
    } else {
      ClearQuery(ctx, token);
    }
  }
}

}  // namespace

void RopeAppend(const RopeAppendArgs& args, int num_threads) {
  const DType dtype = args.append.dtype, cache_dtype = args.append.cache.dtype;
  const int64_t element_size = ElementBits(dtype) / 8;
  const int64_t token_bytes = int64_t{args.num_qo_heads + 2 * args.append.num_kv_heads} * args.append.head_dim * element_size;
  const int32_t tokens_per_unit = static_cast<int32_t>(std::max<int64_t>(1, kUnitBytes / std::max<int64_t>(1, token_bytes)));
  const KernelTable& kernels = ChosenKernels();
  const auto type = static_cast<int>(dtype);
  Context ctx{args, kernels.turn_row[type], nullptr, nullptr, nullptr, element_size, ElementBits(cache_dtype) / 8, tokens_per_unit};
  if (IsScaled(cache_dtype)) {
    ctx.turn_to_float = kernels.turn_row_to_float[type];
    ctx.quantise_float = kernels.quantise_row[static_cast<int>(DType::kFloat32)][ScaledIndex(cache_dtype)];
    ctx.quantise = kernels.quantise_row[type][ScaledIndex(cache_dtype)];
  }
  if (num_threads <= 0) num_threads = DefaultNumThreads();
  ThreadPool::Get().Run(num_threads, (args.num_tokens + tokens_per_unit - 1) / tokens_per_unit, RunUnit, &ctx);
}

}  // namespace tvm_infer::cpu
