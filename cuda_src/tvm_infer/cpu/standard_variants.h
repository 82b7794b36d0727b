// The hooks of the standard variants for one instruction set; included by each standard_variants_*.cc, which the build compiles as
// tvm_infer/variant/cpu.py compiles other variants. Apart from kernels_*.cc: generated code calls Max and Exp2 of tvm_infer::variant, which
// a struct among the vectors' functions of these names would not find.
#pragma once

#include "tvm_infer/cpu/kernels.h"
#include "tvm_infer/variant/cpu_functions.h"

// NOTE: structs of this instruction set's own, so that what is instantiated of them is, too: see kernels.h.
namespace tvm_infer::variant::TVM_INFER_ISA {
#include "tvm_infer/variant/standard.inc"
}  // namespace tvm_infer::variant::TVM_INFER_ISA

namespace tvm_infer::cpu::TVM_INFER_ISA {

#define TVM_INFER_ENTRY(NAME) {#NAME, variant::FunctionsOf<variant::TVM_INFER_ISA::NAME>()},
static constexpr StandardVariant kEntries[] = {TVM_INFER_STANDARD_VARIANTS(TVM_INFER_ENTRY)};
#undef TVM_INFER_ENTRY

extern const StandardVariants kStandardVariants;
constexpr StandardVariants kStandardVariants = {kEntries, sizeof(kEntries) / sizeof(kEntries[0])};

}  // namespace tvm_infer::cpu::TVM_INFER_ISA
