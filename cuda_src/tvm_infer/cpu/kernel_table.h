// The table of one instruction set; included by each kernels_*.cc after its vec_*.h.
#pragma once

#include "tvm_infer/cpu/kernels.h"
#include "tvm_infer/cpu/merge_rows.h"
#include "tvm_infer/cpu/page_rows.h"
#include "tvm_infer/cpu/quantise_row.h"
#include "tvm_infer/cpu/tile_attend.h"
#include "tvm_infer/cpu/turn_row.h"

namespace tvm_infer::cpu::TVM_INFER_ISA {

extern const StandardVariants kStandardVariants;  // standard_variants_*.cc

inline constexpr KernelTable MakeTable(const char* name) {
  return {name,
          {Attend<float>, Attend<Half>, Attend<BFloat>, Attend<Float8E4M3>, Attend<Float8E5M2>},
          {MergeRow<float, float>, MergeRow<float, Half>, MergeRow<float, BFloat>},
          {MergeRow<float, float>, MergeRow<Half, Half>, MergeRow<BFloat, BFloat>},
          {TurnRow<float, float>, TurnRow<Half, Half>, TurnRow<BFloat, BFloat>},
          {TurnRow<float, float>, TurnRow<Half, float>, TurnRow<BFloat, float>},
          {{QuantiseRow<float, Float8E4M3>, QuantiseRow<float, Float8E5M2>},
           {QuantiseRow<Half, Float8E4M3>, QuantiseRow<Half, Float8E5M2>},
           {QuantiseRow<BFloat, Float8E4M3>, QuantiseRow<BFloat, Float8E5M2>}},
          {{BoundPage<float, float>, BoundPage<float, Half>, BoundPage<float, BFloat>},
           {BoundPage<Half, float>, BoundPage<Half, Half>, BoundPage<Half, BFloat>},
           {BoundPage<BFloat, float>, BoundPage<BFloat, Half>, BoundPage<BFloat, BFloat>},
           {BoundPage<Float8E4M3, float>, BoundPage<Float8E4M3, Half>, BoundPage<Float8E4M3, BFloat>},
           {BoundPage<Float8E5M2, float>, BoundPage<Float8E5M2, Half>, BoundPage<Float8E5M2, BFloat>}},
          {SplitQuery<float>, SplitQuery<Half>, SplitQuery<BFloat>},
          {ScorePage<float>, ScorePage<Half>, ScorePage<BFloat>},
          &kStandardVariants};
}

}  // namespace tvm_infer::cpu::TVM_INFER_ISA
