// What the instruction sets implement, and what the executor hands them: plain structs, so that no inline function compiled for
// AVX-512 can be picked by the linker for a machine that lacks it. Everything behind this header lives in a namespace of its own
// instruction set. (Of variant/ the structs are used; its inline functions are inlined wherever they are called, and its templates
// are instantiated with structs of such a namespace only.)
#pragma once

#include <cstddef>
#include <cstdint>

#include "tvm_infer/variant/cpu_functions.h"

namespace tvm_infer::cpu {

// 16-bit floats as stored; the instruction sets convert.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};
// 8-bit floats: 1 sign, 4 or 5 exponent, 3 or 2 mantissa bits. E4M3 has no infinity, and one NaN of each sign (its "fn" form).
struct Float8E4M3 {
  uint8_t bits;
  static constexpr int kMantissaBits = 3, kBias = 7;
  static constexpr float kMax = 448;
};
struct Float8E5M2 {
  uint8_t bits;
  static constexpr int kMantissaBits = 2, kBias = 15;
  static constexpr float kMax = 57344;
};

// A variant's hooks (variant/cpu_functions.h) for the rows of a work, or for the one row of a merge.
struct VariantJob {
  void (*logits)(const variant::Args& args, const variant::Row& row, int32_t kv_pos, int32_t count, float* scores);  // or nullptr
  void (*output)(const variant::Args& args, const variant::Row& row, float lse, int32_t count, float* o);            // or nullptr
  const variant::Args* args;
  const variant::Row* rows;  // of the first KV head
  int32_t group_size;        // query heads of a KV head
  // Of queries and keys, or nullptr; num_pairs of channels turn.
  decltype(variant::CpuFunctions::turn) turn;
  decltype(variant::CpuFunctions::query) query;
  decltype(variant::CpuFunctions::key) key;
  int32_t num_pairs;
  bool has_softmax;
};

// The rows of one work: the same rows for each of num_kv_heads KV heads. Pointers are those of the first; head h lies h strides on.
// `rows` arrays have num_rows entries. Strides of q, k and v in bytes, of lse in floats.
struct TileJob {
  int32_t q_type;  // DType of queries and of final rows
  int32_t num_rows;
  int32_t num_kv_heads;
  int32_t head_dim;     // of queries and keys
  int32_t head_dim_vo;  // of values and results, at most head_dim
  // Of queries: sm_scale * log2(e), so that scores are in units of log2; sm_scale alone where a variant makes logits of them, which are.
  float q_scale;
  const void* const* q_rows;  // [head_dim] of q_type
  int64_t q_head_stride;
  const int32_t* visible_begin;  // first key each row sees, inclusive, in the list's coordinates
  const int32_t* visible_end;    // last key, exclusive; <= visible_begin for a row that sees none
  int32_t kv_begin, kv_end;      // the union of what the rows see, within the work's range
  // Where elements are scaled: factors of the first KV head's keys and values, and how far on the next head's are (0: one for all).
  const float *k_scale, *v_scale;
  int32_t k_scale_stride, v_scale_stride;
  // pages == nullptr: token j is row `first_row` + j.
  const char* k;
  const char* v;
  int64_t k_page_stride, k_token_stride, k_head_stride, v_page_stride, v_token_stride, v_head_stride;
  int32_t page_size;
  const int32_t* pages;  // of this list
  int64_t first_row;
  // Where the rows go: final rows of q_type, or fp32 partials.
  void* const* o_rows;  // [head_dim_vo]
  int64_t o_head_stride;
  bool is_partial;
  float* const* lse_rows;  // entries, or nullptr for no LSE
  int64_t lse_head_stride;
  const VariantJob* variant;  // or nullptr. Without `output` where is_partial
};

// Grows to what the largest tile needs, then stays. One per thread.
class Scratch {
 public:
  Scratch() = default;
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  // At least `bytes` bytes at a multiple of 64; what they held is lost.
  char* Reserve(size_t bytes);

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

// o, lse of one row from n states: w_i = exp(lse_i - max), o = sum w_i o_i / sum w_i. States with lse -inf are not read.
struct MergeRowJob {
  int32_t num_states;
  int32_t head_dim;
  const void* const* o_in;
  const float* lse_in;  // [num_states]
  void* o;
  float* lse;                 // or nullptr
  const VariantJob* variant;  // whose `output` the merged row passes, or nullptr
  bool has_softmax;           // false: o = sum o_i over the states with lse 0, not -inf
};

// One head turned by its position: the first rotary_dim elements in pairs (2i, 2i + 1) or (i, i + rotary_dim / 2), the others copied.
struct TurnRowJob {
  int32_t head_dim, rotary_dim;
  bool is_interleaved;
  const float *cos, *sin;  // [rotary_dim / 2]
  const void* in;          // [head_dim]
  void* out;               // may be `in`
};

// [head_dim] elements x / scale, rounded to nearest even, saturating; a NaN stays a NaN.
struct QuantiseRowJob {
  int32_t head_dim;
  float scale;
  const void* in;
  void* out;
};

// The least and the greatest element of each channel over a page's keys, elements as they are (no scale). NaN where a key has NaN.
struct PageBoundsJob {
  int32_t head_dim, num_keys;
  const void* keys;        // [num_keys, head_dim]
  int64_t key_stride;      // bytes
  void *least, *greatest;  // [head_dim]
};

inline constexpr int kMaxHeadDim = 256;

// Parts of a query's elements above 0 and below, of which one is 0: q * k <= above * greatest + below * least.
struct SplitQueryJob {
  int32_t head_dim;
  const void* query;     // [head_dim]
  float *above, *below;  // [kMaxHeadDim], 0 behind head_dim
};

// The most that q * k can be for a key within a page's bounds: of several query heads the greatest or the sum; NaN if any is.
struct PageScoreJob {
  int32_t head_dim, num_heads;
  bool is_sum;
  const float* queries;          // [num_heads][2, kMaxHeadDim]: of each SplitQueryJob's above and below
  const void *least, *greatest;  // [head_dim]
};

// A standard variant's hooks, as the library has them compiled.
struct StandardVariant {
  const char* name;  // of the generated struct: variant_<digest>
  variant::CpuFunctions functions;
};
struct StandardVariants {
  const StandardVariant* entries;
  size_t count;
};

inline constexpr int kNumFloats = 3;   // types of queries, outputs and new tokens
inline constexpr int kNumKVTypes = 5;  // of keys and values in memory: these, and the scaled ones
inline constexpr int kNumScaled = kNumKVTypes - kNumFloats;

// Indexed by DType.
struct KernelTable {
  const char* name;
  void (*attend[kNumKVTypes])(const TileJob& job, Scratch* scratch);  // by the type of keys
  void (*merge_partials[kNumFloats])(const MergeRowJob& job);         // fp32 states into a row of the type
  void (*merge_states[kNumFloats])(const MergeRowJob& job);           // states of the type into a row of the type
  void (*turn_row[kNumFloats])(const TurnRowJob& job);
  void (*turn_row_to_float[kNumFloats])(const TurnRowJob& job);  // `out` is float
  void (*quantise_row[kNumFloats][kNumScaled])(const QuantiseRowJob& job);
  void (*page_bounds[kNumKVTypes][kNumFloats])(const PageBoundsJob& job);  // by the types of keys and of bounds
  void (*split_query[kNumFloats])(const SplitQueryJob& job);
  float (*page_score[kNumFloats])(const PageScoreJob& job);  // by the type of bounds
  const StandardVariants* standard_variants;
};

const KernelTable& PortableKernels();
#if defined(__x86_64__) || defined(_M_X64)
#define TVM_INFER_CPU_X86 1
const KernelTable& Avx2Kernels();
const KernelTable& Avx512Kernels();
#endif

// The table chosen for this process (dispatch.cc).
const KernelTable& ChosenKernels();

}  // namespace tvm_infer::cpu
