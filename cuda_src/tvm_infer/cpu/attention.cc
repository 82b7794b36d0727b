// Walks a Plan on host threads: CTAs first, each thread taking the next one, then the merges.
#include "tvm_infer/cpu/attention.h"

#include <algorithm>
#include <cstring>

#include "tvm_infer/cpu/kernels.h"
#include "tvm_infer/cpu/thread_pool.h"
#include "tvm_infer/error.h"

namespace tvm_infer::cpu {
namespace {

// Below this much predicted work, waking a thread (a few microseconds here, tens until it runs) costs more than it brings.
constexpr int64_t kSerialCost = 30'000'000;  // picoseconds

struct Context {
  const AttentionArgs& args;
  const KernelTable& kernels;
  PlanView plan;
  const PlanHeader& header;
  int64_t element_size;     // of q and o, bytes
  int64_t kv_element_size;  // of keys and values
  int64_t pieces_per_merge;

  const char* QRow(int32_t token, int32_t head) const {
    return static_cast<const char*>(args.q) + (token * args.q_token_stride + head * args.q_head_stride) * element_size;
  }
  char* ORow(int32_t token, int32_t head) const {
    return static_cast<char*>(args.o) + (token * args.o_token_stride + head * args.o_head_stride) * element_size;
  }
  float* LseRow(int32_t token, int32_t head) const { return args.lse + token * args.lse_token_stride + head * args.lse_head_stride; }
};

// Which request a token is of.
int32_t RequestOf(const Context& ctx, int32_t token) {
  const int32_t* indptr = ctx.plan.qo_indptr();
  return static_cast<int32_t>(std::upper_bound(indptr, indptr + ctx.header.num_requests + 1, token) - indptr) - 1;
}

variant::Row DescribeRow(const Context& ctx, int32_t token, int32_t request, int32_t qo_head) {
  const int32_t begin = ctx.plan.qo_indptr()[request], end = ctx.plan.qo_indptr()[request + 1], kv_len = ctx.plan.kv_len()[request];
  return {request, qo_head, qo_head / ctx.header.group_size, kv_len - (end - token), end - begin, kv_len};
}

// Token, head in group and visible keys of every row of a work; returns the union of the keys.
struct KeyRange {
  int32_t begin, end;
};
KeyRange LocateRows(const Context& ctx, const Work& work, ThreadScratch* s) {
  const int32_t group = ctx.header.group_size;
  const Band band = ctx.header.band;
  const bool is_banded = band.left != kUnbounded || band.right != kUnbounded;
  const int32_t* order = ctx.plan.token_order();
  const int32_t first_slot = work.row_begin / group, last_slot = (work.row_begin + work.num_rows - 1) / group;
  // qo_pos_base speaks for all rows only where they are of one request.
  bool is_one_request = true;
  if (is_banded) {
    is_one_request = order == nullptr && last_slot < ctx.plan.qo_indptr()[RequestOf(ctx, first_slot) + 1];
  }
  const size_t n = static_cast<size_t>(work.num_rows);
  s->tokens.resize(n);
  s->heads.resize(n);
  s->visible_begin.resize(n);
  s->visible_end.resize(n);
  KeyRange all{work.kv_end, work.kv_begin};
  for (int32_t r = 0; r < work.num_rows; ++r) {
    const int32_t slot = (work.row_begin + r) / group;
    const int32_t token = order == nullptr ? slot : order[slot];
    int64_t begin = work.kv_begin, end = work.kv_end;
    if (is_banded) {
      int64_t position = work.qo_pos_base + (slot - first_slot);
      if (!is_one_request) {
        const int32_t request = RequestOf(ctx, token);
        position = ctx.plan.kv_len()[request] - (ctx.plan.qo_indptr()[request + 1] - token);
      }
      if (band.left != kUnbounded) begin = std::max(begin, position - band.left);
      if (band.right != kUnbounded) end = std::min(end, position + band.right + 1);
    }
    s->tokens[r] = token;
    s->heads[r] = (work.row_begin + r) % group;
    s->visible_begin[r] = static_cast<int32_t>(std::min<int64_t>(begin, work.kv_end));
    s->visible_end[r] = static_cast<int32_t>(std::max<int64_t>(end, work.kv_begin));
    if (begin < end) {
      all.begin = std::min(all.begin, s->visible_begin[r]);
      all.end = std::max(all.end, s->visible_end[r]);
    }
  }
  if (all.begin >= all.end) all = {work.kv_begin, work.kv_begin};
  return all;
}

// What a variant is told of the rows of a work, for its first KV head, behind LocateRows.
void DescribeRows(const Context& ctx, const Work& work, ThreadScratch* s) {
  const int32_t* indptr = ctx.plan.qo_indptr();
  const int32_t first_head = work.kv_head_begin * ctx.header.group_size;
  s->variant_rows.resize(static_cast<size_t>(work.num_rows));
  int32_t request = RequestOf(ctx, s->tokens[0]);
  for (int32_t r = 0; r < work.num_rows; ++r) {
    const int32_t token = s->tokens[r];
    if (token < indptr[request] || token >= indptr[request + 1]) request = RequestOf(ctx, token);
    s->variant_rows[r] = DescribeRow(ctx, token, request, first_head + s->heads[r]);
  }
}

// Of KV head `head` on, and the stride between heads.
const float* ScaleOf(const KVScale& scale, int32_t head, int32_t* stride) {
  *stride = scale.heads == nullptr ? 0 : 1;
  return scale.heads == nullptr ? &scale.all : scale.heads + head;
}

void RunWork(const Context& ctx, const Work& work, ThreadScratch* s) {
  const AttentionArgs& args = ctx.args;
  const KVSource& kv = args.kv;
  const KeyRange keys = LocateRows(ctx, work, s);
  const size_t n = static_cast<size_t>(work.num_rows);
  s->inputs.resize(n);
  s->outputs.resize(n);
  s->lse_rows.resize(n);

  const int32_t group = ctx.header.group_size, first_head = work.kv_head_begin * group;
  TileJob job{};
  job.q_type = static_cast<int32_t>(args.dtype);
  job.num_rows = work.num_rows;
  job.num_kv_heads = work.num_kv_heads;
  job.head_dim = args.head_dim;
  job.head_dim_vo = args.head_dim_vo;
  job.q_scale = args.sm_scale * 1.44269504088896340736f;
  job.q_rows = s->inputs.data();
  job.q_head_stride = group * args.q_head_stride * ctx.element_size;
  job.visible_begin = s->visible_begin.data();
  job.visible_end = s->visible_end.data();
  job.kv_begin = keys.begin;
  job.kv_end = keys.end;
  job.k = static_cast<const char*>(kv.k) + work.kv_head_begin * kv.k_head_stride * ctx.kv_element_size;
  job.v = static_cast<const char*>(kv.v) + work.kv_head_begin * kv.v_head_stride * ctx.kv_element_size;
  job.k_page_stride = kv.k_page_stride * ctx.kv_element_size;
  job.k_token_stride = kv.k_token_stride * ctx.kv_element_size;
  job.k_head_stride = kv.k_head_stride * ctx.kv_element_size;
  job.v_page_stride = kv.v_page_stride * ctx.kv_element_size;
  job.v_token_stride = kv.v_token_stride * ctx.kv_element_size;
  job.v_head_stride = kv.v_head_stride * ctx.kv_element_size;
  job.k_scale = ScaleOf(kv.k_scale, work.kv_head_begin, &job.k_scale_stride);
  job.v_scale = ScaleOf(kv.v_scale, work.kv_head_begin, &job.v_scale_stride);
  job.page_size = kv.page_size;
  job.first_row = kv.page_indptr[work.kv_list];
  job.pages = kv.page_indices == nullptr ? nullptr : kv.page_indices + job.first_row;
  job.o_rows = s->outputs.data();
  job.is_partial = work.out != kFinalRows;
  job.lse_rows = job.is_partial || args.lse != nullptr ? s->lse_rows.data() : nullptr;
  VariantJob variant{};
  if (args.variant != nullptr) {
    DescribeRows(ctx, work, s);
    const variant::CpuFunctions& hooks = *args.variant->cpu;
    variant = {hooks.logits,
               job.is_partial ? nullptr : hooks.output,
               args.variant->args,
               s->variant_rows.data(),
               group,
               hooks.turn,
               hooks.query,
               hooks.key,
               (hooks.rotary_dim == 0 ? args.head_dim : hooks.rotary_dim) / 2,
               hooks.has_softmax != 0};
    job.variant = &variant;
    if (hooks.logits != nullptr) job.q_scale = args.sm_scale;
  }
  if (job.is_partial) {
    job.o_head_stride = static_cast<int64_t>(work.num_rows) * args.head_dim_vo * sizeof(float);
    job.lse_head_stride = work.num_rows;
  } else {
    job.o_head_stride = group * args.o_head_stride * ctx.element_size;
    job.lse_head_stride = group * args.lse_head_stride;
  }
  for (int32_t r = 0; r < work.num_rows; ++r) {
    const int32_t token = s->tokens[r], head = first_head + s->heads[r];
    s->inputs[r] = ctx.QRow(token, head);
    if (job.is_partial) {
      s->outputs[r] = args.partial_o + static_cast<int64_t>(work.out + r) * args.head_dim_vo;
      s->lse_rows[r] = args.partial_lse + work.out + r;
    } else {
      s->outputs[r] = ctx.ORow(token, head);
      if (args.lse != nullptr) s->lse_rows[r] = ctx.LseRow(token, head);
    }
  }
  ctx.kernels.attend[static_cast<int>(kv.dtype)](job, &s->tile);
}

void RunCta(void* context, int64_t cta, ThreadScratch* scratch) {
  const Context& ctx = *static_cast<const Context*>(context);
  const int32_t* indptr = ctx.plan.work_indptr();
  for (int32_t w = indptr[cta]; w < indptr[cta + 1]; ++w) RunWork(ctx, ctx.plan.works()[w], scratch);
}

// Unit: one of `pieces_per_merge` equal runs of a merge's (head, row) pairs. Each pair is merged on its own, in plan order.
void RunMerge(void* context, int64_t unit, ThreadScratch* s) {
  const Context& ctx = *static_cast<const Context*>(context);
  const AttentionArgs& args = ctx.args;
  const int64_t m = unit / ctx.pieces_per_merge, piece = unit % ctx.pieces_per_merge;
  const tvm_infer::Merge& merge = ctx.plan.merges()[m];
  const int32_t* slots = ctx.plan.merge_slots() + ctx.plan.merge_indptr()[m];
  const int32_t num_states = ctx.plan.merge_indptr()[m + 1] - ctx.plan.merge_indptr()[m];
  const int32_t* order = ctx.plan.token_order();
  const int64_t pairs = static_cast<int64_t>(merge.num_rows) * merge.num_kv_heads;
  s->inputs.resize(static_cast<size_t>(num_states));
  s->lse_values.resize(static_cast<size_t>(num_states));
  const bool has_hook = args.variant != nullptr && args.variant->cpu->output != nullptr;
  variant::Row described{};
  VariantJob variant{};
  if (has_hook) variant.output = args.variant->cpu->output, variant.args = args.variant->args;
  variant.rows = &described;
  variant.group_size = ctx.header.group_size;
  for (int64_t pair = pairs * piece / ctx.pieces_per_merge; pair < pairs * (piece + 1) / ctx.pieces_per_merge; ++pair) {
    for (int32_t i = 0; i < num_states; ++i) {
      const int64_t row = slots[i] + pair;
      s->inputs[i] = args.partial_o + row * args.head_dim_vo;
      s->lse_values[i] = args.partial_lse[row];
    }
    const int32_t row = merge.row_begin + static_cast<int32_t>(pair % merge.num_rows);
    const int32_t slot = row / ctx.header.group_size;
    const int32_t token = order == nullptr ? slot : order[slot];
    const int32_t kv_head = merge.kv_head_begin + static_cast<int32_t>(pair / merge.num_rows);
    const int32_t head = kv_head * ctx.header.group_size + row % ctx.header.group_size;
    if (has_hook) described = DescribeRow(ctx, token, RequestOf(ctx, token), head);
    MergeRowJob job{num_states,
                    args.head_dim_vo,
                    s->inputs.data(),
                    s->lse_values.data(),
                    ctx.ORow(token, head),
                    args.lse == nullptr ? nullptr : ctx.LseRow(token, head),
                    has_hook ? &variant : nullptr,
                    args.variant == nullptr || args.variant->cpu->has_softmax != 0};
    ctx.kernels.merge_partials[static_cast<int>(args.dtype)](job);
  }
}

void CheckArgs(const AttentionArgs& args, const PlanHeader& header, int num_threads) {
  if (args.head_dim < 8 || args.head_dim > 256 || args.head_dim % 8 != 0) {
    TVM_INFER_THROW(ArgumentError) << "head_dim is " << args.head_dim
                                   << ", but the CPU executor takes multiples of 8 from 8 to 256. Pad q, k and v.";
  }
  if (args.head_dim_vo < 8 || args.head_dim_vo > args.head_dim || args.head_dim_vo % 8 != 0) {
    TVM_INFER_THROW(ArgumentError) << "head_dim_vo is " << args.head_dim_vo
                                   << ", but the CPU executor takes multiples of 8 from 8 to head_dim, " << args.head_dim << ". Pad v.";
  }
  if (header.magic != kPlanMagic || header.version != kPlanVersion) {
    TVM_INFER_THROW(PlanMismatchError) << "plan is not a plan of version " << kPlanVersion << " (magic " << header.magic << ", version "
                                       << header.version << "). Make it with this build's planner.";
  }
  if (args.num_kv_heads != header.num_kv_heads || args.num_qo_heads != header.num_kv_heads * header.group_size) {
    TVM_INFER_THROW(PlanMismatchError) << "num_qo_heads, num_kv_heads are " << args.num_qo_heads << ", " << args.num_kv_heads
                                       << ", but the plan was made for " << header.num_kv_heads * header.group_size << ", "
                                       << header.num_kv_heads << ". Plan again with these heads.";
  }
  if ((header.num_sink > 0 || header.chunk > 0) && (args.variant == nullptr || args.variant->cpu->logits == nullptr)) {
    TVM_INFER_THROW(PlanMismatchError) << "the plan was made for " << header.num_sink << " sinks and chunks of " << header.chunk
                                       << ", which only the mask of a variant tests row by row, and the call has none. Pass the variant "
                                          "that it was planned for, or plan without sinks and chunks.";
  }
  if (header.num_shared_works > 0 && args.variant != nullptr && !args.variant->takes_shared_keys) {
    TVM_INFER_THROW(PlanMismatchError) << "the plan has " << header.num_shared_works
                                       << " works with rows of several requests, and the call a variant that takes all rows of a work for "
                                          "one request's. Plan without levels.";
  }
  if (header.num_kv_lists != header.num_requests && args.variant != nullptr) {
    TVM_INFER_THROW(PlanMismatchError) << "the plan has a list of keys for each KV head, where positions say nothing of a request, and the "
                                          "call a variant, which is told positions. Plan with one kv_len for each request.";
  }
  if (num_threads > kMaxThreads) {
    TVM_INFER_THROW(ArgumentError) << "num_threads is " << num_threads << ", but must be at most " << kMaxThreads << ".";
  }
}

}  // namespace

void Attention(const AttentionArgs& args, int num_threads) {
  const PlanView plan(args.plan);
  const PlanHeader& header = *plan.header;
  CheckArgs(args, header, num_threads);
  if (num_threads <= 0) num_threads = DefaultNumThreads();
  if (header.total_cost > 0 && header.total_cost < kSerialCost) num_threads = 1;
  // Enough pieces to occupy every thread where there are few merges.
  const int64_t pieces = header.num_merges == 0 ? 1 : (2 * num_threads + header.num_merges - 1) / header.num_merges;
  Context ctx{args, ChosenKernels(), plan, header, ElementBits(args.dtype) / 8, ElementBits(args.kv.dtype) / 8, pieces};
  ThreadPool& pool = ThreadPool::Get();
  pool.Run(num_threads, header.num_ctas, RunCta, &ctx);
  pool.Run(num_threads, header.num_merges * pieces, RunMerge, &ctx);
}

}  // namespace tvm_infer::cpu
