"""`tvm_infer.matmul`, `matmul_add`, `linear`, and the packaged BLAS behind them on the CPU, opened once (on CUDA: cublas.py)."""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import sys
from typing import Any

from . import _array, _device, _ffi, errors

_PACKAGE, PACKAGED_PREFIX = "scipy_openblas32", "scipy_"


def set_blas(path: str | os.PathLike[str] | None = None, prefix: str = "") -> str:
    """Choose the BLAS library that matrix products run on, for this process.

    The library is asked for one thread a call: tvm_infer cuts the work for its own threads. OPENBLAS_CORETYPE, if set, limits what
    kernels OpenBLAS takes.

    Parameters
    ----------
    path : the shared library; None: the OpenBLAS of the package scipy-openblas32 (extra `blas`).
    prefix : of its symbols, "scipy_" for scipy-openblas32; a library without one has cblas_sgemm itself.

    Returns
    -------
    The kernels that OpenBLAS chose for this processor ("SkylakeX", …), or "" for another library.

    Raises
    ------
    MissingDependencyError : no path is given and the package is not installed. ArgumentError : the library cannot be opened, or
    has no such symbols; what was set before stays.
    """
    if path is None:
        path, prefix = packaged_blas(), PACKAGED_PREFIX
    return str(_ffi.func("set_blas")(os.fspath(path), prefix))


