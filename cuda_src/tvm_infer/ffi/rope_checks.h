// What every binding that rotates checks of a rotation.
#pragma once

#include <cstdint>

#include "tvm_infer/ffi/common.h"

namespace tvm_infer::ffi_api {

// rope.h's arguments of these names. `heads_of`: whose heads have head_dim elements, for messages.
void CheckRotation(const TensorView& inv_freq, int64_t interleaved, double magnitude, int64_t head_dim, const char* heads_of,
                   const Place& place);

}  // namespace tvm_infer::ffi_api
