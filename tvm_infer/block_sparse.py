"""Block-sparse attention: a matrix in BSR form (block compressed rows) says which queries see which keys.

A block row is a request, and its blocks are its pages: sparse attention is paged attention over a page table that the matrix spells out
(section 3.1.1 of arXiv 2501.01005). Kernels, plan and merges are those of :func:`tvm_infer.attention`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from . import _array, _device, _ffi, ops, planning
from .errors import ArgumentError, ExecutorError, PlanMismatchError
from .schedule import Plan

__all__ = ["BlockSparsePlan", "block_sparse_attention", "plan_block_sparse"]

_MAX_INT32 = 2**31 - 1
_CUDA_PAGES, _CUDA_SCALED_PAGES = (64, 32, 16, 8, 4, 2, 1), (64, 32, 16)  # cuda/attention.cc


@dataclass(frozen=True, eq=False)
class BlockSparsePlan:
    """A plan and the page table that go with a block-sparse matrix. Made by :func:`plan_block_sparse`; serves every layer.

    plan : the Plan; its requests are the block rows.
    kv_page_indptr, kv_page_indices : int32, on the plan's device: pages of each block row.
    page_size : keys of a page. num_qo_tokens, num_kv_tokens : rows and columns of the matrix.
    """

    plan: Plan
    kv_page_indptr: Any
    kv_page_indices: Any
    page_size: int
    num_qo_tokens: int
    num_kv_tokens: int

    @property
    def density(self) -> float:
        """Part of the matrix that is within blocks."""
        rows = np.diff(self.plan.qo_indptr).astype(np.int64)
        return float(rows @ self.plan.kv_len) / max(1, self.num_qo_tokens * self.num_kv_tokens)

    def __repr__(self) -> str:
        shape = f"{self.num_qo_tokens} x {self.num_kv_tokens}"
        return f"BlockSparsePlan({shape}, density {self.density:.3f}, pages of {self.page_size}, {self.plan!r})"


class _Matrix(NamedTuple):
    """Structure of a BSR matrix, of whatever library."""

    indptr: Any
    indices: Any
    block_shape: Any
    shape: tuple[Any, Any]  # tokens; None: not known


def _describe(x: Any) -> str:
    return f"a {type(x).__module__.partition('.')[0]}.{type(x).__name__}"


def _as_matrix(x: Any, indices: Any, block_shape: Any, num_qo_tokens: Any, num_kv_tokens: Any) -> _Matrix:
    """The structure that the arguments say: a matrix of scipy or torch, or its arrays."""
    if indices is not None:
        return _Matrix(x, indices, block_shape, (num_qo_tokens, num_kv_tokens))
    if str(getattr(x, "layout", "")) == "torch.sparse_bsr":
        if x.ndim != 2:
            raise ArgumentError(
                f"argument `indptr` is a batch of BSR matrices, shape {tuple(x.shape)}; it must be one matrix, rank 2"
            )
        own = _Matrix(x.crow_indices(), x.col_indices(), tuple(x.values().shape[1:3]), tuple(x.shape))
    elif all(hasattr(x, name) for name in ("indptr", "indices", "blocksize", "shape")):
        own = _Matrix(x.indptr, x.indices, tuple(x.blocksize), tuple(x.shape))
    else:
        raise ArgumentError(
            f"argument `indptr` is {_describe(x)} without `indices`; it must be a scipy.sparse.bsr_array, a torch.sparse_bsr tensor, "
            "or the indptr of one with its `indices`, `block_shape` and `num_kv_tokens` "
            "(of other forms: `.tobsr(blocksize)`, `.to_sparse_bsr(…)`)"
        )
    given = {"block_shape": block_shape, "num_qo_tokens": num_qo_tokens, "num_kv_tokens": num_kv_tokens}
    for (name, value), has in zip(given.items(), (own.block_shape, *own.shape), strict=True):
        if value is not None and (tuple(value) if name == "block_shape" else value) != has:
            raise ArgumentError(f"argument `{name}` is {value!r}, and the matrix has {has}; leave it out")
    return own


def _indices(x: Any, name: str) -> np.ndarray:
    """Integers of a matrix's structure as int64 [n] on the host."""
    if not isinstance(x, (list, tuple, np.ndarray)) and _device.cuda_index(x) is not None:
        raise ArgumentError(
            f"argument `{name}` is {_device.describe(x)}; plans are made by the host: pass the matrix's structure from there (`.cpu()` "
            "waits for the device)"
        )
    array = np.asarray(x)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size > 0):
        raise ArgumentError(
            f"argument `{name}` has dtype {array.dtype}, rank {array.ndim}; it must hold integers, rank 1"
        )
    return array.astype(np.int64)


