// Reads device memory as fast as plain loads can: the ceiling that benchmarks quote.
#pragma once

#include <cstdint>

namespace tvm_infer::cuda {

// Adds the sum of the words of data[bytes] to *sum, modulo 2^32. `data` is 16-byte aligned, `bytes` a multiple of 16.
void LaunchReadCeiling(int32_t device_id, void* stream, const void* data, int64_t bytes, uint32_t* sum);

}  // namespace tvm_infer::cuda
