"""Loads libtvm_infer.so and hands out its packed functions. Everything that crosses into C++ passes here."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import tvm_ffi

from . import errors

LIBRARY_DIR = pathlib.Path(__file__).resolve().parent / "lib"


def _register_errors() -> None:
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, errors.TvmInferError):
            tvm_ffi.register_error(value.__name__, value)


_offered: dict[tuple[str, str], Callable[[], bytes]] = {}


def offer_cubin(name: str, arch: str, get: Callable[[], bytes]) -> None:
    """Have a kernel taken from `get` when it is first missed, instead of being compiled."""
    _offered[(name, arch)] = get


def _jit_cubin(name: str, arch: str) -> bytes:
    """The cubin of a kernel that the CUDA executor misses; offered by a loaded model, or compiled, or taken from the cache."""
    from . import jit

    if (name, arch) in _offered:
        return _offered[(name, arch)]()

    return jit.cubin(name, arch)


def _find_cublas() -> str:
    """Path of the cuBLASLt for products on CUDA devices, or ""."""
    from . import cublas

    return cublas.path_or_empty()


@functools.cache
def library() -> Any:
    """Load the shared library once; its packed functions are global (`tvm_infer.*`) from then on.

    The other way, C++ asks `tvm_infer.jit_cubin(name, arch) -> bytes` for kernels that it misses, and `tvm_infer.find_cublas() -> path`
    at its first matrix product on a CUDA device.
    """
    path = LIBRARY_DIR / "libtvm_infer.so"
    if not path.exists():
        raise errors.MissingDependencyError(
            f"the C++ library {path} is missing: this is a source tree without a build. Install it with `pip install .`, "
            "or build in place with `./tests/build.sh`"
        )
    _register_errors()
    tvm_ffi.register_global_func("tvm_infer.jit_cubin", _jit_cubin, override=True)
    tvm_ffi.register_global_func("tvm_infer.find_cublas", _find_cublas, override=True)
    return tvm_ffi.load_module(str(path))


@functools.cache
def func(name: str) -> Any:
    """The packed function `tvm_infer.<name>`."""
    library()
    return tvm_ffi.get_global_func(f"tvm_infer.{name}")


def static_library() -> pathlib.Path:
    """The relocatable object that compiled models link (symbols `__tvm_ffi_tvm_infer_*` and C functions `tvm_infer_*`)."""
    return LIBRARY_DIR / "tvm_infer_static.o"
