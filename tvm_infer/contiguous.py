"""Attention over keys without pages that begin anywhere: an unpaged cache, or one in one piece of virtual memory (vAttention)."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _array, _device, _ffi, ops
from .errors import ArgumentError

__all__ = ["contiguous_attention", "contiguous_start"]

_MAX_INT32 = 2**31 - 1
_NO_SCALES = (1.0, 1.0, None, None)


def contiguous_start(k: Any, v: Any) -> Any:
    """First rows of the buffers of a cache without pages, as `kv_start` of :func:`contiguous_attention` has them.

    Parameters
    ----------
    k, v : [num_buffers, max_len, num_kv_heads, head_dim], of any strides of which that between buffers is a multiple of that between
        tokens: slices of longer buffers are, and transposed ``[num_buffers, num_kv_heads, max_len, head_dim]``.

    Returns
    -------
    int32 [num_buffers] : on the host an array; on cuda a tensor there, by one copy that waits: make it once, not before every call. Add
    to it what lies before a request's first key in its buffer (left padding), or take the buffers of the requests of a batch from it.

    Raises
    ------
    ArgumentError : the strides are others, or not the same of `k` and `v`.
    """
    stride = int(_ffi.func("contiguous_stride")(_array.as_tensor(k, "k"), _array.as_tensor(v, "v")))
    num_buffers = int(k.shape[0])
    if (num_buffers - 1) * stride > _MAX_INT32:
        raise ArgumentError(
            f"argument `k` has {num_buffers} buffers, {stride} rows from one to the next; rows are numbered by 32 bits: pass fewer "
            "buffers at once"
        )
    starts = np.arange(num_buffers, dtype=np.int32) * np.int32(stride)
    device = _device.cuda_index(k)
    return starts if device is None else _array.index_on(_device.Device("cuda", device), starts)


def contiguous_attention(
    q: Any,
    k: Any,
    v: Any,
    plan: Any,
    *,
    kv_start: Any = None,
    sm_scale: float | None = None,
    out: Any = None,
    lse: Any = None,
    return_lse: bool = False,
    workspace: Any = None,
    variant: Any = None,
    k_scale: Any = 1.0,
    v_scale: Any = 1.0,
) -> Any:
    """Attention of ragged queries over keys that are one run of rows for each request, wherever it begins.

    Parameters
    ----------
    k, v : [num_rows, num_kv_heads, head_dim]; or [num_buffers, max_len, num_kv_heads, head_dim], of the strides that
        :func:`contiguous_start` takes: token j of buffer b is then row ``contiguous_start(k, v)[b] + j``.
    plan : from :func:`tvm_infer.plan`, whose `kv_len` says how many rows each request has.
    kv_start : int32 [num_requests], on the device of `q`: the first row of each request. In any order, with gaps of anything between
        requests; requests may share rows. On cuda a device tensor, whose values nobody checks. On the host it may be left out with
        buffers: request r has buffer r.
    Others as in :func:`tvm_infer.attention`; as there 8-bit keys are for the host where there are no pages.

    Raises
    ------
    ArgumentError : no `kv_start` where there must be one, not one for each request, rows outside of `k`, or strides of buffers that are
        no rows of one tensor. Others as :func:`tvm_infer.attention`.
    """
    if kv_start is None:
        if _device.cuda_index(q) is not None or len(getattr(k, "shape", ())) != 4:
            raise ArgumentError(
                "argument `kv_start` is None; it must be int32 [num_requests], the first row of each request. For buffers on a device "
                "make it once: kv_start=tvm_infer.contiguous_start(k, v)"
            )
        kv_start = contiguous_start(k, v)
        num_lists = getattr(plan, "num_kv_lists", len(kv_start))
        kv_start = kv_start[:num_lists]
    (start,) = ops._tables(q, kv_start=kv_start)
    num_lists = start.shape[0]
    num_kv_heads = ops._num_kv_heads(k, -2, (3, 4))
    words, workspace, out, lse = ops._prepare(q, v, plan, workspace, out, lse, return_lse, num_kv_heads, num_lists)
    arguments = (
        words,
        _array.as_tensor(q, "q"),
        _array.as_tensor(k, "k"),
        _array.as_tensor(v, "v"),
        start,
        ops._scale(sm_scale, q),
        _array.as_tensor(workspace, "workspace", output=True),
        _array.as_tensor(out, "out", output=True),
        None if lse is None else _array.as_tensor(lse, "lse", output=True),
    )
    scales = ops._scales(k_scale, v_scale) or _NO_SCALES
    ops._run("contiguous_attention", arguments, variant, plan, q, num_lists, scales)
    return out if lse is None else (out, lse)