def _positive(value: Any, name: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentError(f"argument `{name}` is {value!r}; it must be a positive integer") from None
    if number < 1:
        raise ArgumentError(f"argument `{name}` is {number}; it must be at least 1")
    return number


def _bounds(size: Any, name: str, total: Any, total_name: str, num_blocks: int | None) -> np.ndarray:
    """int64 [num_blocks + 1]: tokens where the blocks of one side begin, and where the last ends.

    size : tokens a block, of which the last may have less; or of each block. num_blocks : None where `total` decides it.
    """
    if isinstance(size, (Sequence, np.ndarray)):
        sizes = np.array([_positive(n, f"{name}[{i}]") for i, n in enumerate(size)], np.int64)
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        if num_blocks is not None and len(sizes) != num_blocks:
            raise ArgumentError(f"argument `{name}` has {len(sizes)} sizes; `indptr` has {num_blocks} block rows")
        if total is not None and total != bounds[-1]:
            raise ArgumentError(f"argument `{total_name}` is {total!r}; the sizes of `{name}` make {bounds[-1]}")
    else:
        size = _positive(size, name)
        if total is None:
            if num_blocks is None:
                raise ArgumentError(
                    f"argument `{total_name}` is None; say how many there are: the last block of {size} may be short"
                )
            total = size * num_blocks
        total = planning._as_int(total, total_name)
        if total < 0:
            raise ArgumentError(f"argument `{total_name}` is {total}; it must be at least 0")
        if num_blocks is None:
            num_blocks = -(-total // size)
        if -(-total // size) != num_blocks:
            raise ArgumentError(
                f"argument `{total_name}` is {total} with {name} {size}, which is {-(-total // size)} block rows; "
                f"`indptr` has {num_blocks}"
            )
        bounds = np.minimum(np.arange(num_blocks + 1, dtype=np.int64) * size, total)
    if bounds[-1] > _MAX_INT32:
        raise ArgumentError(f"argument `{total_name}` is {bounds[-1]}; tokens are numbered by 32 bits")
    return bounds


def _check_structure(indptr: np.ndarray, indices: np.ndarray, num_columns: int) -> np.ndarray:
    """Raise ArgumentError unless each block is within the matrix, and there once; returns the blocks' rows."""
    if indptr[0] != 0:
        raise ArgumentError(f"argument `indptr` starts at {indptr[0]}; it must start at 0")
    drops = np.flatnonzero(np.diff(indptr) < 0)
    if drops.size:
        i = int(drops[0])
        raise ArgumentError(
            f"argument `indptr` decreases from {indptr[i]} to {indptr[i + 1]} at entry {i + 1}; it must not decrease"
        )
    if indptr[-1] > len(indices):
        raise ArgumentError(f"argument `indptr` ends at {indptr[-1]}, but `indices` has {len(indices)} entries")
    indices = indices[: indptr[-1]]
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    outside = np.flatnonzero((indices < 0) | (indices >= num_columns))
    if outside.size:
        i = int(outside[0])
        raise ArgumentError(
            f"argument `indices` has block {indices[i]} at entry {i} (block row {rows[i]}); blocks must be in [0, {num_columns})"
        )
    order = np.lexsort((indices, rows))
    twice = np.flatnonzero((np.diff(rows[order]) == 0) & (np.diff(indices[order]) == 0))
    if twice.size:
        i = int(order[twice[0]])
        raise ArgumentError(
            f"argument `indices` has block {indices[i]} twice in block row {rows[i]}; blocks of a row must not overlap: its keys would "
            "count double. Sum up duplicates first"
        )
    return rows


def _page_size(bounds: np.ndarray, asked: int | None, device: _device.Device, kv_dtype: str | None) -> int:
    """The largest page of the executor that blocks begin and end with."""
    common = int(np.gcd.reduce(bounds))  # 0 of no keys
    if asked is not None:
        asked = _positive(asked, "page_size")
        if common % asked:
            raise ArgumentError(
                f"argument `page_size` is {asked}; it must divide the first key of every block and the number of keys, which have "
                f"{common} in common"
            )
        return asked
    if device.kind != "cuda":
        return max(common, 1)
    pages = _CUDA_PAGES if kv_dtype is None else _CUDA_SCALED_PAGES
    page = next((page for page in pages if common % page == 0), None)
    if page is None:
        raise ExecutorError(
            f"argument `block_shape` and `num_kv_tokens` have {common} in common, and the cuda executor has pages of "
            f"{', '.join(map(str, pages))} keys for kv_dtype {kv_dtype!r}; let blocks begin, and the keys end, at "
            "multiples of one of these"
        )
    return page


def plan_block_sparse(
    indptr: Any,
    indices: Any = None,
    block_shape: Any = None,
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    head_dim_vo: int | None = None,
    num_kv_tokens: int | None = None,
    num_qo_tokens: int | None = None,
    dtype: str = "float32",
    kv_dtype: str | None = None,
    device: Any = None,
    page_size: int | None = None,
    num_ctas: int | None = None,
    fixed_split_size: int = 0,
    tile_table: Any = None,
) -> BlockSparsePlan:
    """Schedule attention in which a query sees the keys of the blocks of its block row, and no others (there is no causal mask).

    Parameters
    ----------
    indptr : int [num_block_rows + 1], host: block row i has blocks ``indices[indptr[i] : indptr[i + 1]]``. Or a matrix in BSR form, of
        which only the structure is looked at: scipy.sparse.bsr_array or bsr_matrix, or a torch.sparse_bsr tensor; the next three and
        `num_qo_tokens` are then its own.
    indices : int, host: block columns, each once in a row. In any order: a softmax has none, but for rounding.
    block_shape : (B_r, B_c), query tokens and keys of a block, any positive integers; B_c = 1 is vector-sparse. The last block row and
        column may be short. Or a list of sizes in place of either, one for each block row or column: blocks of variable size.
    num_kv_tokens : columns of the matrix, keys. num_qo_tokens : its rows, query tokens; default: those of whole blocks.
    page_size : keys of a page of the table; default: the largest that blocks begin and the keys end at multiples of, and for which
        there is a kernel. For keys in a paged cache, its page size.
    Others as in :func:`tvm_infer.plan`.

    Returns
    -------
    BlockSparsePlan : for :func:`block_sparse_attention`. With a cuda `device` plan and tables are copied there.

    Raises
    ------
    ArgumentError : an indptr that does not start at 0, decreases or has another number of rows than `num_qo_tokens`; a block outside
        the matrix or twice in a row; sizes below 1; structure that lies on a device. Others as :func:`tvm_infer.plan`.
    """
    target = _device.parse(device)
    matrix = _as_matrix(indptr, indices, block_shape, num_qo_tokens, num_kv_tokens)
    try:
        row_size, column_size = matrix.block_shape
    except (TypeError, ValueError):
        raise ArgumentError(
            f"argument `block_shape` is {matrix.block_shape!r}; it must be a pair (B_r, B_c), each a number of tokens or a list of such"
        ) from None
    starts, blocks = _indices(matrix.indptr, "indptr"), _indices(matrix.indices, "indices")
    if len(starts) < 1:
        raise ArgumentError("argument `indptr` is empty; it has one entry more than block rows")
    rows = _bounds(row_size, "block_shape[0]", matrix.shape[0], "num_qo_tokens", len(starts) - 1)
    columns = _bounds(column_size, "block_shape[1]", matrix.shape[1], "num_kv_tokens", None)
    row_of = _check_structure(starts, blocks, len(columns) - 1)
    blocks = blocks[: starts[-1]]
    page = _page_size(columns, page_size, target, kv_dtype)
    # Pages of the blocks, in the order of blocks.
    first, count = columns[blocks] // page, (columns[blocks + 1] - columns[blocks]) // page
    pages = np.arange(count.sum()) + np.repeat(first - (np.cumsum(count) - count), count)
    page_indptr = np.concatenate([[0], np.cumsum(count)])[starts]
    if len(pages) > _MAX_INT32:
        raise ArgumentError(
            f"argument `indices` makes a table of {len(pages)} pages of {page} keys; it may have {_MAX_INT32}: plan fewer block "
            "rows at once"
        )
    kv_len = np.bincount(row_of, count, len(starts) - 1).astype(np.int64) * page
    plan = planning.plan(
        rows.astype(np.int32),
        kv_len.astype(np.int32),
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        head_dim_vo=head_dim_vo,
        dtype=dtype,
        kv_dtype=kv_dtype,
        causal=False,
        num_ctas=num_ctas,
        fixed_split_size=fixed_split_size,
        tile_table=tile_table,
        device=device,
    )
    tables = [page_indptr.astype(np.int32), pages.astype(np.int32)]
    if target.kind == "cuda":
        tables = [_array.index_on(target, table) for table in tables]
    return BlockSparsePlan(plan, tables[0], tables[1], page, int(rows[-1]), int(columns[-1]))


def _as_pages(x: Any, name: str, plan: BlockSparsePlan, token_axis: int) -> Any:
    """Keys or values [num_kv_tokens, num_kv_heads, head_dim] as pages [num_pages, page_size, …], not copied; of pages those given."""
    shape: Any = getattr(x, "shape", None)
    if shape is None or len(shape) not in (3, 4):
        what = f"is a {type(x).__name__}" if shape is None else f"has shape {tuple(shape)}"
        raise ArgumentError(
            f"argument `{name}` {what}; it must be a tensor [num_kv_tokens, num_kv_heads, head_dim], or pages of rank 4"
        )
    if len(shape) == 4:
        if shape[token_axis] != plan.page_size:
            raise PlanMismatchError(
                f"argument `{name}` has pages of {shape[token_axis]} keys, and the plan's table is of pages of {plan.page_size}; "
                f"plan with page_size={shape[token_axis]}"
            )
        if shape[0] * plan.page_size < plan.num_kv_tokens:
            raise PlanMismatchError(
                f"argument `{name}` has {shape[0]} pages of {plan.page_size} keys; the plan was made for {plan.num_kv_tokens} keys"
            )
        return x
    if shape[0] != plan.num_kv_tokens:
        raise PlanMismatchError(
            f"argument `{name}` has {shape[0]} keys, shape {tuple(shape)}; the plan was made for {plan.num_kv_tokens}"
        )
    pages = (plan.num_kv_tokens // plan.page_size, plan.page_size)
    if _array.is_torch(x):
        return x.unflatten(0, pages)
    if isinstance(x, np.ndarray):
        return x.reshape(*pages, *shape[1:])  # parting an axis never copies
    return _ffi.func("split_rows")(_array.as_tensor(x, name), plan.page_size)


def block_sparse_attention(
    q: Any,
    k: Any,
    v: Any,
    plan: BlockSparsePlan,
    *,
    kv_layout: str = "NHD",
    sm_scale: float | None = None,
    out: Any = None,
    lse: Any = None,
    return_lse: bool = False,
    workspace: Any = None,
    k_scale: Any = 1.0,
    v_scale: Any = 1.0,
) -> Any:
    """Attention in which each query sees the keys of its block row.

    Parameters
    ----------
    q : [num_qo_tokens, num_qo_heads, head_dim]. k, v : [num_kv_tokens, num_kv_heads, head_dim], `v` and the output perhaps narrower
        (head_dim_vo); or pages of ``plan.page_size`` keys, [num_pages, page_size, num_kv_heads, head_dim] or with kv_layout "HND"
        [num_pages, num_kv_heads, page_size, head_dim]: key j is then slot ``j % page_size`` of page ``j // page_size``.
    plan : from :func:`plan_block_sparse`.
    Others as in :func:`tvm_infer.attention`. A query whose block row has no block has O = 0, LSE = -inf. There are no variants: they
    are told positions, which the keys of a block row do not have.

    Raises
    ------
    PlanMismatchError : `q`, `k` or `v` have other numbers of tokens than the plan was made for. Others as :func:`tvm_infer.attention`.
    """
    if not isinstance(plan, BlockSparsePlan):
        raise ArgumentError(
            f"argument `plan` is a {type(plan).__name__}; it must be a BlockSparsePlan, of tvm_infer.plan_block_sparse"
        )
    if kv_layout not in ("HND", "NHD"):
        raise ArgumentError(f'argument `kv_layout` is {kv_layout!r}; it must be "HND" or "NHD"')
    shape: Any = getattr(q, "shape", ())
    if len(shape) == 3 and shape[0] != plan.num_qo_tokens:
        raise PlanMismatchError(
            f"argument `q` has {shape[0]} tokens, shape {tuple(shape)}; the plan was made for {plan.num_qo_tokens}"
        )
    ranks = {name: len(getattr(x, "shape", ())) for name, x in (("k", k), ("v", v))}
    if ranks["k"] != ranks["v"]:
        raise ArgumentError(f"arguments `k` and `v` have ranks {ranks['k']} and {ranks['v']}; they must have the same")
    if ranks["k"] == 3:
        kv_layout = "NHD"
    token_axis = 1 if kv_layout == "NHD" else 2
    return ops.attention(
        q,
        tuple(_as_pages(x, name, plan, token_axis) for name, x in (("k", k), ("v", v))),
        plan.plan,
        kv_page_indptr=plan.kv_page_indptr,
        kv_page_indices=plan.kv_page_indices,
        kv_layout=kv_layout,
        sm_scale=sm_scale,
        out=out,
        lse=lse,
        return_lse=return_lse,
        workspace=workspace,
        k_scale=k_scale,
        v_scale=v_scale,
    )
