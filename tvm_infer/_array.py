"""Arrays of torch, numpy and TVM, seen alike: which kind, and how to hand them to a packed function without a copy."""

from __future__ import annotations

import array
import sys
from typing import Any

import numpy as np

from . import _device, _ffi
from .errors import ArgumentError, DTypeError, MissingDependencyError

# numpy has these of the package ml_dtypes, and cannot hand them out itself: they go as integers of their width.
_EXTENDED = {"bfloat16": "<u2", "float8_e4m3fn": "|u1", "float8_e5m2": "|u1"}


def is_torch(x: Any) -> bool:
    """True for torch tensors; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


class _Alias:
    """The memory of a numpy array under another type or writability, kept alive by this object."""

    def __init__(self, array: np.ndarray, typestr: str) -> None:
        self._array = array
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        interface["typestr"] = typestr
        interface.pop("descr", None)
        if interface.get("strides") is None:
            interface["strides"] = array.strides
        self.__array_interface__ = interface


_TAKEN: set[type] = set()  # types that packed functions were found to take as they are; asking again costs 0.5 us


def as_tensor(x: Any, name: str, *, output: bool = False) -> Any:
    """`x` in a form that packed functions take, without copying its elements.

    torch and TVM tensors and most numpy arrays already are. numpy's DLPack export refuses read-only arrays and those of ml_dtypes
    (bfloat16, 8-bit floats): they are passed as aliases. An output must be writable.
    """
    kind = type(x)
    if kind in _TAKEN:
        return x
    if not isinstance(x, np.ndarray):
        if is_torch(x):
            return x.detach() if x.requires_grad else x
        if (
            not hasattr(x, "__dlpack__")
            and not hasattr(x, "__tvm_ffi_object__")
            and not kind.__module__.startswith("tvm")
        ):
            raise ArgumentError(
                f"argument `{name}` is a {kind.__name__}; it must be a torch tensor, a numpy array or a TVM tensor"
            )
        _TAKEN.add(kind)
        return x
    if output and not x.flags.writeable:
        raise ArgumentError(f"argument `{name}` is a read-only numpy array; outputs must be writable")
    # `name` alone costs 0.5 us
    typestr = _EXTENDED.get(x.dtype.name) if x.dtype.kind == "V" or x.dtype.itemsize == 1 else None
    if x.flags.writeable and typestr is None:
        return x
    alias = np.asarray(_Alias(x, typestr or x.dtype.str))
    return alias if typestr is None else _ffi.func("view_as")(alias, x.dtype.name)


def as_index(x: Any, name: str) -> Any:
    """An int32 index tensor; lists and tuples of ints are converted (they are lengths: a few hundred numbers)."""
    if isinstance(x, (list, tuple)):
        try:
            return np.frombuffer(array.array("i", x), np.int32) if x else np.zeros(0, np.int32)
        except (TypeError, OverflowError):
            _refuse_list(x, name)
    return as_tensor(x, name)


def _refuse_list(x: Any, name: str) -> None:
    """Say what is wrong with a list that holds something else than 32-bit integers."""
    values = np.asarray(x)
    if values.dtype.kind in "iu" and values.ndim == 1:
        largest = max(values.tolist(), key=abs)
        raise ArgumentError(f"argument `{name}` holds {largest}; indices are int32")
    raise DTypeError(f"argument `{name}` is a list holding {values.dtype}, rank {values.ndim}; it must hold integers")


def dtype_name(x: Any) -> str:
    """ "float32", "bfloat16", … of any array."""
    return str(x.dtype).removeprefix("torch.")


def numpy_dtype(name: str) -> np.dtype:
    """ "bfloat16" and 8-bit floats are those of ml_dtypes."""
    if name not in _EXTENDED:
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name))


def on_host(x: Any, name: str) -> np.ndarray:
    """A host tensor of whatever library as numpy sees it, not copied; `name`: its dtype."""
    if name not in _EXTENDED:
        return np.from_dlpack(x)
    width = np.dtype(_EXTENDED[name])
    return np.from_dlpack(_ffi.func("view_as")(x, width.name)).view(numpy_dtype(name))


def empty_like(x: Any, shape: tuple[int, ...], dtype: str | None = None) -> Any:
    """An uninitialised array of `x`'s kind and device."""
    if is_torch(x):
        import torch

        return torch.empty(shape, dtype=x.dtype if dtype is None else getattr(torch, dtype), device=x.device)
    name = dtype or dtype_name(x)
    if isinstance(x, np.ndarray):
        return np.empty(shape, numpy_dtype(name))
    return _tvm_empty(shape, name, x.device)


def empty_on(device: _device.Device, shape: tuple[int, ...], dtype: str) -> Any:
    """An uninitialised tensor on a device: torch's where torch is loaded, else TVM's where it is installed."""
    if "torch" not in sys.modules:
        try:
            return _tvm_empty(shape, dtype, str(device))
        except MissingDependencyError:
            pass
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype), device=str(device))


def index_on(device: _device.Device, words: np.ndarray) -> Any:
    """A copy of int32 words on a device, of the kind that :func:`empty_on` allocates. Waits for the copy."""
    target = empty_on(device, words.shape, "int32")
    if is_torch(target):
        import torch

        return target.copy_(torch.from_numpy(words))
    return target.copyfrom(words)


def copy_to_host(x: Any) -> np.ndarray:
    """A device tensor's elements after the work before it on the current stream; waits. bfloat16 comes as ml_dtypes.bfloat16."""
    name = dtype_name(x)
    shape = tuple(int(n) for n in x.shape)
    host = np.empty(shape, numpy_dtype(name))
    _ffi.func("copy_to_host")(x, as_tensor(host, "target", output=True))
    return host


def to_torch(x: Any, what: str) -> Any:
    """A TVM tensor as a torch tensor that shares its memory. `what` asks for it, for the error."""
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            f"{what} hands out device memory as torch tensors, and torch is not installed: `pip install 'tvm_infer[torch]'`"
        ) from error
    return torch.from_dlpack(x)


def _tvm_empty(shape: tuple[int, ...], dtype: str, device: Any) -> Any:
    try:
        import tvm
    except ImportError as error:
        raise MissingDependencyError(
            "memory for a result is allocated by torch or TVM, and the tensors given are neither's: pass the outputs yourself "
            "(out, lse, workspace, device_out), or `pip install 'tvm_infer[torch]'`"
        ) from error
    return tvm.runtime.empty(shape, dtype, tvm.device(device) if isinstance(device, str) else device)
