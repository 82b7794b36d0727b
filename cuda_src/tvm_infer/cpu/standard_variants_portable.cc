// The standard variants for any machine.
#define TVM_INFER_ISA portable
#include "tvm_infer/cpu/standard_variants.h"
