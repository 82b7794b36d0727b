// What an attention kernel is given besides its plan (cuda/params.h).
#pragma once

#include "tvm_infer/cuda/params.h"

namespace tvm_infer::attention {

using cuda::AttentionParams;
using cuda::KvTensorMaps;

}  // namespace tvm_infer::attention
