"""The packed functions as Python functions: outputs allocated unless given, arguments checked in C++.

Tensors are torch tensors, numpy arrays or TVM tensors; none is copied, strides and offsets are honoured (head_dim must be
contiguous). Outputs are of the kind of `q`. Notation follows arXiv 2501.01005.

The device of `q` chooses the executor; every other tensor of the call lies on the same device, and none is moved there silently.
On cuda calls are asynchronous, on torch's current stream (with TVM tensors: the stream of TVMFFIEnvSetStream), and safe to capture
in a CUDA graph once a first call has loaded the kernels. Elements are bfloat16 or float16 there, rows start on 16-byte boundaries.

Keys and values in memory may be of 8 bits, float8_e4m3fn or float8_e5m2 (torch's, ml_dtypes', TVM's), beside queries and new tokens of
any type: value = element * scale. New ones are stored as x / scale, in float32, rounded to nearest even; what is beyond the largest
finite value becomes that one, a NaN stays a NaN. `k_scale` and `v_scale` are numbers, or float32 tensors [num_kv_heads] on the data's
device (docs/kv-formats.md).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from . import _array, _device, _ffi, variant_call
from .errors import ArgumentError, PlanMismatchError
from .kv_dtypes import SCALED_DTYPES
from .planning import WorkspaceSize, cpu_tile_table, cuda_tile_table, num_threads, plan, plan_status, workspace_size
from .rope import RopeConfig
from .schedule import Plan

__all__ = [
    "WorkspaceSize",
    "append",
    "append_attention",
    "attention",
    "cpu_tile_table",
    "cuda_tile_table",
    "merge",
    "num_threads",
    "plan",
    "plan_status",
    "ragged_attention",
    "rope_append",
    "update_page_bounds",
    "workspace_size",
]

_LAYOUTS = {"HND": 0, "NHD": 1}
_KV_HEAD_AXIS = (-3, -2)  # of a cache, by layout


def _scale(sm_scale: float | None, q: Any) -> float:
    try:
        return 1.0 / math.sqrt(q.shape[-1]) if sm_scale is None else float(sm_scale)
    except (TypeError, ValueError):
        raise ArgumentError(
            f"argument `sm_scale` is {sm_scale!r}; it must be a number, or None for 1 / sqrt(head_dim)"
        ) from None


def _check_rank3(x: Any, name: str, axes: str) -> None:
    shape = getattr(x, "shape", None)
    if shape is None or len(shape) != 3:
        what = f"is a {type(x).__name__}" if shape is None else f"has shape {tuple(shape)}"
        raise ArgumentError(f"argument `{name}` {what}; it must be a tensor [{axes}]")


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


def _tables(q: Any, **tables: Any) -> list[Any]:
    """Index arguments: on the host lists will do; on cuda they lie where `q` lies, and nothing is copied silently."""
    device = _device.cuda_index(q)
    if device is None:
        return [_array.as_index(x, name) for name, x in tables.items()]
    for name, x in tables.items():
        _device.require(x, name, device)
    return list(tables.values())


def _scales(k_scale: Any, v_scale: Any) -> tuple[Any, ...] | None:
    """(k_scale, v_scale, k_scales, v_scales) as packed functions take them; None where all are 1: those without scales do."""
    if type(k_scale) is float and type(v_scale) is float and k_scale == 1.0 and v_scale == 1.0:
        return None
    numbers: list[float] = []
    tensors: list[Any] = []
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if getattr(scale, "shape", ()) == ():
            try:
                numbers.append(float(scale))
            except (TypeError, ValueError):
                raise ArgumentError(
                    f"argument `{name}` is {scale!r}; it must be a number, or a float32 tensor [num_kv_heads]"
                ) from None
            tensors.append(None)
        else:
            numbers.append(1.0)
            tensors.append(_array.as_tensor(scale, name))
    return (*numbers, *tensors)


def _num_kv_heads(k: Any, axis: int, ranks: tuple[int, ...]) -> int | None:
    """KV heads of a cache or of ragged keys; None for a rank that is none: the packed function says so."""
    shape = getattr(k, "shape", ())
    return int(shape[axis]) if len(shape) in ranks else None


def _host_words(plan: Any) -> np.ndarray:
    """A plan in host memory, of whatever library, as numpy has it."""
    foreign = hasattr(plan, "__dlpack__") and not isinstance(plan, np.ndarray)
    return np.from_dlpack(plan) if foreign else np.asarray(plan)


def _prepare(
    q: Any,
    v: Any,
    plan: Any,
    workspace: Any,
    out: Any,
    lse: Any,
    return_lse: bool,
    num_kv_heads: int | None,
    num_lists: int,
) -> tuple[Any, Any, Any, Any]:
    """The plan as packed functions take it, and workspace, out and lse, allocated where they are not given.

    `v`: values that have a tensor of their own, whose width is that of the output; None: they are as wide as `q`.
    """
    _check_rank3(q, "q", "num_tokens, num_qo_heads, head_dim")
    device = _device.cuda_index(q)
    v_shape: Any = getattr(v, "shape", ())
    head_dim_vo = int(v_shape[-1] if len(v_shape) else q.shape[-1])
    if device is not None:
        words, workspace = _prepare_cuda(q, head_dim_vo, plan, workspace, num_kv_heads, num_lists, device)
    else:
        words = plan.buffer if isinstance(plan, Plan) else _array.as_tensor(plan, "plan")
        if workspace is None:
            parsed = plan if isinstance(plan, Plan) else Plan(_host_words(plan))
            workspace = np.empty(parsed.num_partial_rows * (head_dim_vo + 1), np.float32)
    if out is None:
        out = _array.empty_like(q, (*q.shape[:2], head_dim_vo))
    if lse is None and return_lse:
        lse = _array.empty_like(q, q.shape[:2], "float32")
    return words, workspace, out, lse


def _prepare_cuda(
    q: Any, head_dim_vo: int, plan: Any, workspace: Any, num_kv_heads: int | None, num_lists: int, device: int
) -> tuple[Any, Any]:
    """The plan on the device, checked by its copy on the host before anything is launched, and a workspace."""
    num_tokens, num_qo_heads, _ = q.shape
    if not isinstance(plan, Plan):
        _device.require(plan, "plan", device)
        if workspace is None:
            raise ArgumentError(
                "argument `workspace` is None with a `plan` that is bare device memory, whose partial rows the host cannot see; pass a "
                "workspace (tvm_infer.workspace_size(…, device=…).workspace_floats(head_dim) floats), or a Plan"
            )
        return plan, workspace
    words = _device_words(plan, device)
    if workspace is None:
        partial_rows = plan.num_partial_rows
        workspace = _array.empty_like(q, (partial_rows * (head_dim_vo + 1),), "float32")
    else:
        partial_rows = math.prod(getattr(workspace, "shape", (0,))) // (head_dim_vo + 1)
    if num_kv_heads is not None:
        num_sms = _device.cuda_info(device).num_sms
        _ffi.func("check_plan")(
            plan.host_tensor, num_tokens, num_qo_heads, num_kv_heads, partial_rows, num_lists, num_sms
        )
    return words, workspace


def _device_words(plan: Plan, device: int) -> Any:
    """The plan's copy on the device."""
    if _device.cuda_index(plan.device_buffer) != device:
        where = "the host only" if plan.device_buffer is None else str(plan.device_buffer.device)
        raise ArgumentError(
            f"argument `plan` lies on {where}, `q` on cuda:{device}; make the plan with tvm_infer.plan(…, "
            f'device="cuda:{device}"), which copies it there'
        )
    return plan.device_buffer


