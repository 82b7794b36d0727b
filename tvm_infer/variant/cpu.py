"""A variant for the CPU executor: its generated source, compiled by the machine's C++ compiler and loaded for good."""

from __future__ import annotations

import ctypes

from ..jit import cxx, headers
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
    """The address of the variant's ``tvm_infer::variant::CpuFunctions``, good until the process ends; compiled where it is not cached.

    Raises
    ------
    MissingDependencyError : no C++ compiler; the message says how to install one. CompileError : it refused; its output.
    """
    digest = variant.digest
    if digest not in _loaded:
        library = ctypes.CDLL(str(cxx.shared_library(describe(variant))))
        address = ctypes.addressof(ctypes.c_char.in_dll(library, f"variant_{digest}_cpu"))
        _loaded[digest] = (library, address)
    return _loaded[digest][1]
