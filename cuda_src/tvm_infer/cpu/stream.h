// The read ceiling that decode attention is measured against.
#pragma once

#include <cstdint>

namespace tvm_infer::cpu {

// Reads `bytes` (a multiple of 64) with `num_threads` threads, each its own contiguous part, and returns a checksum.
uint64_t StreamRead(const void* data, int64_t bytes, int num_threads);

}  // namespace tvm_infer::cpu
