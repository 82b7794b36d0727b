"""Tensors that say they lie on a CUDA device, and the fake driver's record: what tests of the launch path look at."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import tvm_ffi

CPU, CUDA, PINNED, ROCM = 1, 2, 3, 10  # DLDeviceType
_CODES = {"int32": (0, 32), "float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16)}
_CODES |= {"float8_e4m3fn": (10, 8), "float8_e5m2": (12, 8)}
_kept: list[Any] = []  # DLPack owners; the process is short

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _DLManagedTensor(ctypes.Structure):
    _fields_ = [("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


_MAP_NORESERVE = 0x4000  # Linux; not among mmap's names


class _Exporter:
    def __init__(self, managed: _DLManagedTensor) -> None:
        self._managed = managed

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._managed.tensor.device_type, self._managed.tensor.device_id

    def __dlpack__(self, **_: Any) -> Any:
        return _new_capsule(ctypes.addressof(self._managed), b"dltensor", None)


def tensor(shape, dtype="bfloat16", *, device=(CUDA, 0), strides=None, offset=0, data=None):
    """A tensor of zeros (or `data`) in host memory, 64-byte aligned, that says it is on `device`. offset: bytes; strides: elements."""
    bits = _CODES[dtype][1]
    dense = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    strides = dense if strides is None else strides
    span = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n > 0) + 1
    size = max(span, 1) * bits // 8 + 128 + offset
    if size < 1 << 30:
        memory = np.zeros(size, np.uint8)
    else:  # addresses alone: pages that nobody writes to do not exist
        memory = np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE), np.uint8)
    start = -memory.ctypes.data % 64
    if data is not None:
        raw = np.ascontiguousarray(data).view(np.uint8).ravel()
        memory[start + offset : start + offset + raw.size] = raw
    _kept.append(memory)
    return _exported(memory.ctypes.data + start, shape, dtype, device, strides, offset)


def _exported(address, shape, dtype, device, strides, offset):
    dims = (ctypes.c_int64 * len(shape))(*shape)
    steps = (ctypes.c_int64 * len(shape))(*strides)
    managed = _DLManagedTensor(
        _DLTensor(address, *device, len(shape), *_CODES[dtype], 1, dims, steps, offset), None, None
    )
    result = tvm_ffi.from_dlpack(_Exporter(managed))
    addresses[id(result)] = address + offset
    _kept.extend((managed, dims, steps, result))
    return result


def alias(of, shape, dtype="bfloat16", *, strides, offset, device=(CUDA, 0)):
    """Another tensor in the memory of `of`, beginning `offset` bytes behind its first element."""
    return _exported(addresses[id(of)], shape, dtype, device, strides, offset)


addresses: dict[int, int] = {}  # of a tensor's first element, by id


def index(values, **kwargs):
    """An int32 tensor of these values."""
    data = np.asarray(values, np.int32)
    return tensor(data.shape, "int32", data=data, **kwargs)


class Driver:
    """The fake libcuda.so.1 of this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.fake_log.restype = self._library.fake_allocations.restype = ctypes.c_char_p
        pages = ("page_bounds_params", "page_scores_params", "select_pages_params")
        for name in ("params", "rope_append_params", "gemv_params", "variant_args", "maps", *pages):
            getattr(self._library, f"fake_{name}").restype = ctypes.c_void_p

    def calls(self, name: str) -> list[str]:
        """Arguments of the calls of a function since clear(), one string each."""
        lines = self._library.fake_log().decode().splitlines()
        return [line[len(name) :].strip() for line in lines if line.split(" ")[0] == name]

    def allocations(self) -> list[tuple[int, int]]:
        """(address, bytes) of the device memory that is allocated."""
        text = self._library.fake_allocations().decode()
        return [(int(a), int(b)) for a, b in (line.split(" ") for line in text.splitlines())]

    def launches(self) -> list[dict[str, str]]:
        """name, grid, block, shared, stream, attributes (count, id, value), device of each launch."""
        split = [line.split(" ") for line in self.calls("cuLaunchKernelEx")]
        return [{"name": words[0], **dict(word.split("=") for word in words[1:])} for words in split]

    def maps(self) -> list[dict[str, str]]:
        """The fields of each encoded tensor map."""
        return [dict(word.split("=") for word in line.split(" ")) for line in self.calls("cuTensorMapEncodeTiled")]

    def params(self, structure: type) -> Any:
        """The first parameter of the last attention launch."""
        return structure.from_buffer_copy(ctypes.string_at(self._library.fake_params(), ctypes.sizeof(structure)))

    def rope_append_params(self, structure: type) -> Any:
        """The parameter of the last launch of a rope_append."""
        address = self._library.fake_rope_append_params()
        return structure.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(structure)))

    def gemv_params(self, structure: type) -> Any:
        """The parameter of the last launch of a gemv."""
        address = self._library.fake_gemv_params()
        return structure.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(structure)))

    def page_params(self, kernel: str, structure: type) -> Any:
        """The parameter of the last launch of "page_bounds", "page_scores" or "select_pages"."""
        address = getattr(self._library, f"fake_{kernel}_params")()
        return structure.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(structure)))

    def variant_args(self, structure: type) -> Any:
        """The third parameter of the last launch of an attention with a variant."""
        address = self._library.fake_variant_args()
        return structure.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(structure)))

    def clear(self) -> None:
        self._library.fake_clear()

    def fail(self, function: str, code: int) -> None:
        """The next call of `function` returns `code`."""
        self._library.fake_fail(function.encode(), code)

    def capture(self, on: bool) -> None:
        self._library.fake_capture(int(on))

    def capture_stream(self, stream: int) -> None:
        """Only this stream is captured."""
        self._library.fake_capture_stream(ctypes.c_void_p(stream))

    def current_device(self) -> int:
        """Of the current context; -1: none is."""
        return self._library.fake_current_device()
