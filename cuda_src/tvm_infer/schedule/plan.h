// The Plan: who computes which query rows against which keys, and which partial results are merged.
//
// One contiguous block of int32 words: a PlanHeader, then arrays. The first array stands at a fixed place, so that a CTA of a kernel finds
// its first work by one load; the header points at the others. A plan is made once per step from lengths alone and
// shared by every layer. The header is read by the executor (on the device, for CUDA), so that a plan is refreshed by one copy of
// `bytes_used` bytes into the same buffer: no kernel argument changes, and a captured graph can be replayed with the new plan.
//
// Terms
//   group_size   query heads that share one KV head (num_qo_heads / num_kv_heads)
//   packed row   token * group_size + query head within the group: the rows one KV head serves
//   row index    the plan's own order of packed rows; row r is token_order[r / group_size], head r % group_size. Without an order
//                (token_order_offset == 0) slot and token are the same number.
//   KV list      keys in order: a request's pages, or a ragged range. Lists 0 … num_requests - 1 are the requests'; or, where each KV head
//                of a request has keys of its own, list r * num_kv_heads + h is that of head h of request r, and positions are those in
//                the list: such a plan has num_kv_lists == num_requests * num_kv_heads, and works of one head.
//   shared work  rows of several requests, whose lists begin with the same keys, against these keys: they are read once for all. The row
//                index has such requests side by side (shared_runs.h).
//   position     of a token in its request, from 0. Query token t of request r stands at kv_len[r] - (qo_indptr[r + 1] - t).
#pragma once

#include <cstdint>

namespace tvm_infer {

inline constexpr int32_t kPlanMagic = 0x4e4c5054;  // "TPLN"
inline constexpr int32_t kPlanVersion = 4;
inline constexpr int32_t kFinalRows = -1;  // Work::out of a work that writes final rows
inline constexpr int32_t kNoMerge = -1;    // Work::merge of the same
inline constexpr int32_t kUnbounded = -1;  // left, right

// What executors test of every row and key: key at position j is visible to the query at position p when p - left <= j <= p + right.
// Causal is right = 0.
struct Band {
  int32_t left;   // keys before the query's own position; kUnbounded for all
  int32_t right;  // keys after it; kUnbounded for all
};

// What a plan is made for: key j is visible to the query at p when j <= p + right, and j < num_sink, or p - left <= j and both positions
// are in one chunk (p / chunk == j / chunk). Of sinks and chunks executors know nothing: the plan leaves out what no row of a tile sees,
// and for the rest a variant's mask tests each row.
struct MaskBand {
  int32_t left = kUnbounded;
  int32_t right = kUnbounded;
  int32_t num_sink = 0;  // first keys, which are visible whatever left and chunk say; 0: none
  int32_t chunk = 0;     // positions a chunk; 0: no chunks

