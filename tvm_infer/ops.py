"""The packed functions as Python functions: outputs allocated unless given, arguments checked in C++.

Tensors are torch tensors, numpy arrays or TVM tensors; none is copied, strides and offsets are honoured (head_dim must be
contiguous). Outputs are of the kind of `q`. Notation follows arXiv 2501.01005.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from . import _array, _ffi
from .errors import ArgumentError
from .schedule import Plan

_LAYOUTS = {"HND": 0, "NHD": 1}


class WorkspaceSize(NamedTuple):
    """What a batch within given limits needs at most.

    plan_bytes : bytes of the plan buffer. partial_rows : rows of fp32 partial results; a workspace holds
    ``partial_rows * (head_dim + 1)`` floats.
    """

    plan_bytes: int
    partial_rows: int

    def workspace_floats(self, head_dim: int) -> int:
        """float32 elements of the `workspace` argument for this head_dim."""
        return self.partial_rows * (head_dim + 1)


def cpu_tile_table(dtype: str = "float32", head_dim: int = 128) -> tuple[int, ...]:
    """The CPU executor's tile classes with their measured costs, five integers each (see plan.h, TileClass)."""
    return tuple(_ffi.func("cpu_tile_table")(dtype, head_dim))


def num_threads() -> int:
    """Threads of the CPU executor: TVM_INFER_NUM_THREADS, else the processors this process may run on."""
    return int(_ffi.func("cpu_info")().split()[1])


def _plan_settings(num_ctas: int | None, tile_table: Any, dtype: str, head_dim: int) -> tuple[int, Any]:
    return (
        num_threads() if num_ctas is None else num_ctas,
        tuple(tile_table) if tile_table is not None else cpu_tile_table(dtype, head_dim),
    )


def workspace_size(
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_requests: int,
    max_tokens: int,
    max_kv_tokens: int | None = None,
    dtype: str = "float32",
    causal: bool = True,
    window_left: int = -1,
    num_ctas: int | None = None,
    fixed_split_size: int = 0,
    tile_table: Any = None,
) -> WorkspaceSize:
    """Exact upper bounds of what plans within the limits need.

    Parameters
    ----------
    max_requests, max_tokens : requests and query tokens of one step, at most.
    max_kv_tokens : keys of all requests together; needed only with `fixed_split_size > 0`, where plans grow with it.
    Others as in :func:`plan`.
    """
    if fixed_split_size > 0 and max_kv_tokens is None:
        raise ArgumentError(
            f"argument `max_kv_tokens` is None with fixed_split_size {fixed_split_size}; a plan with a fixed split size grows "
            "with the number of keys: say how many there are at most"
        )
    num_ctas, tile_table = _plan_settings(num_ctas, tile_table, dtype, head_dim)
    plan_bytes, partial_rows = _ffi.func("plan_capacity")(
        num_qo_heads,
        num_kv_heads,
        num_ctas,
        int(causal),
        window_left,
        fixed_split_size,
        tile_table,
        max_requests,
        max_tokens,
        max_kv_tokens or 0,
    )
    return WorkspaceSize(int(plan_bytes), int(partial_rows))


