// What an exported model (tvm_infer/runtime/linker.py) carries inside its library beside code: its manifest, kernels, BLAS and
// attention variants. The package's own library and the static object have the empty table of embedded.cc, a weak symbol that the exported
// model's own takes the place of.
#pragma once

#include <cstddef>

namespace tvm_infer {

namespace variant {
struct CpuFunctions;  // variant/cpu_functions.h
}

// Bytes in the library's read-only data, for the life of the process.
struct EmbeddedBytes {
  const char* begin;
  const char* end;
  size_t size() const { return static_cast<size_t>(end - begin); }
};

struct EmbeddedCubin {
  const char* name;  // of the kernel (tvm_infer/jit/names.py)
  const char* arch;  // "sm_90a"
  EmbeddedBytes cubin;
};

// The hooks of an attention variant that is not a standard one, compiled for one instruction set of the CPU executor.
struct EmbeddedVariant {
  const char* isa;     // KernelTable::name
  const char* digest;  // of the generated struct, 16 hexadecimal digits
  const variant::CpuFunctions* functions;
};

struct EmbeddedTable {
  EmbeddedBytes manifest;  // JSON; empty: this is no exported model
  EmbeddedBytes blas;      // a shared library with cblas_sgemm, or empty
  const char* blas_prefix;
  const EmbeddedCubin* cubins;
  size_t num_cubins;
  const EmbeddedVariant* variants;
  size_t num_variants;
};

// runtime/linker.py writes them as 8-byte words.
static_assert(sizeof(EmbeddedCubin) == 4 * 8 && sizeof(EmbeddedVariant) == 3 * 8 && sizeof(EmbeddedTable) == 9 * 8);

}  // namespace tvm_infer

// One C name, because an assembler writes the other definition. Hidden: two models in one process have a table each.
extern "C" __attribute__((visibility("hidden"))) const tvm_infer::EmbeddedTable tvm_infer_embedded;
