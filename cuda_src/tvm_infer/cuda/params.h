// What launches hand to kernels: plain structs that host and device code share.
#pragma once

#include <cstdint>

#include "tvm_infer/schedule/page_budget.h"

namespace tvm_infer::cuda {

// A CUtensorMap, opaque, so that neither side needs a driver header. Passed by value as a __grid_constant__ parameter.
struct alignas(64) TensorMap {
  uint8_t bytes[128];
};

// Rows of keys and values are copied by panels of this many bytes, the span of the swizzle that they get in shared memory
// (tile/swizzle.cuh). 8-bit rows of 64 and 192 bytes would leave half of a panel of 128 empty.
constexpr int KvPanelBytes(int head_dim, int element_bytes) { return element_bytes == 1 && head_dim % 128 == 64 ? 64 : 128; }

// What a kernel says of itself: every kernel NAME has a device constant NAME_info of this type in its cubin.
struct KernelInfo {
  int32_t abi;           // kKernelAbi of the sources it was compiled from
  int32_t threads;       // in a CTA
  int32_t shared_bytes;  // dynamic shared memory
  int32_t ctas_per_sm;   // of a persistent kernel; 0: the grid follows the problem
  int32_t tile_keys;     // keys of a tile, of an attention kernel: what a copy of ragged keys brings
};
inline constexpr int32_t kKernelAbi = 9;  // bumped when a struct of this file or the Plan changes

// What a plan may have that not every launch can execute.
enum PlanFeature : int32_t {
  kHeadLists = 1,    // a list of keys for each KV head: positions are those in the list, which tell appends and variants nothing
  kSharedWorks = 2,  // works with rows of several requests: a variant takes all rows of a work for one request's
  kRowMasks = 4,     // sinks or chunks, which a variant's mask tests of each row
};

// What the host knows of a plan that lies on the device; a kernel refuses one that is anything else (PlanRefusal in schedule/plan.h).
struct ExpectedPlan {
  int32_t num_kv_heads;
  int32_t group_size;
  int32_t max_tokens;        // rows of q
  int32_t max_partial_rows;  // of the workspace
  int32_t max_kv_lists;      // of the page table
  uint32_t capture_key[2];   // 0, 0: any
  int32_t features;          // PlanFeature bits: what it may have
};

struct AttentionParams {
  void* plan;                      // PlanHeader and its arrays, device memory; its tickets are written
  const int32_t* kv_indptr;        // [num_kv_lists + 1]. Paged: entries of kv_page_indices. Ragged: rows of k and v
  const int32_t* kv_page_indices;  // pages of each list in order; null for ragged keys
  const void* q;                   // [num_tokens, num_qo_heads, head_dim], head_dim contiguous
  int64_t q_stride_token;          // elements, as all strides here
  int64_t q_stride_head;
  void* o;  // [num_tokens, num_qo_heads, head_dim_vo], the same
  int64_t o_stride_token;
  int64_t o_stride_head;
  float* lse;          // [num_tokens, num_qo_heads] contiguous, natural logarithm; may be null
  float* partial_o;    // [max_partial_rows, head_dim_vo]
  float* partial_lse;  // [max_partial_rows], natural logarithm
  // For kernels that gather by token (pages of fewer than 8 tokens); the others use the tensor maps. Each spans less than 64 GiB, as do q
  // and o.
  const void* k;
  const void* v;
  int64_t k_stride_page;
  int64_t k_stride_head;
  int64_t k_stride_token;
  int64_t v_stride_page;
  int64_t v_stride_head;
  int64_t v_stride_token;
  // Of 8-bit keys and values, value = element * scale; where they have no scale these are null and 1.
  const float* k_scales;  // [num_kv_heads], device; null: k_scale, v_scale of all heads
  const float* v_scales;
  float k_scale, v_scale;
  ExpectedPlan expected;
  float sm_scale_log2;  // sm_scale * log2(e), > 0
  float sm_scale;
  int32_t plan_is_ready;  // no kernel under way writes the plan or the page table: they are read before the kernel ahead has ended
};

// Views of K and of V for the copy engine, five axes, innermost first: 64 elements, token in page, panel of 64 elements, KV head, page.
// Any strides will do (HND or NHD, K and V in one tensor or two). Ragged keys are one page of all rows, KernelInfo::tile_keys a box.
// Panels are 128 bytes: of 8-bit elements 128, or 64 where these are all of a row (KvPanelBytes). A head_dim that is no multiple of a panel
// is one axis of so many elements, and that of panels has one entry.
struct KvTensorMaps {
  TensorMap
      k_pages;  // box: one page of one head (64, page_size, head_dim / 64, 1, 1), of a head that ends in a panel (64, page_size, 1, 1, 1)
  TensorMap v_pages;   // the same of V
  TensorMap k_panels;  // box: one panel of a page (64, page_size, 1, 1, 1); ragged: unused
};

// New tokens' K and V to the end of their requests (kernels/append.cuh). Token t of request r goes to position
// kv_len[r] - (qo_indptr[r + 1] - t); lengths are the plan's where there is one.
struct AppendParams {
  const void* plan;          // null: qo_indptr, kv_len and num_requests below
  const int32_t* qo_indptr;  // [num_requests + 1], device
  const int32_t* kv_len;     // [num_requests], device
  int32_t num_requests;
  int32_t max_tokens;  // rows of k and v; tokens behind qo_indptr[num_requests] are padding and go nowhere
  const int32_t* kv_page_indptr;
  const int32_t* kv_page_indices;
  const void* k;  // [max_tokens, num_kv_heads, head_dim], head_dim contiguous
  const void* v;  // the same, head_dim_vo wide: head_dim, but for kernels of two widths (append_b16_h192_v128)
  int64_t k_stride_token;
  int64_t k_stride_head;
  int64_t v_stride_token;
  int64_t v_stride_head;
  void* k_cache;  // by page, head, token in page
  void* v_cache;
  int64_t k_cache_stride_page;
  int64_t k_cache_stride_head;
  int64_t k_cache_stride_token;
  int64_t v_cache_stride_page;
  int64_t v_cache_stride_head;
  int64_t v_cache_stride_token;
  // Of a cache of 8-bit elements, which get x / scale, rounded to nearest even, saturating; else unused.
  const float* k_scales;  // [num_kv_heads], device; null: k_scale, v_scale of all heads
  const float* v_scales;
  float k_scale, v_scale;
  // Rows of tokens that are padding are set to 0, since attention leaves them alone. Null: no output is known.
  void* o;  // [max_tokens, num_qo_heads, head_dim_vo], head_dim_vo contiguous
  int64_t o_stride_token;
  int64_t o_stride_head;
  int32_t num_qo_heads;
  ExpectedPlan expected;  // where there is a plan
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t page_size;
  int32_t plan_is_ready;  // as in AttentionParams; of a rotation inv_freq, too
};

// New tokens' Q and K rotated by their positions, Q to q_out, K and V to their pages (kernels/rope_append.cuh).
struct RopeAppendParams {
  // k before its rotation, num_qo_heads always. Tokens behind qo_indptr[num_requests] get zeros in q_out, and in o where there is one.
  AppendParams append;
  const void* q;  // [max_tokens, num_qo_heads, head_dim], head_dim contiguous
  void* q_out;    // as q
  int64_t q_stride_token;
  int64_t q_stride_head;
  int64_t q_out_stride_token;
  int64_t q_out_stride_head;
  const float* inv_freq;   // [rotary_dim / 2], radians a token
  float magnitude;         // factor on cosine and sine
  int32_t rotary_dim;      // elements of a head that turn, the first ones; a multiple of 16
  int32_t is_interleaved;  // pairs are (2i, 2i + 1) rather than (i, i + rotary_dim / 2)
};

// Bounds of pages: of each page and KV head the least and the greatest element of each channel of its keys. Elements of 16 bits; rows start
// on 16-byte boundaries.
struct PageBounds {
  void* data;           // [num_pages, 2 (least, greatest), num_kv_heads, head_dim], head_dim contiguous
  int64_t stride_page;  // elements
  int64_t stride_side;  // from least to greatest
  int64_t stride_head;
};

// Bounds of the pages that hold new tokens, from all their keys (kernels/page_bounds.cuh).
struct PageBoundsParams {
  AppendParams append;  // whose lengths, page table, k_cache and shape are looked at
  PageBounds bounds;
};

// What the logits of a page's keys can be, at most (kernels/page_scores.cuh). One query token a request.
struct PageScoresParams {
  const void* q;  // [num_requests, num_kv_heads * group_size, head_dim], head_dim contiguous
  int64_t q_stride_token;
  int64_t q_stride_head;
  PageBounds bounds;
  const int32_t* kv_len;           // [num_requests]
  const int32_t* kv_page_indptr;   // [num_requests + 1]
  const int32_t* kv_page_indices;  // pages of each request in order
  float* scores;                   // [num_requests, num_kv_heads, max_pages]; entries behind a request's pages are left alone
  int64_t scores_stride_request;
  int64_t scores_stride_head;
  int32_t num_requests;
  int32_t num_kv_heads;
  int32_t group_size;
  int32_t head_dim;
  int32_t page_size;
  int32_t max_pages;
  int32_t min_pages;      // requests of no more pages are left out
  int32_t is_sum;         // over the query heads of a KV head; 0: the greatest of theirs
  int32_t ctas_per_list;  // that share the pages of a request and KV head
};

inline constexpr int32_t kSelectPagesPlanCtas = 2;  // behind those of the lists, for the plan's works: some hundreds

// Lists of the best pages, and the plan for lists of their lengths (kernels/select_pages.cuh).
struct SelectPagesParams {
  const float* scores;  // as of PageScoresParams
  int64_t scores_stride_request;
  int64_t scores_stride_head;
  const int32_t* kv_len;           // [num_requests]
  const int32_t* kv_page_indptr;   // [num_requests + 1]
  const int32_t* kv_page_indices;  // pages of each request in order
  int32_t* lists;                  // [num_requests, num_kv_heads, budget.num_pages]; entries behind a list are left alone
  const void* planned;             // a plan for full lists; device memory
  void* plan;                      // the same, but for works' ends and kv_len, which are written
  PageBudget budget;
  int32_t num_requests;
  int32_t num_kv_heads;
  int32_t max_pages;
  int64_t plan_bytes;  // of each of the two plans' memory
};

// Pages that sequences stop sharing (kernels/copy_pages.cuh).
struct CopyPagesParams {
  void* pages;            // of layer 0; those of layer l stand l * layer_bytes behind
  const int32_t* copies;  // [num_copies, 3], device: from page, to page, tokens of it (a kv::PageCopy)
  int64_t layer_bytes;
  int64_t page_bytes;  // keys and values of one layer; a multiple of 16
  int32_t num_copies;
  int32_t num_layers;
};

inline constexpr int32_t kMovesPerLaunch = 128;  // 2 KiB of a kernel's 4 KiB of parameters

// Tokens that go from one slot of a page to another, one after the other (kernels/move_tokens.cuh).
struct MoveTokensParams {
  struct Move {
    int32_t src_page, src_slot, dst_page, dst_slot;
  };
  void* pages;          // of layer 0; those of layer l stand l * layer_bytes behind
  int64_t layer_bytes;  // all multiples of 16
  int64_t page_bytes;   // keys and values of one layer
  int64_t plane_bytes;  // of one head's keys or values in a page
  int32_t row_bytes;    // of one token in a plane
  int32_t num_layers;
  int32_t num_planes;  // 2 * KV heads
  int32_t num_moves;
  Move moves[kMovesPerLaunch];  // a kv::TokenMove each
};

// (o, lse) = (o_a, lse_a) (+) (o_b, lse_b), row by row (kernels/merge_states.cuh).
struct MergeStatesParams {
  const void* o_a;  // [num_rows, num_heads, head_dim], head_dim contiguous
  const void* o_b;
  void* o;
  const float* lse_a;  // [num_rows, num_heads]
  const float* lse_b;
  float* lse;  // may be null
  int64_t o_a_stride_row, o_a_stride_head;
  int64_t o_b_stride_row, o_b_stride_head;
  int64_t o_stride_row, o_stride_head;
  int64_t lse_a_stride_row, lse_a_stride_head;
  int64_t lse_b_stride_row, lse_b_stride_head;
  int64_t lse_stride_row, lse_stride_head;
  int32_t num_rows;
  int32_t num_heads;
  int32_t head_dim;
};

// A sum over memory, to see how fast it is read (kernels/read_ceiling.cuh).
struct ReadCeilingParams {
  const void* data;     // 16-byte aligned
  int64_t num_vectors;  // of 16 bytes
  uint32_t* sum;        // the sum of all 32-bit words, modulo 2^32, is added to it
};

// How kernels/gemv.cuh and its launch divide shared memory: a fixed part, the rows of a, and a ring of stages in the rest.
inline constexpr int32_t kGemvMaxRows = 8;     // m: columns of a tensor core's operand
inline constexpr int32_t kGemvGroupRows = 16;  // of the matrix, that a CTA works on at a time
inline constexpr int32_t kGemvSharedBytes = 227 * 1024;
inline constexpr int32_t kGemvFixedSharedBytes = 2 * 8 * kGemvMaxRows * kGemvGroupRows * 4 + 2 * 16 * 8;
inline constexpr int32_t kGemvStageBytes = 16 * 1024;

// out = a @ b.T (+ c) for a few rows (kernels/gemv.cuh). Rows of a and b begin on 16-byte boundaries; strides in elements.
struct GemvParams {
  const void* a;  // [m, k]
  int64_t lda;
  const void* b;  // [n, k]
  int64_t ldb;
  const void* c;  // [m, n] of out's type; null: nothing is added
  int64_t ldc;
  void* out;  // [m, n]
  int64_t ldo;
  int32_t m, n, k;         // k a multiple of 8
  int32_t a_shared_bytes;  // m * k * 2
  int32_t num_stages;      // of the ring
  int32_t out_is_fp32;
  int32_t b_is_constant;  // no work that is under way writes b: it is read before the kernel ahead has ended
};

// An LSE to another base (kernels/scale_lse.cuh).
struct ScaleLseParams {
  float* lse;  // [num_rows, num_heads]
  int64_t stride_row, stride_head;
  int32_t num_rows;
  int32_t num_heads;
  float factor;
};

}  // namespace tvm_infer::cuda
