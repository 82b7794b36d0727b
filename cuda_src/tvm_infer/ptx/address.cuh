// Addresses as PTX wants them.
#pragma once

#include <cstdint>

namespace tvm_infer::ptx {

__device__ __forceinline__ uint32_t SharedAddress(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

}  // namespace tvm_infer::ptx