# The packed functions that also take a variant, and those that take scales and perhaps a variant.
_WITH_VARIANT = {
    "paged_attention": "variant_paged_attention",
    "ragged_attention": "variant_ragged_attention",
    "append_paged_attention": "variant_append_attention",
}
_WITH_SCALES = {
    "paged_attention": "scaled_paged_attention",
    "ragged_attention": "scaled_ragged_attention",
    "append_paged_attention": "scaled_append_attention",
    "contiguous_attention": "contiguous_attention",  # takes both, given or not
}


def _check_appends(plan: Any) -> None:
    """Raise PlanMismatchError for a plan that does not say where a request's new tokens go."""
    if isinstance(plan, Plan) and plan.has_head_lists:
        raise PlanMismatchError(
            f"argument `plan` has a list of keys for each KV head, {plan.num_kv_lists} lists of {plan.num_requests} requests, which "
            "say nothing of where a request's new tokens go; call append with the requests' own page tables and kv_len, then attention"
        )


def _call(name: str, arguments: tuple[Any, ...], scales: tuple[Any, ...] | None, variant: Any) -> None:
    if scales is not None:
        _ffi.func(_WITH_SCALES[name])(*arguments, *scales, variant)
    elif variant is not None:
        _ffi.func(_WITH_VARIANT[name])(*arguments, variant)
    else:
        _ffi.func(name)(*arguments)


