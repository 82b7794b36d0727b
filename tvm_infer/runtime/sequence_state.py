"""A sequence outside of its cache: keys, values and tokens on the host, to be kept, sent, and put into a cache again."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _ffi
from ..errors import ArgumentError, DTypeError

if TYPE_CHECKING:
    from .kv_cache import PagedKVCache

_WORDS = {1: "uint8", 2: "uint16", 4: "uint32"}  # bytes of an element -> what numpy's own types view it as
_NATIVE = ("float32", "float16")  # numpy's own; the others are of ml_dtypes
_FORMAT = 1  # of files


def _no_tokens() -> np.ndarray:
    return np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class SequenceState:
    """What :meth:`PagedKVCache.export_sequence` gives and :meth:`PagedKVCache.import_sequence` takes. It can be pickled.

    kv : [num_layers, 2, n, num_kv_heads, head_dim] in the cache's dtype (bfloat16 as ml_dtypes.bfloat16): keys [:, 0] as attention
        reads them, rotated where the cache rotates, values [:, 1]; n = length without what is missing.
    length : tokens. missing : [begin, end) of positions that left windows and were given back; (0, 0): none.
    tokens : int64, the tokens from position 0 on, as far as the cache knew them (`prefix_reuse`). namespace : theirs.
    """

    kv: np.ndarray
    length: int
    missing: tuple[int, int] = (0, 0)
    tokens: np.ndarray = field(default_factory=_no_tokens)
    namespace: int = 0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one .npz file, of numpy's own types."""
        with open(path, "wb") as file:
            np.savez(
                file,
                format=np.array(_FORMAT),
                kv=self.kv.view(_WORDS[self.kv.dtype.itemsize]),
                dtype=np.array(self.kv.dtype.name),
                numbers=np.array([self.length, *self.missing, self.namespace], np.int64),
                tokens=self.tokens,
            )

    @staticmethod
    def load(path: str | os.PathLike[str]) -> SequenceState:
        """What :meth:`save` wrote. ArgumentError for another file."""
        try:
            loaded = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, zipfile.BadZipFile):  # whatever else
            loaded = None
        if "format" not in getattr(loaded, "files", ()) or int(loaded["format"]) != _FORMAT:
            raise ArgumentError(
                f"argument `path` is {os.fspath(path)!r}, which is not of SequenceState.save in format {_FORMAT}"
            )
        with loaded as file:
            length, begin, end, namespace = (int(n) for n in file["numbers"])
            kv = file["kv"].view(_dtype(str(file["dtype"])))
            return SequenceState(kv, length, (begin, end), file["tokens"], namespace)

    def __repr__(self) -> str:
        layers, _, _, heads, head_dim = self.kv.shape
        return (
            f"SequenceState({self.length} tokens, {len(self.tokens)} known; {layers} layers, {heads} KV heads, head_dim {head_dim}, "
            f"{self.kv.dtype.name}; {self.kv.nbytes / 2**20:.1f} MiB)"
        )


def _dtype(name: str) -> np.dtype:
    if name in _NATIVE:
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name))


def export_from(cache: PagedKVCache, seq_id: int) -> SequenceState:
    """See :meth:`PagedKVCache.export_sequence`."""
    _check_has_no_scales(cache)
    _check_has_one_width(cache)
    length = cache.seq_len(seq_id)
    pages = cache._call("export_pages", seq_id)  # [layers, pages, 2, heads, page_size, head_dim]
    begin, end = (int(n) for n in cache._call("gone", seq_id))
    as_numpy = _on_host(pages, cache.dtype)
    rows = as_numpy.transpose(0, 2, 1, 4, 3, 5)  # [layers, 2, pages, page_size, heads, head_dim]
    kv = rows.reshape(cache.num_layers, 2, -1, cache.num_kv_heads, cache.head_dim)[:, :, : length - (end - begin)]
    tokens = np.asarray(cache._call("tokens", seq_id), np.int64).reshape(-1)
    return SequenceState(np.ascontiguousarray(kv), length, (begin, end), tokens, int(cache._call("namespace", seq_id)))


def _check_has_no_scales(cache: PagedKVCache) -> None:
    if cache.kv_dtype != cache.dtype:
        raise DTypeError(
            f"the cache has pages of {cache.kv_dtype}, whose scales a SequenceState does not hold; swap the sequence out instead "
            "(swap_out, swap_in), or keep pages in 16 bits"
        )


def _check_has_one_width(cache: PagedKVCache) -> None:
    if cache.head_dim_vo != cache.head_dim:
        raise ArgumentError(
            f"the cache has head_dim {cache.head_dim} and head_dim_vo {cache.head_dim_vo}, and a SequenceState holds keys and values "
            "of one width; swap the sequence out instead (swap_out, swap_in)"
        )


def import_into(cache: PagedKVCache, seq_id: int, state: SequenceState) -> None:
    """See :meth:`PagedKVCache.import_sequence`."""
    if not isinstance(state, SequenceState):
        raise ArgumentError(
            f"argument `state` is a {type(state).__name__}; it must be a SequenceState, as export_sequence gives it"
        )
    _check_has_no_scales(cache)
    _check_has_one_width(cache)
    kv, (begin, end) = state.kv, state.missing
    count = state.length - (end - begin)
    wanted = (cache.num_layers, 2, count, cache.num_kv_heads, cache.head_dim)
    if kv.shape != wanted:
        raise ArgumentError(
            f"argument `state` has `kv` of shape {list(kv.shape)}; {state.length} tokens, {end - begin} of them missing, are "
            f"[layers, 2, tokens, KV heads, head_dim] = {list(wanted)} in this cache"
        )
    if kv.dtype.name != cache.dtype:
        raise DTypeError(
            f"argument `state` holds {kv.dtype.name}, the cache {cache.dtype}; import it into a cache of its dtype"
        )
    page_size = cache.page_size
    num_pages = -(-count // page_size)
    rows = np.zeros((cache.num_layers, 2, num_pages * page_size, cache.num_kv_heads, cache.head_dim), kv.dtype)
    rows[:, :, :count] = kv
    paged = rows.reshape(cache.num_layers, 2, num_pages, page_size, cache.num_kv_heads, cache.head_dim)
    pages = np.ascontiguousarray(paged.transpose(0, 2, 1, 4, 3, 5))
    tokens = np.ascontiguousarray(state.tokens, np.int64)
    cache._call("import_pages", seq_id, _as_tensor(pages), state.length, (begin, end), tokens, state.namespace)


def _as_tensor(array: np.ndarray) -> Any:
    name = array.dtype.name
    return array if name in _NATIVE else _ffi.func("view_as")(array.view(_WORDS[array.dtype.itemsize]), name)


def _on_host(tensor: Any, dtype: str) -> np.ndarray:
    if dtype in _NATIVE:
        return np.from_dlpack(tensor)
    target = _dtype(dtype)
    return np.from_dlpack(_ffi.func("view_as")(tensor, _WORDS[target.itemsize])).view(target)
