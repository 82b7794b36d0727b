#include "tvm_infer/embedded.h"

// NOTE: alone in its file. A compiler that sees this definition at a use could take the table for empty.
extern "C" __attribute__((weak)) const tvm_infer::EmbeddedTable tvm_infer_embedded{};
