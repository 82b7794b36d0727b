"""Weights in one file of the safetensors format: 8 bytes of header length, a JSON header, raw little-endian data.

https://github.com/huggingface/safetensors#format. Written so that TVM's kernels can read the mapped file: the data of a tensor starts
at a multiple of 64 bytes wherever the sizes of those before it allow. A tensor that is used under two names (tied embeddings) is
stored once; the header's metadata says who shares it.
"""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import _array, errors

_ALIGNMENT = 64
_SAME_AS = "tvm_infer.same_as"  # JSON: name -> name under which it is stored
_MAX_HEADER = 100_000_000  # bytes, the format's own limit
# of the format -> of numpy; bfloat16 is ml_dtypes'
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_NAMES = {name: key for key, name in _DTYPES.items()}


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy type called `name`; bfloat16 comes from ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def save(path: os.PathLike[str] | str, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write tensors (TVM's, of any device) and `metadata`. The file appears whole or not at all.

    Raises ArgumentError for a folder that does not exist, DTypeError for a type that the format lacks.
    """
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise errors.ArgumentError(f"argument `path` is {os.fspath(path)!r}; there is no folder {str(path.parent)!r}")
    stored: dict[tuple[Any, ...], str] = {}
    same_as: dict[str, str] = {}
    for name, tensor in tensors.items():
        first = stored.setdefault(_identity(tensor), name)
        if first != name:
            same_as[name] = first
    names = [name for name in tensors if name not in same_as]
    for name in names:
        if _array.dtype_name(tensors[name]) not in _NAMES:
            raise errors.DTypeError(
                f"weight {name!r} is {_array.dtype_name(tensors[name])}; the format has {', '.join(_NAMES)}"
            )
    names.sort(key=lambda name: _num_bytes(tensors[name]) % _ALIGNMENT != 0)  # stable: the odd sizes last
    header: dict[str, Any] = {"__metadata__": {**metadata, **({_SAME_AS: json.dumps(same_as)} if same_as else {})}}
    offset = 0
    for name in names:
        size = _num_bytes(tensors[name])
        header[name] = {
            "dtype": _NAMES[_array.dtype_name(tensors[name])],
            "shape": [int(n) for n in tensors[name].shape],
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    handle, unfinished = tempfile.mkstemp(prefix=f"{path.name}.tmp-", dir=path.parent)
    try:
        with open(handle, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                f.write(np.ascontiguousarray(tensors[name].numpy()).reshape(-1).view(np.uint8).data)
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def _identity(tensor: Any) -> tuple[Any, ...]:
    """What tells the memory of one tensor from that of another."""
    address = getattr(tensor, "data_ptr", None)
    key: Any = address() if address is not None else id(tensor)
    return key, tuple(int(n) for n in tensor.shape), _array.dtype_name(tensor)


def _num_bytes(tensor: Any) -> int:
    count = 1
    for n in tensor.shape:
        count *= int(n)
    return count * numpy_dtype(_array.dtype_name(tensor)).itemsize


class WeightsFile(Mapping[str, Any]):
    """A file's tensors by name, mapped into memory: pages are read when they are used, and a write (there is none) would be private.

    Attributes
    ----------
    path : of the file. metadata : what its writer put into the header.

    Raises
    ------
    ModelError : no such file, or one that is no whole file of the format.
    """

    def __init__(self, path: os.PathLike[str] | str) -> None:
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            what = "is a folder" if self.path.is_dir() else "does not exist"
            raise errors.ModelError(f"argument `weights`: {os.fspath(path)} {what}; name a safetensors file")
        size = self.path.stat().st_size
        with self.path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise self._damaged(f"{size} bytes cannot hold a header of {length}")
            try:
                header = json.loads(f.read(length))
                self.metadata: dict[str, str] = header.pop("__metadata__", {})
                same_as = json.loads(self.metadata.get(_SAME_AS, "{}"))
                self._entries = {name: self._entry(name, fields, size - 8 - length) for name, fields in header.items()}
                self._entries |= {name: self._entries[stored] for name, stored in same_as.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise self._damaged(f"its header cannot be read ({type(error).__name__}: {error})") from error
        self._data_at = 8 + length
        self._bytes = np.memmap(self.path, np.uint8, mode="c") if self._entries else np.zeros(0, np.uint8)

    def _entry(self, name: str, fields: Mapping[str, Any], limit: int) -> tuple[str, tuple[int, ...], int, int]:
        dtype, shape = _DTYPES[fields["dtype"]], tuple(int(n) for n in fields["shape"])
        begin, end = (int(n) for n in fields["data_offsets"])
        expected = int(np.prod(shape, dtype=np.int64)) * numpy_dtype(dtype).itemsize
        if not 0 <= begin <= end <= limit or end - begin != expected or min(shape, default=0) < 0:
            raise ValueError(
                f"tensor {name!r}, {dtype} {list(shape)}, at bytes {begin} to {end} of {limit}; the file may be cut short"
            )
        return dtype, shape, begin, end

    def _damaged(self, why: str) -> errors.ModelError:
        return errors.ModelError(f"argument `weights`: {self.path} is no whole safetensors file: {why}")

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        """Of one tensor, from the header."""
        dtype, shape, _, _ = self._entries[name]
        return shape, dtype

    def __getitem__(self, name: str) -> Any:
        dtype, shape, begin, end = self._entries[name]
        data = self._bytes[self._data_at + begin : self._data_at + end]
        array = np.asarray(data).view(numpy_dtype(dtype)).reshape(shape)
        return _array.as_tensor(array, name) if dtype == "bfloat16" else array

    def __iter__(self) -> Any:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