def plan(
    qo_indptr: Any,
    kv_len: Any,
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: str = "float32",
    causal: bool = True,
    window_left: int = -1,
    num_ctas: int | None = None,
    fixed_split_size: int = 0,
    tile_table: Any = None,
    out: np.ndarray | None = None,
    max_partial_rows: int | None = None,
) -> Plan:
    """Schedule a batch: who computes which rows against which keys (section 3.3.1, Algorithm 1).

    A plan depends on lengths and heads only, so one plan serves every layer of a model.

    Parameters
    ----------
    qo_indptr : int32 [num_requests + 1], host; query tokens of request r are [qo_indptr[r], qo_indptr[r + 1]). A list will do.
    kv_len : int32 [num_requests], host; keys of each request, its new tokens included.
    num_qo_heads, num_kv_heads : the first is a multiple of the second.
    head_dim, dtype : choose the executor's tile table; the plan itself does not depend on them otherwise.
    causal : a query sees no key after its own position; query token t of request r stands at
        ``kv_len[r] - (qo_indptr[r + 1] - t)``.
    window_left : keys before its own position that a query sees; -1 for all.
    num_ctas : work queues to fill; default: the CPU executor's threads.
    fixed_split_size : 0 splits KV where that shortens the makespan; > 0 cuts KV at its multiples, so that a row's result does
        not depend on the rest of the batch; -1 never splits.
    tile_table : five integers per tile class; default: the CPU executor's.
    out : int32 buffer to write the plan to (see :func:`workspace_size`); default: one is allocated.
    max_partial_rows : partial rows that the workspace at hand has; default: no limit with an allocated plan.

    Raises
    ------
    ArgumentError : an indptr that does not start at 0 or decreases, kv_len shorter than the new tokens, bad heads.
    WorkspaceError : `out` or `max_partial_rows` is too small; says what is needed.
    """
    qo_indptr, kv_len = _array.as_index(qo_indptr, "qo_indptr"), _array.as_index(kv_len, "kv_len")
    num_ctas, tile_table = _plan_settings(num_ctas, tile_table, dtype, head_dim)
    if out is None:
        host_indptr = np.asarray(qo_indptr)
        size = workspace_size(
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_requests=len(host_indptr) - 1,
            max_tokens=max(int(host_indptr[-1]), 0) if host_indptr.size else 0,
            max_kv_tokens=int(np.maximum(np.asarray(kv_len, dtype=np.int64), 0).sum()),
            causal=causal,
            window_left=window_left,
            num_ctas=num_ctas,
            fixed_split_size=fixed_split_size,
            tile_table=tile_table,
        )
        out = np.zeros(size.plan_bytes // 4, np.int32)
        max_partial_rows = size.partial_rows if max_partial_rows is None else max_partial_rows
    elif max_partial_rows is None:
        raise ArgumentError(
            "argument `max_partial_rows` is None with a given `out`; say how many partial rows the workspace has "
            "(tvm_infer.workspace_size gives both)"
        )
    _ffi.func("plan")(
        qo_indptr,
        kv_len,
        num_qo_heads,
        num_kv_heads,
        num_ctas,
        int(causal),
        window_left,
        fixed_split_size,
        tile_table,
        max_partial_rows,
        _array.as_tensor(out, "out", output=True),
    )
    return Plan(out)


def _plan_tensor(plan: Any) -> Any:
    return plan.buffer if isinstance(plan, Plan) else _array.as_tensor(plan, "plan")


def _scale(sm_scale: float | None, q: Any) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if sm_scale is None else float(sm_scale)


def _cache(kv_cache: Any, kv_layout: str) -> tuple[Any, Any, int]:
    if kv_layout not in _LAYOUTS:
        raise ArgumentError(f'argument `kv_layout` is {kv_layout!r}; it must be "HND" or "NHD"')
    if isinstance(kv_cache, (tuple, list)):
        if len(kv_cache) != 2:
            raise ArgumentError(
                f"argument `kv_cache` is a tuple of {len(kv_cache)}; it must be one tensor or (k_cache, v_cache)"
            )
        k_cache, v_cache = kv_cache
        return (
            _array.as_tensor(k_cache, "k_cache", output=False),
            _array.as_tensor(v_cache, "v_cache"),
            _LAYOUTS[kv_layout],
        )
    return _array.as_tensor(kv_cache, "kv_cache"), None, _LAYOUTS[kv_layout]


def _outputs(q: Any, plan: Any, workspace: Any, out: Any, lse: Any, return_lse: bool) -> tuple[Any, Any, Any]:
    if len(q.shape) != 3:
        raise ArgumentError(f"argument `q` has shape {tuple(q.shape)}; it must be [num_tokens, num_qo_heads, head_dim]")
    if workspace is None:
        parsed = plan if isinstance(plan, Plan) else Plan(np.asarray(plan))
        workspace = np.empty(parsed.num_partial_rows * (q.shape[-1] + 1), np.float32)
    if out is None:
        out = _array.empty_like(q, tuple(q.shape))
    if lse is None and return_lse:
        lse = _array.empty_like(q, tuple(q.shape[:2]), "float32")
    return workspace, out, lse


def attention(
    q: Any,
    kv_cache: Any,
    plan: Any,
    *,
    kv_page_indptr: Any,
    kv_page_indices: Any,
    kv_layout: str = "HND",
    sm_scale: float | None = None,
    out: Any = None,
    lse: Any = None,
    return_lse: bool = False,
    workspace: Any = None,
) -> Any:
    """Attention of ragged queries over a paged KV cache, as the plan schedules it (section 3.2).

    Parameters
    ----------
    q : [num_tokens, num_qo_heads, head_dim]; float32, float16 or bfloat16, as the cache.
    kv_cache : [num_pages, 2, num_kv_heads, page_size, head_dim], or (k_cache, v_cache) of [num_pages, num_kv_heads, page_size,
        head_dim] each; with kv_layout "NHD" the last three are page_size, num_kv_heads, head_dim.
    plan : from :func:`plan`, for these lengths.
    kv_page_indptr, kv_page_indices : int32; request r's pages are kv_page_indices[kv_page_indptr[r] : kv_page_indptr[r + 1]].
    sm_scale : factor on q·k; default 1 / sqrt(head_dim).
    out : as `q`; allocated if None. lse : float32 [num_tokens, num_qo_heads]; allocated if None and `return_lse`.
    workspace : float32 scratch for partial results, at least ``plan.num_partial_rows * (head_dim + 1)``; allocated if None.

    Returns
    -------
    out, or (out, lse) with `return_lse` or a given `lse`. LSE is the natural logarithm of the sum of exponentials; a row that
    sees no key has O = 0 and LSE = -inf.
    """
    workspace, out, lse = _outputs(q, plan, workspace, out, lse, return_lse)
    k_cache, v_cache, layout = _cache(kv_cache, kv_layout)
    _ffi.func("paged_attention")(
        _plan_tensor(plan),
        _array.as_tensor(q, "q"),
        k_cache,
        v_cache,
        layout,
        _array.as_index(kv_page_indptr, "kv_page_indptr"),
        _array.as_index(kv_page_indices, "kv_page_indices"),
        _scale(sm_scale, q),
        _array.as_tensor(workspace, "workspace", output=True),
        _array.as_tensor(out, "out", output=True),
        None if lse is None else _array.as_tensor(lse, "lse", output=True),
    )
    return out if lse is None else (out, lse)


def ragged_attention(
    q: Any,
    k: Any,
    v: Any,
    plan: Any,
    *,
    kv_indptr: Any,
    sm_scale: float | None = None,
    out: Any = None,
    lse: Any = None,
    return_lse: bool = False,
    workspace: Any = None,
) -> Any:
    """Attention of ragged queries over ragged keys without pages.

    k, v : [num_kv_tokens, num_kv_heads, head_dim]. kv_indptr : int32 [num_requests + 1]; request r's keys are rows
    kv_indptr[r] : kv_indptr[r + 1]. Others as in :func:`attention`.
    """
    workspace, out, lse = _outputs(q, plan, workspace, out, lse, return_lse)
    _ffi.func("ragged_attention")(
        _plan_tensor(plan),
        _array.as_tensor(q, "q"),
        _array.as_tensor(k, "k"),
        _array.as_tensor(v, "v"),
        _array.as_index(kv_indptr, "kv_indptr"),
        _scale(sm_scale, q),
        _array.as_tensor(workspace, "workspace", output=True),
        _array.as_tensor(out, "out", output=True),
        None if lse is None else _array.as_tensor(lse, "lse", output=True),
    )
    return out if lse is None else (out, lse)


def append(
    k: Any,
    v: Any,
    kv_cache: Any,
    *,
    qo_indptr: Any,
    kv_len: Any,
    kv_page_indptr: Any,
    kv_page_indices: Any,
    kv_layout: str = "HND",
) -> None:
    """Write new keys and values at the end of each request, in place.

    k, v : [num_tokens, num_kv_heads, head_dim]. Token t of request r goes to position ``kv_len[r] - (qo_indptr[r + 1] - t)``:
    `kv_len` counts the new tokens. Others as in :func:`attention`.
    """
    k_cache, v_cache, layout = _cache(kv_cache, kv_layout)
    _ffi.func("append")(
        _array.as_tensor(k, "k"),
        _array.as_tensor(v, "v"),
        _array.as_index(qo_indptr, "qo_indptr"),
        _array.as_index(kv_len, "kv_len"),
        k_cache,
        v_cache,
        layout,
        _array.as_index(kv_page_indptr, "kv_page_indptr"),
        _array.as_index(kv_page_indices, "kv_page_indices"),
    )


def append_attention(
    q: Any,
    k: Any,
    v: Any,
    kv_cache: Any,
    plan: Any,
    *,
    kv_page_indptr: Any,
    kv_page_indices: Any,
    kv_layout: str = "HND",
    sm_scale: float | None = None,
    out: Any = None,
    lse: Any = None,
    return_lse: bool = False,
    workspace: Any = None,
) -> Any:
    """:func:`append` with the plan's lengths, then :func:`attention`: one call per layer of a step."""
    workspace, out, lse = _outputs(q, plan, workspace, out, lse, return_lse)
    k_cache, v_cache, layout = _cache(kv_cache, kv_layout)
    _ffi.func("append_paged_attention")(
        _plan_tensor(plan),
        _array.as_tensor(q, "q"),
        _array.as_tensor(k, "k"),
        _array.as_tensor(v, "v"),
        k_cache,
        v_cache,
        layout,
        _array.as_index(kv_page_indptr, "kv_page_indptr"),
        _array.as_index(kv_page_indices, "kv_page_indices"),
        _scale(sm_scale, q),
        _array.as_tensor(workspace, "workspace", output=True),
        _array.as_tensor(out, "out", output=True),
        None if lse is None else _array.as_tensor(lse, "lse", output=True),
    )
    return out if lse is None else (out, lse)


def merge(o_a: Any, lse_a: Any, o_b: Any, lse_b: Any, *, out: Any = None, lse: Any = None) -> tuple[Any, Any]:
    """Attention over the union of two disjoint sets of keys, from the attention over each (section 2.2).

    o_a, o_b : [num_rows, num_heads, head_dim]. lse_a, lse_b : float32 [num_rows, num_heads], natural logarithm; -inf is the
    identity. Returns (o, lse); `out` and `lse` may be the inputs.
    """
    if len(o_a.shape) != 3:
        raise ArgumentError(f"argument `o_a` has shape {tuple(o_a.shape)}; it must be [num_rows, num_heads, head_dim]")
    out = _array.empty_like(o_a, tuple(o_a.shape)) if out is None else out
    lse = _array.empty_like(o_a, tuple(o_a.shape[:2]), "float32") if lse is None else lse
    _ffi.func("merge")(
        _array.as_tensor(o_a, "o_a"),
        _array.as_tensor(lse_a, "lse_a"),
        _array.as_tensor(o_b, "o_b"),
        _array.as_tensor(lse_b, "lse_b"),
        _array.as_tensor(out, "out", output=True),
        _array.as_tensor(lse, "lse", output=True),
    )
    return out, lse