  bool has_begin() const { return left != kUnbounded || chunk > 0; }
  bool has_end() const { return right != kUnbounded || chunk > 0; }
  // Whether requests with the same first keys see them alike.
  bool IsSharable() const { return !has_begin() && num_sink == 0; }
  // The part that executors can test; it hides no visible key.
  Band Tested() const { return {num_sink > 0 ? kUnbounded : left, right}; }
  bool operator==(const MaskBand& b) const { return left == b.left && right == b.right && num_sink == b.num_sink && chunk == b.chunk; }
};

// One kernel shape, and what it costs there. A work of `rows` rows and `kv` keys costs fixed + row * rows + kv_cost * kv for each of
// its KV heads, kv rounded up to a multiple of kv_granule: a tile of keys is computed whole. Picoseconds on one CTA, measured, integers:
// C++ and Python planners agree to the last bit.
struct TileClass {
  int32_t rows;        // packed rows that one work of this class holds, at most
  int32_t kv_granule;  // keys of a tile; KV is cut at multiples of this many keys (counted from the list's first key)
  int64_t fixed;       // per work and KV head
  int64_t row;         // per packed row
  int64_t kv;          // per key, whatever the number of rows
};

// A run of KV heads does identical work, so it is one Work, executed head after head by its CTA.
struct Work {
  int32_t row_begin;      // first packed row, inclusive
  int32_t num_rows;       // > 0, <= TileClass::rows
  int32_t kv_head_begin;  // first KV head, inclusive
  int32_t num_kv_heads;   // > 0
  int32_t kv_list;        // which KV list; of a shared work that of one of its requests. Key j of a list stands at position j
  int32_t kv_begin;       // first key, inclusive, in the list's coordinates (tokens)
  int32_t kv_end;         // last key, exclusive; == kv_begin for rows that see nothing (O = 0, LSE = -inf)
  int32_t merge_tiles;    // 0, but for works of shared prefixes: how many Merges the work is part of for each KV head (merge, below)
  int32_t qo_pos_base;  // position of row_begin's token, where all rows are of one request; of a shared work kv_end, behind which all stand
  int32_t tile_class;   // index into the tile table the plan was made with
  int32_t out;          // kFinalRows, or the first of num_rows * num_kv_heads partial rows: head h, row r at out + h * num_rows + r
  // kNoMerge, or which Merge this partial belongs to, of the same rows and heads. With merge_tiles > 0 there are several, each of one KV
  // head and of the rows of one tile, which lie within this work's: merge + j * PlanHeader::num_kv_heads + i for head i < num_kv_heads and
  // tile j < merge_tiles.
  int32_t merge;
};
static_assert(sizeof(Work) == 48, "kernels load a Work as three 16-byte words");

// Rows whose KV was split. Its partials are merge_slots[merge_indptr[m] … merge_indptr[m + 1]), each the first partial row of these rows
// and heads in a Work's (head h, row r at slot + h * num_rows + r), in ascending kv_begin: merging in this order makes the result depend
// on lengths only.
struct Merge {
  int32_t row_begin;
  int32_t num_rows;
  int32_t kv_head_begin;
  int32_t num_kv_heads;
};

struct PlanHeader {
  int32_t magic;    // kPlanMagic
  int32_t version;  // kPlanVersion
  // Digest of what a captured graph bakes in: tile table, CTA count, head counts, mask band, split size (CaptureKey() in planner.h).
  // Two words of one uint64.
  uint32_t capture_key[2];
  int32_t bytes_used;  // header and arrays; multiple of 16
  int32_t num_ctas;
  int32_t num_requests;
  int32_t num_tokens;  // query tokens; packed rows are num_tokens * group_size for each KV head
  int32_t num_kv_heads;
  int32_t group_size;
  int32_t num_kv_lists;
  int32_t num_works;
  int32_t num_merges;
  int32_t num_merge_slots;
  int32_t num_partial_rows;  // rows of the fp32 partial buffers (O: [num_partial_rows, head_dim], LSE: [num_partial_rows])
  int32_t num_shared_works;  // works with rows of several requests: not every variant runs with such
  Band band;                 // MaskBand::Tested()
  int32_t num_tile_classes;
  // Offsets from the header, in bytes, multiples of 16. 0: the array is absent.
  int32_t works_offset;         // Work[num_works], those of one CTA together
  int32_t work_indptr_offset;   // int32[num_ctas + 1]: CTA c executes works [work_indptr[c], work_indptr[c + 1]) in order
  int32_t merges_offset;        // Merge[num_merges]
  int32_t merge_indptr_offset;  // int32[num_merges + 1]
  int32_t merge_slots_offset;   // int32[num_merge_slots]
  int32_t qo_indptr_offset;     // int32[num_requests + 1]
  int32_t kv_len_offset;        // int32[num_kv_lists], keys in each list
  int64_t makespan;             // predicted load of the busiest CTA, picoseconds
  int64_t total_cost;           // predicted load of all CTAs together, picoseconds
  int64_t flat_cost;            // the same, if no key were shared and none cut; 0 in a plan that shares none
  int32_t tile_classes_offset;  // TileClass[num_tile_classes] that the plan was made with: a plan explains its own loads
  int32_t token_order_offset;   // int32[num_tokens], absent when it would be the identity
  int32_t tickets_offset;       // int32[kNumTickets + num_merges], all 0: words for executors on a device (PlanTicket)
  // CTAs with works, if the plan is bound by bandwidth alone: every work is of class 0, where the table has others. Such CTAs get unequal
  // shares of the bandwidth, and an executor may let them keep pace with each other (attention/pace.cuh). 0: no pacing.
  int32_t paced_ctas;
  // The MaskBand, whose right is band.right. With sinks or chunks the plan runs with a variant whose mask tests them.
  int32_t window_left;
  int32_t num_sink;
  int32_t chunk;
  int32_t num_levels;  // shared runs of keys that a row has, at most
};
static_assert(sizeof(PlanHeader) % 16 == 0, "arrays start on 16-byte boundaries");
// Right behind the header: Work first_works[num_ctas], a copy of each CTA's first work; num_rows == 0 for a CTA without any.

// Words of tickets. A launch leaves all but the first at 0, so that the next finds them so.
enum PlanTicket : int32_t {
  kRefusalTicket = 0,     // why a kernel refused the plan (PlanRefusal)
  kTilesAskedTicket = 1,  // of a paced plan: tiles of keys that all CTAs have asked for
  kCtasDoneTicket = 2,    // of a paced plan: CTAs that ask for no more
  kNumTickets = 3,        // + m: of merge m, which partials have arrived and who waits (kernels/arrivals.cuh)
};

// What a kernel found wrong with a plan that it was launched with; it wrote nothing then. (A captured graph is replayed with plans that
// no host code has seen.)
enum PlanRefusal : int32_t {
  kPlanAccepted = 0,
  kNotAPlan = 1,             // magic or version
  kOtherHeads = 2,           // num_kv_heads or group_size are not the tensors'
  kTooManyCtas = 3,          // more CTAs than were launched
  kTooManyTokens = 4,        // more query tokens than q has rows
  kTooManyPartials = 5,      // more partial rows than the workspace holds
  kTooManyLists = 6,         // more KV lists than the page table has
  kOtherCaptureKey = 7,      // not the capture key that the launch was captured with
  kSharedWithVariant = 8,    // shared works in a launch with a variant that does not take them
  kHeadListsRefused = 9,     // a list of keys for each KV head, in a launch with a variant or behind an append
  kMaskWithoutVariant = 10,  // sinks or chunks in a launch without a variant
  kTooManyPages = 11,        // of select_pages: a request has more pages than its table, or than scores have room for; its lists are empty
  kOtherLists = 12,          // of select_pages: the plan is not for as many lists, or not that of full ones
};

// Read access to a plan in memory; works on the host and in device code.
#if defined(__CUDACC__)
#define TVM_INFER_HD __host__ __device__
#else
#define TVM_INFER_HD
#endif
struct PlanView {
  const PlanHeader* header;

