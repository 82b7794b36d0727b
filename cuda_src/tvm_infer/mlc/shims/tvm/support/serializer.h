// Stands in for a header of TVM that its wheel does not carry; see io.h beside it. All that tvm/runtime/tensor.h takes from it is tvm-ffi's
// byte order.
#pragma once

#include <tvm/ffi/endian.h>
