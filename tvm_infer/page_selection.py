"""Page selection: in a decode step each KV head reads, of a long request, only the pages whose keys its query may score best.

Of every page bounds are kept, channel by channel the least and the greatest element of its keys (:func:`tvm_infer.update_page_bounds`);
they bound what a query's logits in the page can be (Quest, arXiv 2406.10774). A step scores the pages of each request and KV head,
takes the best, and attends to these lists, each head to its own (LServe, arXiv 2502.14866). Lists have at most as many pages in every
step, so that one plan made in advance serves all: where its works end the device itself corrects (docs/plan.md), and a step needs no
host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _array, _device, _ffi, ops, planning
from .errors import ArgumentError, DTypeError
from .kv_dtypes import DTYPES, SCALED_DTYPES
from .schedule import Plan

__all__ = ["PageSelection", "SelectedPages", "empty_page_bounds", "page_scores"]

_REDUCTIONS = {"max": 0, "sum": 1}
_MAX_INT32 = 2**31 - 1


def _reduction(name: Any) -> int:
    if not isinstance(name, str) or name not in _REDUCTIONS:
        raise ArgumentError(
            f'argument `group_reduce` is {name!r}; it must be "max" or "sum", over the query heads of a KV head'
        )
    return _REDUCTIONS[name]


def _bounds_dtype(value: Any) -> str:
    """`value` if it is a type that queries, and so bounds, have."""
    if isinstance(value, str) and value in DTYPES:
        return value
    raise DTypeError(f"argument `dtype` is {value!r}; it must be one of {', '.join(DTYPES)}: the queries' type")


def _integer(value: Any, name: str, least: int) -> int:
    number = planning._as_int(value, name)
    if number < least:
        raise ArgumentError(f"argument `{name}` is {number}; it must be at least {least}")
    if number > _MAX_INT32:
        raise ArgumentError(f"argument `{name}` is {number}; it must fit in 32 bits: at most {_MAX_INT32}")
    return number


def _shape(tensor: Any) -> list[int]:
    return [int(n) for n in getattr(tensor, "shape", ())]  # not all that packed functions take has one


def empty_page_bounds(kv_cache: Any, *, kv_layout: str = "HND", dtype: str | None = None) -> Any:
    """Room for the bounds of a cache's pages: [num_pages, 2, num_kv_heads, head_dim], of the cache's kind and device, uninitialised.

    dtype : the queries' ("bfloat16"), which a cache of 8 bits does not say; default: the cache's. Bounds of a page are there once a
    token was appended to it with `page_bounds=`; those of pages that hold keys already :func:`tvm_infer.update_page_bounds` makes.

    Raises
    ------
    ArgumentError : no cache; `dtype` left out beside a cache of 8 bits. DTypeError : a `dtype` that queries do not have.
    """
    if isinstance(kv_cache, (tuple, list)) and len(kv_cache) != 2:
        raise ArgumentError(
            f"argument `kv_cache` is a {type(kv_cache).__name__} of {len(kv_cache)}; it must be a cache of rank 5, or (k_cache, "
            "v_cache) of rank 4 each"
        )
    first = _array.as_tensor(kv_cache[0] if isinstance(kv_cache, (tuple, list)) else kv_cache, "kv_cache")
    if kv_layout not in ("HND", "NHD"):
        raise ArgumentError(f'argument `kv_layout` is {kv_layout!r}; it must be "HND" or "NHD"')
    shape = _shape(first)
    if len(shape) not in (4, 5):
        raise ArgumentError(
            f"argument `kv_cache` has shape {shape}; it must be a cache of rank 5, or (k_cache, v_cache) of rank 4 each"
        )
    own = _array.dtype_name(first)
    if dtype is None and own in SCALED_DTYPES:
        raise ArgumentError(
            f"argument `dtype` is None, and `kv_cache` is of {own}; bounds are of the queries' type: name that, one of "
            f"{', '.join(DTYPES)}"
        )
    if dtype is None and own not in DTYPES:
        raise DTypeError(
            f"argument `kv_cache` has dtype {own}; it must be one of {', '.join((*DTYPES, *SCALED_DTYPES))}"
        )
    name = own if dtype is None else _bounds_dtype(dtype)
    num_kv_heads = shape[-3 if kv_layout == "HND" else -2]
    return _array.empty_like(first, (shape[0], 2, num_kv_heads, shape[-1]), name)


def _most_pages(kv_len: Any, page_size: int) -> int:
    """Pages of the longest request, of lengths on the host."""
    dtype = _array.dtype_name(kv_len)
    if dtype != "int32":
        raise DTypeError(f"argument `kv_len` has dtype {dtype}; it must be int32")
    longest = int(np.max(np.asarray(_array.on_host(kv_len, dtype)), initial=0))
    return -(-longest // page_size)


def page_scores(
    q: Any,
    page_bounds: Any,
    *,
    kv_len: Any,
    kv_page_indptr: Any,
    kv_page_indices: Any,
    page_size: int,
    max_pages: int | None = None,
    group_reduce: str = "max",
    out: Any = None,
) -> Any:
    """What the logits of each page's keys can be, at most: sum over channels of max(q * least, q * greatest) (Quest, section 3.3).

    Parameters
    ----------
    q : [num_requests, num_qo_heads, head_dim], one query token a request; of the type of `page_bounds`.
    page_bounds : [num_pages, 2, num_kv_heads, head_dim]. kv_len : int32 [num_requests], on the device of `q`, as the page table.
    page_size : tokens a page. max_pages : pages of a request, at most; may be left out with `out`, and on the host.
    group_reduce : "max" or "sum", of the scores of the query heads that share a KV head.
    out : float32 [num_requests, num_kv_heads, max_pages]; allocated if None.

    Returns
    -------
    out : entry [r, h, i] is the score of page i of request r, without sm_scale and, of a cache of 8 bits, without k_scale. NaN where
    the query or the bounds have one; NaN or +inf where bounds are infinite. Entries behind a request's pages are left as they are: with
    `out` None, anything.

    Raises
    ------
    ArgumentError : shapes that do not fit, a negative kv_len, more pages than room (on cuda such a request has no scores). DTypeError :
    bounds of another type than `q`. ExecutorError : float32 on cuda.
    """
    is_sum, page_size = _reduction(group_reduce), _integer(page_size, "page_size", 1)
    q_tensor, bounds = _array.as_tensor(q, "q"), _array.as_tensor(page_bounds, "page_bounds")
    lengths, indptr, indices = ops._tables(
        q, kv_len=kv_len, kv_page_indptr=kv_page_indptr, kv_page_indices=kv_page_indices
    )
    if out is None:
        for tensor, name, dims in (
            (bounds, "page_bounds", ("num_pages", "2", "num_kv_heads", "head_dim")),
            (lengths, "kv_len", ("num_requests",)),
        ):
            if len(_shape(tensor)) != len(dims):
                raise ArgumentError(f"argument `{name}` has shape {_shape(tensor)}; it must be [{', '.join(dims)}]")
        if max_pages is None:
            if _device.cuda_index(q) is not None:
                raise ArgumentError(
                    "argument `max_pages` is None; on cuda the host does not see kv_len: say how many pages a request has at most"
                )
            max_pages = _most_pages(lengths, page_size)
        shape = (int(lengths.shape[0]), int(bounds.shape[2]), _integer(max_pages, "max_pages", 0))
        out = _array.empty_like(q, shape, "float32")
    _ffi.func("page_scores")(
        q_tensor,
        bounds,
        lengths,
        indptr,
        indices,
        page_size,
        is_sum,
        0,
        _array.as_tensor(out, "out", output=True),
    )
    return out


@dataclass(frozen=True, eq=False)
class SelectedPages:
    """What :meth:`PageSelection.select` found: attention over these pages is ``attention(q, kv_cache, pages.plan, **pages.tables)``.

    plan : the Plan of the lists. kv_page_indptr : int32 [num_requests * num_kv_heads + 1], where each list begins.
    kv_page_indices : int32 [num_requests * num_kv_heads * num_pages]: list ``r * num_kv_heads + h`` of request r and KV head h, pages
    in the order of their keys. Entries behind a list's last page are anything. All are the selection's own: the next select
    overwrites them.
    """

    plan: Plan
    kv_page_indptr: Any
    kv_page_indices: Any

    @property
    def tables(self) -> dict[str, Any]:
        """The page table by the names of attention's arguments."""
        return {"kv_page_indptr": self.kv_page_indptr, "kv_page_indices": self.kv_page_indices}


