// Packed functions of the matmul: none yet.
#pragma once

#define TVM_INFER_MATMUL_FUNCTIONS(V)
