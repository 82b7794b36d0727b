"""A variant for the CPU executor: as the library has it, or its generated source, compiled by the machine's C++ compiler: loaded for
good, or as an object for exported models."""

from __future__ import annotations

import ctypes
import pathlib
import platform
from collections.abc import Iterable

from ..errors import MissingDependencyError
from ..jit import cxx, headers
from . import prebuilt
from .variant import Variant

# No -ffast-math: hidden keys are -inf.
_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math")
_NAMESPACE = "tvm_infer::variant"
# Instruction set of the executor -> what its code is compiled with, as cmake/CMakeLists.txt has it.
_PORTABLE: dict[str, tuple[str, ...]] = {"portable": ()}
_X86: dict[str, tuple[str, ...]] = {
    **_PORTABLE,
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ),
}
_loaded: dict[str, tuple[ctypes.CDLL, int]] = {}  # digest -> library, address; a library in use must not be closed


def describe(variant: Variant) -> cxx.Library:
    """What the variant's library is built from."""
    return _library(f"variant_{variant.digest}", variant.cpu_source(), cxx.NATIVE)


def _library(name: str, source: str, *flags: str) -> cxx.Library:
    folder = headers.include_dir()
    return cxx.Library(
        name=name,
        sources=headers.reached(source, folder),
        foreign={},
        defines={},
        include_dirs=[folder],
        library_dirs=[],
        libraries=[],
        flags=(*_FLAGS, *flags),
        generated=source,
    )


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """Of the CPU executor on this kind of machine, and the compiler's flags for each."""
    return _X86 if platform.machine() in ("x86_64", "AMD64") else _PORTABLE


def embedded_name(digest: str, isa: str) -> str:
    """The symbol of a variant's ``CpuFunctions`` in :func:`embedded_object`."""
    return f"tvm_infer_variant_{digest}_{isa}"


def embedded_object(variants: Iterable[Variant], isa: str) -> pathlib.Path:
    """An object with the hooks of variants for one instruction set of the executor, from the cache or compiled; for exported models.

    variants : of different digests. isa : of :func:`instruction_sets`. Raises as :func:`compiled`.
    """
    variants = sorted(variants, key=lambda variant: variant.digest)
    structs = "".join(variant.source() for variant in variants)
    # Structs of this instruction set's own, and so all that is instantiated of them: see cuda_src/tvm_infer/cpu/kernels.h.
    text = [f'#include "tvm_infer/variant/cpu_functions.h"\n\nnamespace {_NAMESPACE}::{isa} {{\n{structs}}}\n']
    text += [
        f'extern "C" const {_NAMESPACE}::CpuFunctions {embedded_name(variant.digest, isa)} =\n'
        f"    {_NAMESPACE}::FunctionsOf<{_NAMESPACE}::{isa}::variant_{variant.digest}>();\n"
        for variant in variants
    ]
    return cxx.object_file(_library(f"variants_{isa}", "".join(text), *instruction_sets()[isa]))


def cpu_functions(variant: Variant) -> int:
    """The address of the variant's ``tvm_infer::variant::CpuFunctions``, good until the process ends: the library's own where the
    generated code is that of a standard variant, else compiled.

    Raises
    ------
    As :func:`compiled` does, for variants that are not standard.
    """
    return prebuilt.address(variant) or compiled(variant)


def compiled(variant: Variant) -> int:
    """The same for any variant, by the C++ compiler; once, then from the cache.

    Raises
    ------
    MissingDependencyError : no C++ compiler; the message says how to install one. CompileError : it refused; its output.
    """
    digest = variant.digest
    if digest not in _loaded:
        try:
            library = ctypes.CDLL(str(cxx.shared_library(describe(variant))))
        except MissingDependencyError as error:
            raise MissingDependencyError(
                f"variant {variant.name} is not one that the library has for the CPU (tvm_infer.variant.STANDARD, with any band) and "
                f"must be compiled: {error}"
            ) from error
        address = ctypes.addressof(ctypes.c_char.in_dll(library, f"variant_{digest}_cpu"))
        _loaded[digest] = (library, address)
    return _loaded[digest][1]
