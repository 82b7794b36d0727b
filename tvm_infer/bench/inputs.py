"""Random batches: numpy arrays on the host, torch tensors on a device. All peers get the same data."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import ops, page_selection
from ..testing import make_paged_batch
from ..testing.batches import PagedBatch, numpy_dtype
from . import variants
from .workloads import KV_SCALE, Workload

_SLOW_FILL_TOKENS = 4096  # keys that make_paged_batch may fill token by token


def indptr(lengths: tuple[int, ...] | list[int]) -> np.ndarray:
    """int32 [len(lengths) + 1]: where each run begins and ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def host_batch(workload: Workload) -> PagedBatch:
    """A random batch on the host; a big one has its cache filled page by page instead of token by token."""
    if sum(workload.kv_lens) <= _SLOW_FILL_TOKENS:
        return make_paged_batch(
            list(workload.qo_lens),
            list(workload.kv_lens),
            num_qo_heads=workload.num_qo_heads,
            num_kv_heads=workload.num_kv_heads,
            head_dim=workload.head_dim,
            page_size=workload.page_size,
            dtype=workload.dtype,
        )
    rng = np.random.default_rng(0)
    kind = numpy_dtype(workload.dtype)
    counts = [-(-n // workload.page_size) for n in workload.kv_lens]
    cache = rng.standard_normal(
        (sum(counts), 2, workload.num_kv_heads, workload.page_size, workload.head_dim), dtype=np.float32
    ).astype(kind)
    order = rng.permutation(sum(counts)).astype(np.int32)
    page_indptr = indptr(counts)
    keys, values = [], []
    for r, length in enumerate(workload.kv_lens):
        rows = cache[order[page_indptr[r] : page_indptr[r + 1]]].transpose(1, 0, 3, 2, 4)
        dense = rows.reshape(2, -1, workload.num_kv_heads, workload.head_dim)[:, :length]
        keys.append(dense[0])
        values.append(dense[1])
    qo_indptr = indptr(workload.qo_lens)
    shape = (int(qo_indptr[-1]), workload.num_qo_heads, workload.head_dim)
    none = np.zeros((0, workload.num_kv_heads, workload.head_dim), kind)
    return PagedBatch(
        q=rng.standard_normal(shape, dtype=np.float32).astype(kind),
        k_new=none,
        v_new=none,
        kv_cache=cache,
        keys=keys,
        values=values,
        qo_indptr=qo_indptr,
        kv_len=np.asarray(workload.kv_lens, np.int32),
        kv_page_indptr=page_indptr,
        kv_page_indices=order,
        page_size=workload.page_size,
        sm_scale=workload.head_dim**-0.5,
    )


@dataclass(frozen=True)
class DeviceBatch:
    """A batch as torch tensors on one device.

    q, out : [num_tokens, num_qo_heads, head_dim], `out` as wide as values. lse : float32 [num_tokens, num_qo_heads].
    kv : paged [num_pages, 2, num_kv_heads, page_size, head_dim], or with kv_layout "NHD" [num_pages, 2, page_size, num_kv_heads,
    head_dim]; ragged [2, num_kv_tokens, num_kv_heads, head_dim]. Without the 2, keys alone, where values are narrower: then they are
    v, of the same axes.
    page_indptr, page_indices : int32, each request's pages in random order; None where ragged.
    kv_indptr : int32 [num_requests + 1], keys of each request. All indices are on the device.
    variant : the workload's, bound to parameters on the device; None for plain attention.
    """

    workload: Workload
    q: Any
    kv: Any
    out: Any
    lse: Any
    page_indptr: Any
    page_indices: Any
    kv_indptr: Any
    qo_indptr: Any
    host_page_indptr: np.ndarray
    variant: Any = None
    v: Any = None

    @property
    def cache(self) -> Any:
        """Keys and values as tvm_infer.attention takes them."""
        return self.kv if self.v is None else (self.kv, self.v)

    @property
    def sm_scale(self) -> float:
        """1 / sqrt(head_dim)."""
        return float(self.workload.head_dim**-0.5)

    @functools.cached_property
    def tables(self) -> dict[str, Any]:
        """The keyword arguments of tvm_infer.attention that name pages: of requests, or of their KV heads."""
        w = self.workload
        if not sum(w.streaming):
            return {"kv_page_indptr": self.page_indptr, "kv_page_indices": self.page_indices}
        import torch

        first, last = (n // w.page_size for n in w.streaming)
        lists = []
        for r in range(len(w.kv_lens)):
            pages = self.pages(r).int()
            few = torch.cat([pages[:first], pages[-last:]])
            lists += [pages if head % 2 else few for head in range(w.num_kv_heads)]
        starts = torch.from_numpy(indptr([len(pages) for pages in lists])).to(self.q.device)
        return {"kv_page_indptr": starts, "kv_page_indices": torch.cat(lists)}

    @functools.cached_property
    def page_bounds(self) -> Any:
        """Bounds of all pages, of a workload that selects pages."""
        w = self.workload
        bounds = page_selection.empty_page_bounds(
            self.cache, kv_layout=w.kv_layout, dtype=w.dtype if w.kv_dtype else None
        )
        table = {"kv_page_indptr": self.page_indptr, "kv_page_indices": self.page_indices}
        ops.update_page_bounds(
            bounds, self.cache, qo_indptr=self.kv_indptr, kv_len=self.kv_len, kv_layout=w.kv_layout, **table
        )
        return bounds

    @functools.cached_property
    def kv_len(self) -> Any:
        """int32 [num_requests], keys of each request, on the device."""
        return self.kv_indptr.diff()

    @functools.cached_property
    def _page_scores(self) -> Any:
        w = self.workload
        table = {"kv_page_indptr": self.page_indptr, "kv_page_indices": self.page_indices}
        most = -(-max(w.kv_lens) // w.page_size)
        return page_selection.page_scores(
            self.q, self.page_bounds, kv_len=self.kv_len, page_size=w.page_size, max_pages=most, **table
        )

    def selects(self, request: int) -> Any:
        """bool [num_kv_heads, kv_len]: whether a head reads a key, by a sort of the pages' scores."""
        import torch

        w, length = self.workload, self.workload.kv_lens[request]
        num_pages, first, last = w.selected
        count = -(-length // w.page_size)
        scores = self._page_scores[request, :, :count].clone()
        scores[:, :first] = scores[:, count - last :] = torch.inf
        best = scores.sort(descending=True, stable=True).indices[:, :num_pages]
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
        return chosen.repeat_interleave(w.page_size, 1)[:, :length]

    @property
    def kv_scales(self) -> dict[str, float]:
        """`k_scale` and `v_scale`, where there are some."""
        return {"k_scale": KV_SCALE, "v_scale": KV_SCALE} if self.workload.kv_dtype else {}

    def copy(self) -> DeviceBatch:
        """The same values in other memory; index tables are shared."""
        v = None if self.v is None else self.v.clone()
        return replace(self, q=self.q.clone(), kv=self.kv.clone(), v=v, out=self.out.clone(), lse=self.lse.clone())

    def poison_outputs(self) -> None:
        """NaN in every output, so that what a kernel does not write is seen."""
        self.out.fill_(float("nan"))
        self.lse.fill_(float("nan"))

    def pages(self, request: int) -> Any:
        """Page numbers of a request, int64."""
        begin, end = (int(i) for i in self.host_page_indptr[request : request + 2])
        return self.page_indices[begin:end].long()

    def dense(self, request: int) -> tuple[Any, Any]:
        """(k, v) of a request without pages, [num_kv_heads, kv_len, head_dim] each, v head_dim_vo wide, in the batch's dtype (which
        holds what 8 bits stand for)."""
        w, length = self.workload, self.workload.kv_lens[request]
        if self.v is not None:
            k, v = (self._rows(x, request) for x in (self.kv, self.v))
            return k, v
        if w.ragged:
            begin = sum(w.kv_lens[:request])
            rows = self.kv[:, begin : begin + length].transpose(1, 2)
            return rows[0], rows[1]
        pool = self.kv if w.kv_layout == "HND" else self.kv.transpose(2, 3)
        pages = pool.view(_bits(pool))[self.pages(request)].view(pool.dtype)  # torch does not index 8-bit floats
        rows = pages.permute(1, 2, 0, 3, 4).reshape(2, w.num_kv_heads, -1, w.head_dim)[:, :, :length]
        if w.kv_dtype:
            rows = rows.to(self.q.dtype) * KV_SCALE
        return rows[0], rows[1]

    def _rows(self, x: Any, request: int) -> Any:
        """Keys or values of a tensor of their own, [num_kv_heads, kv_len, width]."""
        w, length = self.workload, self.workload.kv_lens[request]
        if w.ragged:
            begin = sum(w.kv_lens[:request])
            return x[begin : begin + length].transpose(0, 1)
        pages = (x if w.kv_layout == "HND" else x.transpose(1, 2))[self.pages(request)]
        return pages.transpose(0, 1).reshape(w.num_kv_heads, -1, x.shape[-1])[:, :length]


def _bits(tensor: Any) -> Any:
    import torch

    return torch.uint8 if tensor.dtype.itemsize == 1 else tensor.dtype


def device_batch(workload: Workload, device: Any, seed: int = 0) -> DeviceBatch:
    """A random batch, N(0, 1), on a torch device; pages are handed out in random order, those of a shared prefix to all requests."""
    import torch

    w = workload
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype = getattr(torch, w.dtype)

    def normal(*shape: int) -> Any:
        return torch.empty(shape, device=device, dtype=dtype).normal_(generator=generator)

    def index(values: np.ndarray) -> Any:
        return torch.from_numpy(values).to(device)

    counts = [-(-n // w.page_size) for n in w.kv_lens]
    page_indptr = indptr(counts)
    shared = w.prefix // w.page_size
    num_pages = sum(counts) - shared * (len(counts) - 1 if shared else 0)
    inner = (w.num_kv_heads, w.page_size) if w.kv_layout == "HND" else (w.page_size, w.num_kv_heads)
    v = None
    if w.head_dim_vo:
        axes = (sum(w.kv_lens), w.num_kv_heads) if w.ragged else (num_pages, *inner)
        kv, v = normal(*axes, w.head_dim), normal(*axes, w.head_dim_vo)
    elif w.ragged:
        kv = normal(2, sum(w.kv_lens), w.num_kv_heads, w.head_dim)
    else:
        kv = normal(num_pages, 2, *inner, w.head_dim)
    if w.kv_dtype:
        kv = (kv / KV_SCALE).to(getattr(torch, w.kv_dtype))
    q = normal(sum(w.qo_lens), w.num_qo_heads, w.head_dim)
    order = torch.randperm(num_pages, generator=generator, device=device, dtype=torch.int32)
    if shared:
        own = order[shared:].split([n - shared for n in counts])
        order = torch.cat([x for pages in own for x in (order[:shared], pages)])
    return DeviceBatch(
        workload=w,
        q=q,
        kv=kv,
        out=torch.empty((*q.shape[:2], w.width_vo), device=device, dtype=dtype),
        lse=torch.empty(q.shape[:2], device=device, dtype=torch.float32),
        page_indptr=None if w.ragged else index(page_indptr),
        page_indices=None if w.ragged else order,
        kv_indptr=index(indptr(w.kv_lens)),
        qo_indptr=index(indptr(w.qo_lens)),
        host_page_indptr=page_indptr,
        variant=variants.bound(w, device),
        v=v,
    )
