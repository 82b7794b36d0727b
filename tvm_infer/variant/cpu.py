"""A variant for the CPU executor: as the library has it, or its generated source, compiled by the machine's C++ compiler and loaded
for good."""

from __future__ import annotations

import ctypes

from ..errors import MissingDependencyError
from ..jit import cxx, headers
from . import prebuilt
from .variant import Variant

# No -ffast-math: hidden keys are -inf.
_FLAGS = ("-O3", cxx.NATIVE, "-fno-math-errno", "-fno-trapping-math")
_loaded: dict[str, tuple[ctypes.CDLL, int]] = {}  # digest -> library, address; a library in use must not be closed


def describe(variant: Variant) -> cxx.Library:
    """What the variant's library is built from."""
    folder = headers.include_dir()
    source = variant.cpu_source()
    return cxx.Library(
        name=f"variant_{variant.digest}",
        sources=headers.reached(source, folder),
        foreign={},
        defines={},
        include_dirs=[folder],
        library_dirs=[],
        libraries=[],
        flags=_FLAGS,
        generated=source,
    )


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