class PageSelection:
    """Selects, for each request and KV head of a decode step, at most `num_pages` of the request's pages; makes the plan for them.

    One object serves all layers and all steps: its buffers are at fixed addresses, nothing is planned or allocated by :meth:`select`,
    and on cuda the host takes no part, so that append, select and attention may be captured in one graph and replayed as requests grow.

    Parameters
    ----------
    num_requests : requests of a step, one query token each. Fewer are padded: a request with kv_len 0 has an empty list.
    max_pages : pages that a request has, at most (of its scores there is room for so many).
    num_pages : pages of a list; a request with no more is read whole. num_sink_pages : first pages, always taken, >= 0.
        num_recent_pages : last pages, always taken, >= 1: the page that is being filled is among them. Both together at most num_pages;
        the other pages are those of the best scores between, the first of equal ones.
    page_size, num_qo_heads, num_kv_heads, head_dim, head_dim_vo, dtype, kv_dtype, num_ctas, fixed_split_size, tile_table, device :
        as of the cache, and in :func:`tvm_infer.plan`.
    group_reduce : how a KV head's query heads agree on a score, "max" or "sum".

    Attributes
    ----------
    plan : the Plan, for `num_pages` full pages a list until :meth:`select` corrects it; on cuda the host's copy stays so.
    workspace : float32, enough for attention with this plan.

    Raises
    ------
    ArgumentError : numbers out of their ranges. Others as :func:`tvm_infer.plan`.
    """

    def __init__(
        self,
        *,
        num_requests: int,
        max_pages: int,
        num_pages: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        num_sink_pages: int = 1,
        num_recent_pages: int = 1,
        page_size: int = 16,
        dtype: str = "float32",
        kv_dtype: str | None = None,
        head_dim_vo: int | None = None,
        group_reduce: str = "max",
        num_ctas: int | None = None,
        fixed_split_size: int = 0,
        tile_table: Any = None,
        device: Any = None,
    ) -> None:
        # Python's integers, which do not overflow as numpy's do
        num_requests = _integer(num_requests, "num_requests", 0)
        max_pages, num_pages = _integer(max_pages, "max_pages", 1), _integer(num_pages, "num_pages", 1)
        page_size = _integer(page_size, "page_size", 1)
        num_sink_pages = _integer(num_sink_pages, "num_sink_pages", 0)
        num_recent_pages = _integer(num_recent_pages, "num_recent_pages", 1)
        num_qo_heads = _integer(num_qo_heads, "num_qo_heads", 1)
        num_kv_heads, head_dim = _integer(num_kv_heads, "num_kv_heads", 1), _integer(head_dim, "head_dim", 1)
        head_dim_vo = None if head_dim_vo is None else _integer(head_dim_vo, "head_dim_vo", 1)
        if num_sink_pages + num_recent_pages > num_pages:
            raise ArgumentError(
                f"arguments `num_sink_pages` and `num_recent_pages` are {num_sink_pages} and {num_recent_pages}, more than a list's "
                f"num_pages, {num_pages}; take fewer, or let lists have more"
            )
        if num_pages * page_size > _MAX_INT32 or max_pages * page_size > _MAX_INT32:
            raise ArgumentError(
                f"arguments `num_pages` and `max_pages` are {num_pages} and {max_pages} pages of {page_size} tokens; positions are of "
                f"32 bits: at most {_MAX_INT32 // page_size}"
            )
        num_lists = num_requests * num_kv_heads
        if num_lists * num_pages > _MAX_INT32:
            raise ArgumentError(
                f"argument `num_pages` is {num_pages} for {num_lists} lists; a page table has at most {_MAX_INT32} entries: take fewer"
            )
        self._is_sum, self._dtype = _reduction(group_reduce), _bounds_dtype(dtype)
        self._q_shape = [num_requests, num_qo_heads, head_dim]
        self._bounds_shape: list[Any] = ["num_pages", 2, num_kv_heads, head_dim]
        self.num_pages, self.page_size = num_pages, page_size
        self.num_sink_pages, self.num_recent_pages = num_sink_pages, num_recent_pages
        target = _device.parse(device)
        self.plan = planning.plan(
            np.arange(num_requests + 1, dtype=np.int32),
            np.full((num_requests, num_kv_heads), num_pages * page_size, np.int32),
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            kv_dtype=kv_dtype,
            head_dim_vo=head_dim_vo,
            causal=False,  # the query is behind all keys of its lists
            num_ctas=num_ctas,
            fixed_split_size=fixed_split_size,
            tile_table=tile_table,
            device=device,
        )
        begins = np.arange(num_lists + 1, dtype=np.int64) * num_pages
        scores = (num_requests, num_kv_heads, max_pages)
        rows = self.plan.num_partial_rows * ((head_dim_vo or head_dim) + 1)
        if target.kind == "cuda":
            self._planned = _array.empty_on(target, self.plan.buffer.shape, "int32")
            _ffi.func("plan_upload")(self.plan.buffer, self._planned)
            self._words = self.plan.device_buffer
            self._indptr = _array.index_on(target, begins.astype(np.int32))
            self._indices = _array.empty_on(target, (num_lists * num_pages,), "int32")
            self._scores = _array.empty_on(target, scores, "float32")
            self.workspace = _array.empty_on(target, (rows,), "float32")
        else:
            self._planned, self._words = self.plan.buffer.copy(), self.plan.buffer
            self._indptr = begins.astype(np.int32)
            self._indices = np.empty(num_lists * num_pages, np.int32)
            self._scores = np.empty(scores, np.float32)
            self.workspace = np.empty(rows, np.float32)

    def _check(self, tensor: Any, name: str, expected: list[Any], dims: str) -> None:
        """Raise unless the type is the selection's, and the shape as expected; of pages there may be any number."""
        shape = _shape(tensor)
        if len(shape) != len(expected) or any(n != m for n, m in zip(shape, expected, strict=True) if m != "num_pages"):
            raise ArgumentError(
                f"argument `{name}` has shape {shape}; the selection was made for [{', '.join(map(str, expected))}] ({dims}): pass "
                "that, or make a PageSelection for these numbers"
            )
        dtype = _array.dtype_name(tensor)
        if dtype != self._dtype:
            raise DTypeError(
                f"argument `{name}` has dtype {dtype}; the selection was made for {self._dtype}: pass that, or make a PageSelection "
                f"with dtype={dtype!r}"
            )

    def select(
        self, q: Any, page_bounds: Any, *, kv_len: Any, kv_page_indptr: Any, kv_page_indices: Any
    ) -> SelectedPages:
        """The pages that the queries of a step read next. Two launches on cuda.

        Parameters
        ----------
        q : [num_requests, num_qo_heads, head_dim]: the step's queries, rotated as the keys are.
        page_bounds : [num_pages, 2, num_kv_heads, head_dim], with the step's new tokens in it.
        kv_len, kv_page_indptr, kv_page_indices : int32, the requests' own lengths, new tokens included, and page table, on the device
            of `q`.

        Raises
        ------
        ArgumentError, DTypeError : an argument of another shape, type or place than the selection was made for; on the host also a
        request of more pages than its table or `max_pages`. On cuda such a request's lists are left empty (O = 0, LSE = -inf), and
        :func:`tvm_infer.plan_status` of the plan raises.
        """
        queries, bounds = _array.as_tensor(q, "q"), _array.as_tensor(page_bounds, "page_bounds")
        self._check(q, "q", self._q_shape, "num_requests, num_qo_heads, head_dim")
        self._check(page_bounds, "page_bounds", self._bounds_shape, "num_pages, 2, num_kv_heads, head_dim")
        lengths, indptr, indices = ops._tables(
            q, kv_len=kv_len, kv_page_indptr=kv_page_indptr, kv_page_indices=kv_page_indices
        )
        table = (lengths, indptr, indices, self.page_size)
        _ffi.func("page_scores")(queries, bounds, *table, self._is_sum, self.num_pages, self._scores)
        _ffi.func("select_pages")(
            self._scores,
            *table,
            self.num_pages,
            self.num_sink_pages,
            self.num_recent_pages,
            self._planned,
            self._words,
            self._indices,
        )
        return SelectedPages(self.plan, self._indptr, self._indices)