def _run(
    name: str,
    arguments: tuple[Any, ...],
    variant: Any,
    plan: Any,
    q: Any,
    num_lists: int,
    scales: tuple[Any, ...] | None,
) -> None:
    """Call the packed function, or its form with a variant, once that is found to have the plan's band, heads and requests."""
    if variant is None:
        if isinstance(plan, Plan):
            variant_call.check_plan_alone(plan)
        _call(name, arguments, scales, None)
        return
    prepared = variant_call.prepare(variant)
    is_cuda = _device.cuda_index(q) is not None
    if isinstance(plan, Plan) or not is_cuda:
        parsed = plan if isinstance(plan, Plan) else Plan(_host_words(plan))
        variant_call.check_plan(variant, parsed)
        prepared.check_tables(parsed, int(q.shape[1]))
    # On a device a captured graph may be replayed with the plan of more requests: as many as the page table has.
    num_requests = num_lists if is_cuda else parsed.num_requests
    call = None
    if not prepared.is_plain:
        # the append, which goes first, must not be launched where there is no kernel to follow it
        is_scaled = name == "append_paged_attention" and _array.dtype_name(arguments[4]) in SCALED_DTYPES
        call = prepared.call(is_cuda, int(q.shape[1]), num_requests, int(q.shape[2]), is_scaled=is_scaled)
    _call(name, arguments, scales, call)


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
    variant: Any = None,
    k_scale: Any = 1.0,
    v_scale: Any = 1.0,
) -> Any:
    """Attention of ragged queries over a paged KV cache, as the plan schedules it (section 3.2).

    Parameters
    ----------
    q : [num_tokens, num_qo_heads, head_dim]; float32, float16 or bfloat16, on cuda one of the latter. The cache has the same dtype, or
        is of 8 bits.
    kv_cache : [num_pages, 2, num_kv_heads, page_size, head_dim], or (k_cache, v_cache) of [num_pages, num_kv_heads, page_size,
        head_dim] each; with kv_layout "NHD" the last three are page_size, num_kv_heads, head_dim. Values in a tensor of their own may
        be narrower than keys: head_dim_vo, then the width of `out`. On cuda 128 beside a head_dim of 192, else head_dim.
    plan : from :func:`plan`, for these lengths and for the device of `q`. On cuda a bare int32 device buffer will do, with a
        `workspace`; the kernel then checks it alone (:func:`plan_status`).
    kv_page_indptr, kv_page_indices : int32; request r's pages are kv_page_indices[kv_page_indptr[r] : kv_page_indptr[r + 1]]. Of a
        plan with a `kv_len` of each KV head, so are those of list ``r * num_kv_heads + h``, whose head h is read.
        On cuda device tensors, whose values nobody checks.
    sm_scale : factor on q·k; default 1 / sqrt(head_dim). On cuda > 0.
    out : as `q`, head_dim_vo wide; allocated if None. lse : float32 [num_tokens, num_qo_heads]; allocated if None and `return_lse`.
        On cuda contiguous.
    workspace : float32 scratch for partial results, at least ``plan.num_partial_rows * (head_dim_vo + 1)``; allocated if None.
        Calls on one stream may share it.
    variant : a tvm_infer.variant.BoundVariant, or a Variant without parameters: its logits, mask and output take the place of the
        plain softmax's. Its tables lie on the device of `q`; `plan` has the band of its mask (``plan(…, variant=variant)``),
        and keys outside that band never reach its functions. Compiled at its first call on a device, kept on the object: bind a
        variant once, not before every call. Values of keys that its mask hides must still be
        finite: they are multiplied by 0. On cuda not with a cache of 8 bits, nor with a head_dim_vo.
    k_scale, v_scale : factors of the elements of an 8-bit cache: numbers, or float32 [num_kv_heads] on the device of `q`; finite and
        above 0 (on cuda tensors are not looked at, but with TVM_INFER_DEBUG_CHECKS=1).

    Returns
    -------
    out, or (out, lse) with `return_lse` or a given `lse`. LSE is the natural logarithm of the sum of exponentials, of a variant's
    logits and before its output function; a row that sees no key, or whose logits are all -inf, has O = 0 and LSE = -inf, whatever
    the output function. A logit of NaN or +inf makes its row NaN and no other.

    Raises
    ------
    ArgumentError, DTypeError : an argument of a wrong shape, stride, dtype or device; on cuda also lists and host arrays. Also
        where the variant's tables lie elsewhere than `q`, for a pair of dtypes that is none, and for scales of a cache that has none.
    VariantError : the variant is not bound, or its tables have not as many entries as the call has heads or requests.
    PlanMismatchError : the plan was made for other lengths or heads, for another band than the variant's, or for one that needs a
        variant where there is none (the band is not seen where `plan` is bare device memory). WorkspaceError : `workspace` is
        too small.
    ExecutorError : no executor for the device, dtype, head_dim or page_size; names those that there are (on cuda 8-bit caches have
        pages of 16, 32 or 64 tokens, and variants that change neither queries nor keys).
    DeviceError, CompileError : the driver or the compiler failed. AbiError : the variant was compiled for another tvm_infer.
    Nothing is written and nothing launched then.
    """
    k_cache, v_cache, layout = _cache(kv_cache, kv_layout)
    page_indptr, page_indices = _tables(q, kv_page_indptr=kv_page_indptr, kv_page_indices=kv_page_indices)
    num_kv_heads = _num_kv_heads(k_cache, _KV_HEAD_AXIS[layout], (4, 5))
    num_lists = page_indptr.shape[0] - 1
    words, workspace, out, lse = _prepare(q, v_cache, plan, workspace, out, lse, return_lse, num_kv_heads, num_lists)
    arguments = (
        words,
        _array.as_tensor(q, "q"),
        k_cache,
        v_cache,
        layout,
        page_indptr,
        page_indices,
        _scale(sm_scale, q),
        _array.as_tensor(workspace, "workspace", output=True),
        _array.as_tensor(out, "out", output=True),
        None if lse is None else _array.as_tensor(lse, "lse", output=True),
    )
    _run("paged_attention", arguments, variant, plan, q, num_lists, _scales(k_scale, v_scale))
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
    variant: Any = None,
    k_scale: Any = 1.0,
    v_scale: Any = 1.0,
) -> Any:
    """Attention of ragged queries over ragged keys without pages.

    k, v : [num_kv_tokens, num_kv_heads, head_dim], `v` perhaps narrower (head_dim_vo); on the host also of 8 bits. kv_indptr : int32
    [num_requests + 1], on the device of `q`; request r's keys are rows kv_indptr[r] : kv_indptr[r + 1]. Others as in :func:`attention`.
    """
    (indptr,) = _tables(q, kv_indptr=kv_indptr)
    num_kv_heads = _num_kv_heads(k, 1, (3,))
    num_lists = indptr.shape[0] - 1
    words, workspace, out, lse = _prepare(q, v, plan, workspace, out, lse, return_lse, num_kv_heads, num_lists)
    arguments = (
        words,
        _array.as_tensor(q, "q"),
        _array.as_tensor(k, "k"),
        _array.as_tensor(v, "v"),
        indptr,
        _scale(sm_scale, q),
        _array.as_tensor(workspace, "workspace", output=True),
        _array.as_tensor(out, "out", output=True),
        None if lse is None else _array.as_tensor(lse, "lse", output=True),
    )
    _run("ragged_attention", arguments, variant, plan, q, num_lists, _scales(k_scale, v_scale))
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
    k_scale: Any = 1.0,
    v_scale: Any = 1.0,
    page_bounds: Any = None,
) -> None:
    """Write new keys and values at the end of each request, in place.

    k, v : [num_tokens, num_kv_heads, head_dim], `v` as wide as the cache's values. Token t of request r goes to position
    ``kv_len[r] - (qo_indptr[r + 1] - t)``: `kv_len` counts the new tokens. Others as in :func:`attention`; on cuda all lie on the
    device of `k`, and tokens behind qo_indptr[num_requests] are padding. page_bounds : kept up to date where given
    (:func:`update_page_bounds`).
    """
    k_cache, v_cache, layout = _cache(kv_cache, kv_layout)
    indptr, lengths, page_indptr, page_indices = _tables(
        k, qo_indptr=qo_indptr, kv_len=kv_len, kv_page_indptr=kv_page_indptr, kv_page_indices=kv_page_indices
    )
    scales, bounds = _scales(k_scale, v_scale), _checked_bounds(page_bounds, k_cache, v_cache, layout)
    _ffi.func("append" if scales is None else "scaled_append")(
        _array.as_tensor(k, "k"),
        _array.as_tensor(v, "v"),
        indptr,
        lengths,
        k_cache,
        v_cache,
        layout,
        page_indptr,
        page_indices,
        *(scales or ()),
    )
    if bounds is not None:
        cache = (k_cache, v_cache, layout, page_indptr, page_indices)
        _ffi.func("update_page_bounds")(bounds, indptr, lengths, *cache)


