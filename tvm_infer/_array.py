"""Arrays of torch, numpy and TVM, seen alike: which kind, and how to hand them to a packed function without a copy."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from . import _ffi
from .errors import ArgumentError, DTypeError

_BFLOAT16 = "bfloat16"


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


def as_tensor(x: Any, name: str, *, output: bool = False) -> Any:
    """`x` in a form that packed functions take, without copying its elements.

    torch and TVM tensors and most numpy arrays already are. numpy's DLPack export refuses read-only and bfloat16 arrays: those are
    passed as aliases. An output must be writable.
    """
    if not isinstance(x, np.ndarray):
        if (
            not hasattr(x, "__dlpack__")
            and not hasattr(x, "__tvm_ffi_object__")
            and not type(x).__module__.startswith("tvm")
        ):
            raise ArgumentError(
                f"argument `{name}` is a {type(x).__name__}; it must be a torch tensor, a numpy array or a TVM tensor"
            )
        if is_torch(x) and x.requires_grad:
            return x.detach()
        return x
    if output and not x.flags.writeable:
        raise ArgumentError(f"argument `{name}` is a read-only numpy array; outputs must be writable")
    bfloat16 = x.dtype.name == _BFLOAT16
    if x.flags.writeable and not bfloat16:
        return x
    alias = np.asarray(_Alias(x, "<u2" if bfloat16 else x.dtype.str))
    return _ffi.func("view_as")(alias, _BFLOAT16) if bfloat16 else alias


def as_index(x: Any, name: str) -> Any:
    """An int32 index tensor; lists and tuples of ints are converted (they are lengths: a few hundred numbers)."""
    if isinstance(x, (list, tuple)):
        array = np.asarray(x)
        if array.size and (array.dtype.kind not in "iu" or array.ndim != 1):
            raise DTypeError(
                f"argument `{name}` is a list holding {array.dtype}, rank {array.ndim}; it must hold integers"
            )
        if array.size and (array.max() > np.iinfo(np.int32).max or array.min() < np.iinfo(np.int32).min):
            raise ArgumentError(f"argument `{name}` holds {array.max()}; indices are int32")
        return array.astype(np.int32)
    return as_tensor(x, name)


def dtype_name(x: Any) -> str:
    """ "float32", "bfloat16", … of any array."""
    return str(x.dtype).removeprefix("torch.")


def empty_like(x: Any, shape: tuple[int, ...], dtype: str | None = None) -> Any:
    """An uninitialised array of `x`'s kind and device."""
    name = dtype or dtype_name(x)
    if is_torch(x):
        import torch

        return torch.empty(shape, dtype=getattr(torch, name), device=x.device)
    if isinstance(x, np.ndarray):
        if name == _BFLOAT16:
            import ml_dtypes

            return np.empty(shape, ml_dtypes.bfloat16)
        return np.empty(shape, name)
    import tvm

    return tvm.runtime.empty(shape, name)
