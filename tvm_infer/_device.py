"""Devices as users name them, and where an array lies. Neither torch nor TVM is imported to find out."""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any, NamedTuple

from . import _ffi
from .errors import ArgumentError, ExecutorError

_DLPACK_KINDS = {1: "cpu", 2: "cuda", 3: "cuda_host", 13: "cuda_managed"}
_DLPACK_CPU, _DLPACK_CUDA = 1, 2


@dataclasses.dataclass(frozen=True)
class Device:
    """ "cpu", or "cuda" and which one."""

    kind: str
    index: int

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


CPU = Device("cpu", 0)


class CudaInfo(NamedTuple):
    """What plans need to know of a cuda device."""

    arch: str
    num_sms: int
    name: str


@functools.cache
def cuda_info(index: int) -> CudaInfo:
    """Architecture, number of SMs and name of a cuda device; ExecutorError where there is none."""
    arch, num_sms, name = str(_ffi.func("cuda_info")(index)).split(" ", 2)
    return CudaInfo(arch, int(num_sms), name)


def _current_cuda() -> int:
    torch = sys.modules.get("torch")
    return int(torch.cuda.current_device()) if torch is not None and torch.cuda.is_available() else 0


def parse(device: Any, name: str = "device") -> Device:
    """The device that `device` means: None (cpu), "cpu", "cuda", "cuda:1", a torch.device or a TVM device.

    "cuda" without a number is torch's current device where torch is loaded, else number 0.
    """
    if device is None or device == "cpu":
        return CPU
    if isinstance(device, Device):
        return device
    kind: Any
    index: Any
    if isinstance(device, str):
        kind, colon, number = device.partition(":")
        index = int(number) if number.isdecimal() else None
        if colon and index is None:
            kind = None
    else:
        kind, index = getattr(device, "type", None), getattr(device, "index", None)
    if not isinstance(kind, str) or not kind:
        raise ArgumentError(
            f'argument `{name}` is {device!r}; it must be "cpu", "cuda", "cuda:1", a torch.device or a TVM device'
        )
    if kind == "cpu":
        return CPU
    if kind != "cuda":
        raise ExecutorError(f'argument `{name}` is {str(device)!r}; executors are "cpu" and "cuda"')
    return Device("cuda", _current_cuda() if index is None else int(index))


def from_dlpack(kind: int, index: int) -> Device:
    """The device of a DLPack (type, id)."""
    return CPU if kind == _DLPACK_CPU else Device(_DLPACK_KINDS[kind], index)


def cuda_index(x: Any) -> int | None:
    """Number of the cuda device that an array lies on; None for the host's memory and for what is no array."""
    is_cuda = getattr(x, "is_cuda", None)  # torch: the cheapest question
    if is_cuda is not None:
        return x.get_device() if is_cuda else None
    dlpack_device = getattr(x, "__dlpack_device__", None)
    if dlpack_device is None:
        return None
    kind, index = dlpack_device()
    return int(index) if int(kind) == _DLPACK_CUDA else None


def describe(x: Any) -> str:
    """Where an argument lies, for messages: "a list", "on cpu", "on cuda:1"."""
    dlpack_device = getattr(x, "__dlpack_device__", None)
    if dlpack_device is None:
        return f"a {type(x).__name__}"
    kind, index = dlpack_device()
    if int(kind) == _DLPACK_CPU:
        return "on cpu"
    return f"on {_DLPACK_KINDS.get(int(kind), f'device type {int(kind)}')}:{int(index)}"


def require(x: Any, name: str, index: int) -> None:
    """Raise ArgumentError unless the array lies on cuda device `index`, where `q` lies. Nothing is copied behind the user's back."""
    if cuda_index(x) == index:
        return
    way_out = f"`torch.tensor({name}, dtype=torch.int32).cuda()`" if isinstance(x, (list, tuple)) else "`.cuda()`"
    raise ArgumentError(
        f"argument `{name}` is {describe(x)}, the tensors of this call are on cuda:{index}; put it there once, before the loop over "
        f"layers: {way_out}"
    )