def _bounds(page_bounds: Any) -> Any:
    return _array.as_tensor(page_bounds, "page_bounds", output=True)


def _checked_bounds(page_bounds: Any, k_cache: Any, v_cache: Any, layout: int) -> Any:
    """`page_bounds` as a tensor, or None. Raises where they do not fit the cache: before an append, which writes."""
    if page_bounds is None:
        return None
    tensor = _bounds(page_bounds)
    _ffi.func("check_page_bounds")(tensor, k_cache, v_cache, layout)
    return tensor


def update_page_bounds(
    page_bounds: Any,
    kv_cache: Any,
    *,
    kv_page_indptr: Any,
    kv_page_indices: Any,
    qo_indptr: Any = None,
    kv_len: Any = None,
    plan: Any = None,
    kv_layout: str = "HND",
) -> None:
    """Bounds of the pages that hold new tokens, in place: of each channel the least and the greatest element of the page's keys.

    From all keys of the page as they are stored, so that a call may be repeated; slots behind a request's last key are not read. Called
    after an append, and by :func:`append`, :func:`append_attention` and :func:`rope_append` where these are given `page_bounds`.

    Parameters
    ----------
    page_bounds : [num_pages, 2, num_kv_heads, head_dim], least and greatest, any strides but the last; of the cache's type, beside
        a cache of 8 bits of the queries', elements without their scale. On cuda 16 bits, rows on 16-byte boundaries.
    qo_indptr, kv_len, or plan : where the new tokens are, as in :func:`append` or :func:`append_attention`. With kv_len[r] new tokens
        of each request, ``qo_indptr = [0, *cumsum(kv_len)]``, all its pages are done.
    Others as in :func:`attention`.

    Raises
    ------
    ArgumentError : other shapes than the cache's, neither lengths nor a plan, or both. DTypeError : bounds of another type.
    PlanMismatchError : a plan with a list of keys for each KV head, or for other heads. ExecutorError : float32 bounds on cuda.
    """
    lengths = {name: x for name, x in (("qo_indptr", qo_indptr), ("kv_len", kv_len)) if x is not None}
    if len(lengths) != (2 if plan is None else 0) or (plan is not None and not isinstance(plan, Plan)):
        given = ", ".join([*lengths, *([] if plan is None else [f"plan, a {type(plan).__name__},"])]) or "none"
        raise ArgumentError(
            f"arguments `qo_indptr`, `kv_len`, `plan`: {given} given; pass either `plan`, a tvm_infer.Plan, or `qo_indptr` and "
            "`kv_len`"
        )
    k_cache, v_cache, layout = _cache(kv_cache, kv_layout)
    page_indptr, page_indices, *lengths_there = _tables(
        page_bounds, kv_page_indptr=kv_page_indptr, kv_page_indices=kv_page_indices, **lengths
    )
    cache = (k_cache, v_cache, layout, page_indptr, page_indices)
    if plan is None:
        _ffi.func("update_page_bounds")(_bounds(page_bounds), *lengths_there, *cache)
        return
    _check_appends(plan)
    device = _device.cuda_index(page_bounds)
    words = plan.buffer if device is None else _device_words(plan, device)
    num_qo_heads = plan.num_kv_heads * plan.group_size
    _ffi.func("update_page_bounds_by_plan")(_bounds(page_bounds), words, num_qo_heads, *cache)


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
    variant: Any = None,
    k_scale: Any = 1.0,
    v_scale: Any = 1.0,
    page_bounds: Any = None,
) -> Any:
    """:func:`append` with the plan's lengths, then :func:`attention`: one call per layer of a step.

    page_bounds : kept up to date where given (:func:`update_page_bounds`).
    """
    _check_appends(plan)
    k_cache, v_cache, layout = _cache(kv_cache, kv_layout)
    page_indptr, page_indices = _tables(q, kv_page_indptr=kv_page_indptr, kv_page_indices=kv_page_indices)
    num_kv_heads = _num_kv_heads(k_cache, _KV_HEAD_AXIS[layout], (4, 5))
    num_lists = page_indptr.shape[0] - 1
    words, workspace, out, lse = _prepare(q, v_cache, plan, workspace, out, lse, return_lse, num_kv_heads, num_lists)
    arguments = (
        words,
        _array.as_tensor(q, "q"),
        _array.as_tensor(k, "k"),
        _array.as_tensor(v, "v"),
        k_cache,
        v_cache,
        layout,
        page_indptr,
        page_indices,
        _scale(sm_scale, q),
        _array.as_tensor(workspace, "workspace", output=True),
        _array.as_tensor(out, "out", output=True),
        None if lse is None else _array.as_tensor(lse, "lse", output=True),
    )
    bounds = _checked_bounds(page_bounds, k_cache, v_cache, layout)
    _run("append_paged_attention", arguments, variant, plan, q, num_lists, _scales(k_scale, v_scale))
    if bounds is not None:
        cache = (k_cache, v_cache, layout, page_indptr, page_indices)
        _ffi.func("update_page_bounds_by_plan")(bounds, words, int(q.shape[1]), *cache)
    return out if lse is None else (out, lse)


