"""Paged batches that punish a kernel which reads what it must not: NaN in free slots, garbage in unused table entries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .reference import attention_reference


def numpy_dtype(name: str) -> Any:
    """The numpy dtype called `name`; "bfloat16", "float8_e4m3fn" and "float8_e5m2" are ml_dtypes'."""
    if name == "bfloat16" or name.startswith("float8"):
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name)


def quantise(x: Any, scale: Any, dtype: str) -> np.ndarray:
    """x / scale as 8-bit floats: rounded to nearest even by ml_dtypes, saturating, NaN as it is. x : [..., num_kv_heads, head_dim].

    scale : a number, or float32 [num_kv_heads].
    """
    import ml_dtypes

    kind = numpy_dtype(dtype)
    largest = float(ml_dtypes.finfo(kind).max)
    scales = np.asarray(scale, np.float32).reshape(-1, 1)
    return np.clip(np.asarray(x).astype(np.float32) / scales, -largest, largest).astype(kind)


@dataclass
class PagedBatch:
    """A batch with its keys in pages, and the same keys in request order for the reference.

    q : [num_tokens, num_qo_heads, head_dim]. k_new, v_new : the last qo_len keys of each request, [num_tokens, num_kv_heads,
    head_dim]. kv_cache : [num_pages, 2, num_kv_heads, page_size, head_dim], every slot without a key is NaN. keys, values : per
    request [kv_len, num_kv_heads, head_dim], as the cache has them (of 8 bits: element * scale, float64). Tables are int32; entries
    past a request's last key are garbage.
    """

    q: np.ndarray
    k_new: np.ndarray
    v_new: np.ndarray
    kv_cache: np.ndarray
    keys: list[np.ndarray]
    values: list[np.ndarray]
    qo_indptr: np.ndarray
    kv_len: np.ndarray
    kv_page_indptr: np.ndarray
    kv_page_indices: np.ndarray
    page_size: int
    sm_scale: float

    @property
    def tables(self) -> dict[str, np.ndarray]:
        """The keyword arguments of attention() that name pages."""
        return {"kv_page_indptr": self.kv_page_indptr, "kv_page_indices": self.kv_page_indices}

    def reference(
        self, *, causal: bool = True, window_left: int = -1, logits: Callable[..., np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(o, lse) of the whole batch in float64, as of :func:`attention_reference`."""
        o, lse = np.zeros(self.q.shape), np.full(self.q.shape[:2], -np.inf)
        for r in range(len(self.kv_len)):
            rows = slice(self.qo_indptr[r], self.qo_indptr[r + 1])
            o[rows], lse[rows] = attention_reference(
                self.q[rows],
                self.keys[r],
                self.values[r],
                sm_scale=self.sm_scale,
                causal=causal,
                window_left=window_left,
                logits=logits,
            )
        return o, lse


def make_paged_batch(
    qo_lens: list[int],
    kv_lens: list[int],
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int = 16,
    dtype: str = "float32",
    seed: int = 0,
    spare_pages: int = 3,
    sm_scale: float | None = None,
    levels: Iterable[Iterable[tuple[Sequence[int], int]]] = (),
    kv_dtype: str | None = None,
    k_scale: Any = 1.0,
    v_scale: Any = 1.0,
) -> PagedBatch:
    """A random batch. Pages are in random order in the pool; `spare_pages` belong to no request; each request's table has one
    garbage entry behind its pages. `levels` as of :func:`tvm_infer.plan`: requests of a group have the same first keys, and share the
    pages that these fill; pages that this leaves to nobody are NaN. kv_dtype, k_scale, v_scale : of a cache of 8 bits; scales are
    numbers or [num_kv_heads]."""
    rng = np.random.default_rng(seed)
    kind = numpy_dtype(dtype)
    kv_kind = kind if kv_dtype is None else numpy_dtype(kv_dtype)
    pages_of = [-(-n // page_size) for n in kv_lens]
    num_pages = sum(pages_of) + spare_pages
    order = rng.permutation(num_pages).astype(np.int32)
    cache = np.full((num_pages, 2, num_kv_heads, page_size, head_dim), np.nan, kv_kind)
    shape = (num_kv_heads, head_dim)
    keys: list[np.ndarray] = []
    values: list[np.ndarray] = []
    pages: list[np.ndarray] = []
    for length, count in zip(kv_lens, pages_of, strict=True):
        keys.append(rng.standard_normal((length, *shape)).astype(kind))
        values.append(rng.standard_normal((length, *shape)).astype(kind))
        pages.append(order[sum(map(len, pages)) :][:count].copy())
    for requests, num_keys in (group for level in levels for group in level):
        for r in requests:
            keys[r][:num_keys] = keys[requests[0]][:num_keys]
            values[r][:num_keys] = values[requests[0]][:num_keys]
            pages[r][: num_keys // page_size] = pages[requests[0]][: num_keys // page_size]
    k_new, v_new = ([x[len(x) - n :] for x, n in zip(kept, qo_lens, strict=True)] for kept in (keys, values))
    stored = [keys, values]
    if kv_dtype is not None:
        scales = (k_scale, v_scale)
        stored = [[quantise(x, s, kv_dtype) for x in kept] for kept, s in zip(stored, scales, strict=True)]
        keys, values = (
            [x.astype(np.float64) * np.asarray(s, np.float32).astype(np.float64).reshape(-1, 1) for x in elements]
            for elements, s in zip(stored, scales, strict=True)
        )
    indices, indptr = [], [0]
    for k, v, table in zip(*stored, pages, strict=True):
        for j in range(len(k)):
            cache[table[j // page_size], 0, :, j % page_size] = k[j]
            cache[table[j // page_size], 1, :, j % page_size] = v[j]
        indices += [*table.tolist(), -1_234_567_890]
        indptr.append(len(indices))
    qo_indptr = np.concatenate([[0], np.cumsum(qo_lens)]).astype(np.int32)
    none = np.zeros((0, num_kv_heads, head_dim), kind)
    return PagedBatch(
        q=rng.standard_normal((int(qo_indptr[-1]), num_qo_heads, head_dim)).astype(kind),
        k_new=np.concatenate([none, *k_new]),
        v_new=np.concatenate([none, *v_new]),
        kv_cache=cache,
        keys=keys,
        values=values,
        qo_indptr=qo_indptr,
        kv_len=np.asarray(kv_lens, np.int32),
        kv_page_indptr=np.asarray(indptr, np.int32),
        kv_page_indices=np.asarray(indices, np.int32),
        page_size=page_size,
        sm_scale=sm_scale if sm_scale is not None else head_dim**-0.5,
    )