  TVM_INFER_HD explicit PlanView(const void* data) : header(static_cast<const PlanHeader*>(data)) {}
  template <typename T>
  TVM_INFER_HD const T* At(int32_t offset) const {
    return offset == 0 ? nullptr : reinterpret_cast<const T*>(reinterpret_cast<const char*>(header) + offset);
  }
  TVM_INFER_HD const Work* first_works() const { return reinterpret_cast<const Work*>(header + 1); }
  TVM_INFER_HD const Work* works() const { return At<Work>(header->works_offset); }
  TVM_INFER_HD const int32_t* work_indptr() const { return At<int32_t>(header->work_indptr_offset); }
  TVM_INFER_HD const Merge* merges() const { return At<Merge>(header->merges_offset); }
  TVM_INFER_HD const int32_t* merge_indptr() const { return At<int32_t>(header->merge_indptr_offset); }
  TVM_INFER_HD const int32_t* merge_slots() const { return At<int32_t>(header->merge_slots_offset); }
  TVM_INFER_HD const int32_t* qo_indptr() const { return At<int32_t>(header->qo_indptr_offset); }
  TVM_INFER_HD const int32_t* kv_len() const { return At<int32_t>(header->kv_len_offset); }
  TVM_INFER_HD const int32_t* token_order() const { return At<int32_t>(header->token_order_offset); }
  TVM_INFER_HD int32_t* tickets() const { return const_cast<int32_t*>(At<int32_t>(header->tickets_offset)); }
  TVM_INFER_HD const TileClass* tile_classes() const { return At<TileClass>(header->tile_classes_offset); }
};

}  // namespace tvm_infer