def rope_append(
    q: Any,
    k: Any,
    v: Any,
    kv_cache: Any,
    *,
    rope: RopeConfig,
    kv_page_indptr: Any,
    kv_page_indices: Any,
    plan: Any = None,
    qo_indptr: Any = None,
    kv_len: Any = None,
    kv_layout: str = "HND",
    inv_freq: Any = None,
    out: Any = None,
    k_scale: Any = 1.0,
    v_scale: Any = 1.0,
    page_bounds: Any = None,
) -> Any:
    """Rotate queries and keys by their positions; :func:`append` the keys and `v`; return the queries. One launch on cuda.

    Parameters
    ----------
    q : [num_tokens, num_qo_heads, head_dim]. k, v : [num_tokens, num_kv_heads, head_dim]. Slices of one projection [num_tokens,
        num_qo_heads + 2 * num_kv_heads, head_dim] will do. Token t of request r has position
        ``kv_len[r] - (qo_indptr[r + 1] - t)``; tokens behind qo_indptr[num_requests] are padding.
    rope : which elements turn, and how fast.
    plan, or qo_indptr and kv_len : where the tokens belong, as in :func:`append_attention` and :func:`append`.
    inv_freq : float32 [rope.rotary_dim / 2] on the device of `q`; from `rope` if None, put there at the first call. Must be given
        for rope_type "longrope": ``rope.inv_freq(seq_len)`` depends on how long sequences get.
    out : as `q`, may be `q`; allocated if None. page_bounds : of the rotated keys, kept up to date where given
        (:func:`update_page_bounds`). Others as in :func:`append`.

    Returns
    -------
    out : the rotated queries, 0 for padding tokens. Results are computed in float32 and rounded once; angles are exact to 3e-7
        radians at positions up to 2**22. On cuda head_dim and rotary_dim are multiples of 16, and values are as wide as keys.

    Raises
    ------
    As :func:`append_attention`; nothing is written then.
    """
    if not isinstance(rope, RopeConfig):
        raise ArgumentError(f"argument `rope` is a {type(rope).__name__}; it must be a tvm_infer.RopeConfig")
    _check_appends(plan)
    _check_rank3(q, "q", "num_tokens, num_qo_heads, head_dim")
    k_cache, v_cache, layout = _cache(kv_cache, kv_layout)
    page_indptr, page_indices = _tables(q, kv_page_indptr=kv_page_indptr, kv_page_indices=kv_page_indices)
    device = _device.cuda_index(q)
    lengths = {name: x for name, x in (("qo_indptr", qo_indptr), ("kv_len", kv_len)) if x is not None}
    lengths = dict(zip(lengths, _tables(q, **lengths), strict=True))
    if isinstance(plan, Plan):
        plan = plan.buffer if device is None else _device_words(plan, device)
    elif plan is not None:
        plan = _array.as_tensor(plan, "plan")
    if inv_freq is None:
        inv_freq = _frequencies(rope, device)
    out = _array.empty_like(q, tuple(q.shape)) if out is None else out
    scales, bounds = _scales(k_scale, v_scale), _checked_bounds(page_bounds, k_cache, v_cache, layout)
    _ffi.func("rope_append_paged" if scales is None else "scaled_rope_append")(
        _array.as_tensor(q, "q"),
        _array.as_tensor(k, "k"),
        _array.as_tensor(v, "v"),
        _array.as_tensor(inv_freq, "inv_freq"),
        int(rope.interleaved),
        rope.magnitude(),
        plan,
        lengths.get("qo_indptr"),
        lengths.get("kv_len"),
        k_cache,
        v_cache,
        layout,
        page_indptr,
        page_indices,
        _array.as_tensor(out, "out", output=True),
        *(scales or ()),
    )
    if bounds is not None:
        cache = (k_cache, v_cache, layout, page_indptr, page_indices)
        if plan is None:
            _ffi.func("update_page_bounds")(bounds, lengths["qo_indptr"], lengths["kv_len"], *cache)
        else:
            _ffi.func("update_page_bounds_by_plan")(bounds, plan, int(q.shape[1]), *cache)
    return out