def packaged_blas() -> pathlib.Path:
    """The shared library of the package scipy-openblas32; its symbols begin with PACKAGED_PREFIX."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise errors.MissingDependencyError(
            "matmul on the CPU needs a BLAS and the package scipy-openblas32 is not installed: pip install 'tvm_infer[blas]', or name "
            "another library with tvm_infer.set_blas(path, prefix)"
        )
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    folder = pathlib.Path(spec.submodule_search_locations[0]) / "lib"
    return folder / f"libscipy_openblas.{suffix}"


@functools.cache
def _set_default() -> None:
    set_blas()


def ensure_blas() -> None:
    """Open the packaged BLAS unless the process has one already."""
    if not _ffi.func("blas_path")():
        _set_default()


def matmul(a: Any, b: Any, *, transpose_b: bool = False, out: Any = None) -> Any:
    """out = a @ b, or a @ b.T, with float32 sums: on the CPU by a BLAS, on a CUDA device on the current stream.

    On the CPU all are float32. On CUDA a and b are both float16, bfloat16 or float32 (as such, unless TVM_INFER_MATMUL_TF32 is 1), out
    is of that type or float32.

    On a Hopper GPU a kernel of our own computes 1 to 8 rows of 16-bit floats with `transpose_b`, where k is a multiple of 8, rows of a
    and b begin on 16-byte boundaries, a fits shared memory (m * k up to 79232), and n is at least 512 or k at most 8192. A row's
    result does not depend on the number of rows then. All else runs on cuBLASLt; with TVM_INFER_MATMUL_GEMV=0 everything does.

    A CUDA device keeps 32 MiB of workspace for each stream that products run on cuBLASLt on, at most 16; a captured product uses that
    of the stream of the thread's last such product outside captures, so replay its graph in order with that stream.

    Parameters
    ----------
    a : [..., m, k], rank >= 2; leading dimensions count as rows. Any row stride; the last dimension is contiguous.
    b : [k, n], or [n, k] with `transpose_b` (the layout of a torch Linear weight).
    out : [..., m, n], overwritten; allocated if None, of the kind, type and device of `a`.

    Raises
    ------
    ArgumentError : shapes that do not fit, strided last dimension, tensors on several devices. DTypeError : other types (on the CPU
    16-bit floats: cast first). MissingDependencyError : no BLAS is installed (extra `blas`), no cuBLASLt (extra `cuda`).
    On cuBLASLt WorkspaceError : captured before a first product, or too many streams. On our kernel ExecutorError, CompileError : it is
    not there and cannot be compiled. DeviceError : cuBLAS or the driver refused, by name; our kernel was not loaded before a capture.
    """
    out = _prepared(a, b, transpose_b, out, like=a)
    _ffi.func("matmul")(
        _array.as_tensor(a, "a"), _array.as_tensor(b, "b"), int(transpose_b), _array.as_tensor(out, "out", output=True)
    )
    return out


def matmul_add(a: Any, b: Any, *, transpose_b: bool = False, c: Any, out: Any = None) -> Any:
    """out = a @ b + c, or a @ b.T + c: `matmul` with c as one summand more, added in float32 before the one rounding to out's type.

    One kernel on CUDA, where a product and a sum are two and round twice.

    Parameters
    ----------
    a, b : as in :func:`matmul`.
    c : [..., m, n], of out's type; leading dimensions count as rows. Any row stride; the last dimension is contiguous.
    out : [..., m, n], overwritten; allocated if None, of the kind, type and device of `c`. It may be c itself (c is then replaced by
        the sum), or shares no element with it. In place cuBLASLt takes other kernels, some of which round the product before they
        add.

    Raises
    ------
    As :func:`matmul`. ArgumentError also: c of another number of rows or columns (a bias is not broadcast), c that overlaps out in
    part. DTypeError also: c of another type than out.
    """
    out = _prepared(a, b, transpose_b, out, like=c)
    _ffi.func("matmul_add")(
        _array.as_tensor(a, "a"),
        _array.as_tensor(b, "b"),
        int(transpose_b),
        _array.as_tensor(c, "c"),
        _array.as_tensor(out, "out", output=True),
    )
    return out


def linear(x: Any, weight: Any, *, c: Any = None, out: Any = None) -> Any:
    """out = x @ weight.T, plus c where there is one: `matmul` and `matmul_add` with `transpose_b`, for a weight that is constant.

    Constant is a promise: no work that is on the device, or is enqueued before this call, writes `weight` while the call may run. The
    kernel for few rows (see :func:`matmul`) then reads it while the kernels ahead on the stream still run (programmatic dependent
    launch). If one of these does write it, directly ahead or further back, the product may be of the old values, of the new ones or of
    some of each, and nothing says so. A weight that was written is constant again once its writer is done and the host has waited for
    that; until then use :func:`matmul`. x, c and out need no promise: they are read and written in the order of the stream. On the CPU
    and on cuBLASLt it is :func:`matmul`, or :func:`matmul_add`.

    Parameters
    ----------
    x : [..., m, k], rank >= 2; leading dimensions count as rows. Any row stride; the last dimension is contiguous.
    weight : [n, k], of x's type (the layout of a torch Linear weight).
    c : [..., m, n], of out's type, added in float32 before the one rounding; None: nothing is added.
    out : [..., m, n], overwritten; allocated if None, of the kind, type and device of `c`, or of `x`. It may be c itself, or shares no
        element with it.

    Raises
    ------
    As :func:`matmul`, and with c as :func:`matmul_add`; messages call x `a` and weight `b`.
    """
    out = _prepared(x, weight, True, out, like=x if c is None else c)
    operands = [_array.as_tensor(x, "a"), _array.as_tensor(weight, "b")]
    if c is not None:
        operands.append(_array.as_tensor(c, "c"))
    name = "linear" if c is None else "linear_add"
    _ffi.func(name)(*operands, _array.as_tensor(out, "out", output=True))
    return out


def _prepared(a: Any, b: Any, transpose_b: bool, out: Any, *, like: Any) -> Any:
    """`out`, or a new one of the kind, type and device of `like`; on the CPU with a BLAS open."""
    if _device.cuda_index(a) is None:
        ensure_blas()
    if out is not None:
        return out
    if len(a.shape) < 2 or len(b.shape) != 2:
        raise errors.ArgumentError(
            f"arguments `a`, `b` have shapes {list(a.shape)}, {list(b.shape)}; they must be [..., m, k] and of rank 2"
        )
    return _array.empty_like(like, (*a.shape[:-1], b.shape[0 if transpose_b else 1]))
