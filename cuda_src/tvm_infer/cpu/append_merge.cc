// Append of new tokens to paged caches, and the merge of two attention states.
#include <algorithm>
#include <cstring>

#include "tvm_infer/cpu/attention.h"
#include "tvm_infer/cpu/kernels.h"
#include "tvm_infer/cpu/thread_pool.h"

namespace tvm_infer::cpu {
namespace {

// Bytes that one unit copies: large enough that taking it from the counter is free, small enough to share.
constexpr int64_t kUnitBytes = 64 * 1024;

struct AppendContext {
  const AppendArgs& args;
  void (*quantise)(const QuantiseRowJob&);   // null: rows are copied
  int64_t element_size, cache_element_size;  // bytes
  int32_t num_tokens;
  int32_t tokens_per_unit;
};

void AppendToken(const AppendContext& ctx, int32_t token, int32_t request) {
  const AppendArgs& args = ctx.args;
  const KVSource& cache = args.cache;
  const int32_t position = args.kv_len[request] - (args.qo_indptr[request + 1] - token);
  const int64_t page = cache.page_indices[cache.page_indptr[request] + position / cache.page_size];
  const int64_t slot = position % cache.page_size;
  const auto copy = [&](int32_t head_dim, const void* to, const void* from, int64_t to_row, int64_t to_head_stride, int64_t from_row,
                        int64_t from_head_stride, const KVScale& scale) {
    // The cache is written through: KVSource is const only because attention reads through it.
    char* out = const_cast<char*>(static_cast<const char*>(to)) + to_row * ctx.cache_element_size;
    const char* in = static_cast<const char*>(from) + from_row * ctx.element_size;
    for (int32_t h = 0; h < args.num_kv_heads; ++h) {
      char* out_head = out + h * to_head_stride * ctx.cache_element_size;
      const char* in_head = in + h * from_head_stride * ctx.element_size;
      if (ctx.quantise != nullptr) {
        ctx.quantise({head_dim, scale.Of(h), in_head, out_head});
      } else {
        std::memcpy(out_head, in_head, static_cast<size_t>(head_dim * ctx.element_size));
      }
    }
  };
  copy(args.head_dim, cache.k, args.k, page * cache.k_page_stride + slot * cache.k_token_stride, cache.k_head_stride,
       token * args.k_token_stride, args.k_head_stride, cache.k_scale);
  copy(args.head_dim_vo, cache.v, args.v, page * cache.v_page_stride + slot * cache.v_token_stride, cache.v_head_stride,
       token * args.v_token_stride, args.v_head_stride, cache.v_scale);
}

void RunAppend(void* context, int64_t unit, ThreadScratch*) {
  const AppendContext& ctx = *static_cast<const AppendContext*>(context);
  const int32_t begin = static_cast<int32_t>(unit * ctx.tokens_per_unit);
  const int32_t end = std::min(ctx.num_tokens, begin + ctx.tokens_per_unit);
  const int32_t* indptr = ctx.args.qo_indptr;
  int32_t request = static_cast<int32_t>(std::upper_bound(indptr, indptr + ctx.args.num_requests + 1, begin) - indptr) - 1;
  for (int32_t token = begin; token < end; ++token) {
    while (token >= indptr[request + 1]) ++request;
    AppendToken(ctx, token, request);
  }
}

struct MergeContext {
  const MergeArgs& args;
  const KernelTable& kernels;
  int64_t element_size;
  int64_t rows_per_unit;
};

void RunMergeStates(void* context, int64_t unit, ThreadScratch*) {
  const MergeContext& ctx = *static_cast<const MergeContext*>(context);
  const MergeArgs& args = ctx.args;
  const int64_t end = std::min(args.num_rows, (unit + 1) * ctx.rows_per_unit);
  for (int64_t row = unit * ctx.rows_per_unit; row < end; ++row) {
    for (int32_t head = 0; head < args.num_heads; ++head) {
      const void* const in[2] = {
          static_cast<const char*>(args.o_a) + (row * args.o_a_row_stride + head * args.o_a_head_stride) * ctx.element_size,
          static_cast<const char*>(args.o_b) + (row * args.o_b_row_stride + head * args.o_b_head_stride) * ctx.element_size};
      const float lse[2] = {args.lse_a[row * args.lse_a_row_stride + head * args.lse_a_head_stride],
                            args.lse_b[row * args.lse_b_row_stride + head * args.lse_b_head_stride]};
      const MergeRowJob job{2,
                            args.head_dim,
                            in,
                            lse,
                            static_cast<char*>(args.o) + (row * args.o_row_stride + head * args.o_head_stride) * ctx.element_size,
                            args.lse == nullptr ? nullptr : args.lse + row * args.lse_row_stride + head * args.lse_head_stride,
                            nullptr,
                            /*has_softmax=*/true};
      ctx.kernels.merge_states[static_cast<int>(args.dtype)](job);
    }
  }
}

int64_t ElementSize(DType dtype) { return ElementBits(dtype) / 8; }

}  // namespace

void Append(const AppendArgs& args, int num_threads) {
  const int32_t num_tokens = args.qo_indptr[args.num_requests];
  const int64_t token_bytes = int64_t{args.num_kv_heads} * (args.head_dim + args.head_dim_vo) * ElementSize(args.dtype);
  const int32_t tokens_per_unit = static_cast<int32_t>(std::max<int64_t>(1, kUnitBytes / std::max<int64_t>(1, token_bytes)));
  const auto quantise =
      IsScaled(args.cache.dtype) ? ChosenKernels().quantise_row[static_cast<int>(args.dtype)][ScaledIndex(args.cache.dtype)] : nullptr;
  AppendContext ctx{args, quantise, ElementSize(args.dtype), ElementSize(args.cache.dtype), num_tokens, tokens_per_unit};
  if (num_threads <= 0) num_threads = DefaultNumThreads();
  ThreadPool::Get().Run(num_threads, (num_tokens + tokens_per_unit - 1) / tokens_per_unit, RunAppend, &ctx);
}

void Merge(const MergeArgs& args, int num_threads) {
  const int64_t row_bytes = 3 * args.num_heads * args.head_dim * ElementSize(args.dtype);
  MergeContext ctx{args, ChosenKernels(), ElementSize(args.dtype), std::max<int64_t>(1, kUnitBytes / std::max<int64_t>(1, row_bytes))};
  if (num_threads <= 0) num_threads = DefaultNumThreads();
  ThreadPool::Get().Run(num_threads, (args.num_rows + ctx.rows_per_unit - 1) / ctx.rows_per_unit, RunMergeStates, &ctx);
}

}  // namespace tvm_infer::cpu