@functools.cache
def _frequencies(rope: RopeConfig, device: int | None) -> Any:
    """`rope.inv_freq()` on the host (None) or a cuda device, kept for good: captured graphs read it."""
    if rope.rope_type == "longrope":
        raise ArgumentError(
            'argument `rope` has rope_type "longrope", whose frequencies depend on how long sequences get; pass '
            "inv_freq=rope.inv_freq(seq_len) too, as a tensor on the device of `q`"
        )
    host = rope.inv_freq()
    if device is None:
        return host
    there = _array.empty_on(_device.Device("cuda", device), host.shape, "float32")
    if _array.is_torch(there):
        import torch

        there.copy_(torch.from_numpy(host))
    else:
        there.copyfrom(host)
    return there


def merge(o_a: Any, lse_a: Any, o_b: Any, lse_b: Any, *, out: Any = None, lse: Any = None) -> tuple[Any, Any]:
    """Attention over the union of two disjoint sets of keys, from the attention over each (section 2.2).

    o_a, o_b : [num_rows, num_heads, head_dim]. lse_a, lse_b : float32 [num_rows, num_heads], natural logarithm; -inf is the
    identity, and its O is not looked at. Returns (o, lse); `out` and `lse` may be the inputs. On cuda float32 states merge too.
    """
    _check_rank3(o_a, "o_a", "num_rows, num_heads, head_dim")
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
