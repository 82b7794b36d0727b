"""Plans: how much they need, how they are made, how they get to a device (docs/plan.md)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np

from . import _array, _device, _ffi, variant_call
from .errors import ArgumentError, DTypeError, ExecutorError, PlanMismatchError, TvmInferError
from .schedule import Plan

_CUDA_DTYPES = ("bfloat16", "float16")
_MAX_INT32 = 2**31 - 1

# PlanRefusal of plan.h: what a kernel found in a plan that it would not run.
_REFUSALS = {
    1: "the buffer holds no plan of this version: upload one with tvm_infer.plan(…, device_out=buffer)",
    2: "it was made for other head counts than the tensors have: plan with their num_qo_heads and num_kv_heads",
    3: "it has more CTAs than were launched: plan with the device's number of SMs (device=…, no num_ctas)",
    4: "it has more query tokens than q has rows: plan with this batch's qo_indptr",
    5: "it has more partial rows than the workspace holds: size the workspace with tvm_infer.workspace_size",
    6: "it has more requests (or lists of their KV heads) than the page table: pass the table of the batch that was planned",
    8: "it has works with rows of several requests, and the launch a variant, which runs without any: plan without levels",
    9: "it has a list of keys for each KV head, and the launch a variant, or an append before it, which are told positions in a "
    "request: plan with one kv_len for each request",
    10: "it has sinks or chunks, which a variant's mask tests, and the launch has no variant: pass the one that it was made for",
    11: "a request has more pages than its table, or than a selection's max_pages, so that its lists are empty: select with more",
    12: "pages were selected for other lists than it was planned for: select with the PageSelection that it is of",
    7: "its capture key is not that of the launch that was captured: plan with the settings of the capture, or capture again",
}


_REFUSED_BY_SELECTION = (11, 12)  # attention runs behind it all the same


class WorkspaceSize(NamedTuple):
    """What a batch within given limits needs at most.

    plan_bytes : bytes of the plan buffer. partial_rows : rows of fp32 partial results; a workspace holds
    ``partial_rows * (head_dim_vo + 1)`` floats, by the width of values and outputs.
    """

    plan_bytes: int
    partial_rows: int

    def workspace_floats(self, head_dim_vo: int) -> int:
        """float32 elements of the `workspace` argument for values of this width (head_dim, where they have no other)."""
        return self.partial_rows * (head_dim_vo + 1)


@functools.lru_cache(maxsize=64)
def _tile_table(
    kind: str, dtype: str, head_dim: int, kv_dtype: str | None = None, head_dim_vo: int | None = None
) -> Any:
    if not isinstance(dtype, str):
        raise DTypeError(f'argument `dtype` is {dtype!r}; name it by a string: "float32", "float16" or "bfloat16"')
    if _as_int(head_dim, "head_dim") < 1:
        raise ArgumentError(f"argument `head_dim` is {head_dim}; it must be at least 1")
    if head_dim_vo is not None and not 1 <= _as_int(head_dim_vo, "head_dim_vo") <= head_dim:
        raise ArgumentError(
            f"argument `head_dim_vo` is {head_dim_vo}; it must be from 1 to head_dim = {head_dim} (on cuda head_dim, or 128 beside a "
            "head_dim of 192)"
        )
    if kv_dtype is None and head_dim_vo is None:
        return _ffi.func(f"{kind}_tile_table")(dtype, head_dim)
    if not isinstance(kv_dtype, str | None):
        raise DTypeError(f'argument `kv_dtype` is {kv_dtype!r}; name it by a string, such as "float8_e4m3fn"')
    width = head_dim if head_dim_vo is None else head_dim_vo
    return _ffi.func(f"{kind}_vo_tile_table")(dtype, head_dim, width, dtype if kv_dtype is None else kv_dtype)


def cpu_tile_table(
    dtype: str = "float32", head_dim: int = 128, kv_dtype: str | None = None, head_dim_vo: int | None = None
) -> tuple[int, ...]:
    """The CPU executor's measured costs, picoseconds: five integers for each tile class, and three for shared keys.

    ``rows, kv_granule, fixed, row, kv`` (plan.h, TileClass) each, then ``each, once, again`` (tile_costs.h, SharedMergeCost).

    dtype : of queries. kv_dtype : of keys and values in memory; None: the same. head_dim_vo : of values and outputs; None: head_dim.

    Raises
    ------
    DTypeError : a dtype that the executor does not take. ArgumentError : head_dim below 1.
    """
    return tuple(_tile_table("cpu", dtype, head_dim, kv_dtype, head_dim_vo))


def cuda_tile_table(
    dtype: str = "bfloat16", head_dim: int = 128, kv_dtype: str | None = None, head_dim_vo: int | None = None
) -> tuple[int, ...]:
    """The CUDA executor's measured costs, picoseconds: five integers for each tile class, and three for shared keys.

    ``rows, kv_granule, fixed, row, kv`` (plan.h, TileClass) each, then ``each, once, again`` (tile_costs.h, SharedMergeCost).

    dtype : of queries. kv_dtype : of keys and values in memory; None: the same. head_dim_vo : of values and outputs; None: head_dim.

    Raises
    ------
    ExecutorError : no kernels for float32 or this head_dim; names those that there are. DTypeError : another dtype.
    """
    _check_cuda_dtype(dtype)
    return tuple(_tile_table("cuda", dtype, head_dim, kv_dtype, head_dim_vo))


def _check_cuda_dtype(dtype: str) -> None:
    if dtype in _CUDA_DTYPES:
        return
    kinds = " and ".join(_CUDA_DTYPES)
    if dtype == "float32":
        raise ExecutorError(
            f'argument `dtype` is "float32", which the cuda executor does not take: it takes {kinds}. Say which one the tensors '
            'have (dtype="bfloat16"), or plan for the cpu'
        )
    raise DTypeError(
        f'argument `dtype` is {dtype!r}; the cuda executor takes {kinds}, named by a string (dtype="bfloat16")'
    )


def _as_int(value: Any, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ArgumentError(f"argument `{name}` is {value!r}; it must be an integer") from None


_SETTINGS = "num_qo_heads num_kv_heads num_ctas fixed_split_size".split()


def _refuse_types(error: TypeError, settings: tuple[Any, ...], others: Mapping[str, Any]) -> NoReturn:
    """Raise an error that names the argument whose type a packed function refused, which itself says a number only."""
    if not isinstance(error, TvmInferError):
        *heads, band, fixed_split_size, tile_table = settings
        named = zip(_SETTINGS, (*heads, fixed_split_size), strict=True)
        table = (("tile_table", value) for value in tile_table)
        for name, value in (*named, *band._asdict().items(), *table, *others.items()):
            _as_int(value, name)
    raise error


def num_threads() -> int:
    """Threads of the CPU executor: TVM_INFER_NUM_THREADS, else the processors this process may run on."""
    return int(_ffi.func("cpu_info")().split()[1])


def _settings(
    device: _device.Device,
    num_ctas: int | None,
    tile_table: Any,
    dtype: str,
    head_dim: int,
    kv_dtype: str | None,
    head_dim_vo: int | None,
) -> tuple[int, Any]:
    """CTAs to fill and the tile table; defaults are the device's."""
    if device.kind == "cuda":
        _check_cuda_dtype(dtype)
        if num_ctas is None:
            num_ctas = _device.cuda_info(device.index).num_sms
    elif num_ctas is None:
        num_ctas = num_threads()
    if tile_table is None:
        return num_ctas, _tile_table(device.kind, dtype, head_dim, kv_dtype, head_dim_vo)
    try:
        return num_ctas, tuple(tile_table)
    except TypeError:
        raise ArgumentError(
            f"argument `tile_table` is {tile_table!r}; it must be five integers for each class, and may end with two for merges of "
            "shared keys"
        ) from None


@functools.lru_cache(maxsize=256)
def _capacity(function: str, *limits: Any) -> WorkspaceSize:
    plan_bytes, partial_rows = _ffi.func(function)(*limits)
    return WorkspaceSize(int(plan_bytes), int(partial_rows))


def workspace_size(
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    head_dim_vo: int | None = None,
    max_requests: int,
    max_tokens: int,
    max_kv_tokens: int | None = None,
    dtype: str = "float32",
    kv_dtype: str | None = None,
    causal: bool | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    num_sink: int | None = None,
    chunk: int | None = None,
    num_ctas: int | None = None,
    fixed_split_size: int = 0,
    tile_table: Any = None,
    device: Any = None,
    variant: Any = None,
    max_levels: int = 0,
    max_shared_tokens: int | None = None,
    head_lists: bool = False,
) -> WorkspaceSize:
    """Exact upper bounds of what plans within the limits need.

    Parameters
    ----------
    max_requests, max_tokens : requests and query tokens of one step, at most.
    max_kv_tokens : keys of all requests together; needed only with `fixed_split_size > 0`, where plans grow with it.
    max_levels : `levels` of :func:`plan` that there is room for. A batch that needs more is planned as if its requests shared nothing.
    max_shared_tokens : query tokens of all requests in groups; default: one for each request.
    head_lists : for plans with a `kv_len` of each KV head; max_kv_tokens counts the keys of all their lists.
    Others as in :func:`plan`, with the same values.

    Returns
    -------
    WorkspaceSize : (plan_bytes, partial_rows). ``plan_bytes // 4`` int32 words do for `out` and `device_out` of :func:`plan`.

    Raises
    ------
    ArgumentError : a limit below 0, bad heads, no `max_kv_tokens` with a fixed split size. ExecutorError, DTypeError : as :func:`plan`.
    """
    if max_kv_tokens is None and _as_int(fixed_split_size, "fixed_split_size") > 0:
        raise ArgumentError(
            f"argument `max_kv_tokens` is None with fixed_split_size {fixed_split_size}; a plan with a fixed split size grows "
            "with the number of keys: say how many there are at most"
        )
    band = variant_call.band(variant, causal, window_left, window_right, num_sink, chunk)
    num_ctas, tile_table = _settings(
        _device.parse(device), num_ctas, tile_table, dtype, head_dim, kv_dtype, head_dim_vo
    )
    settings = (num_qo_heads, num_kv_heads, num_ctas, band, fixed_split_size, tile_table)
    limits = {"max_requests": max_requests, "max_tokens": max_tokens, "max_kv_tokens": max_kv_tokens or 0}
    if head_lists:
        if max_levels:
            raise ArgumentError(
                f"argument `max_levels` is {max_levels!r} with head_lists; lists of KV heads are not shared: leave one of them out"
            )
        function = "plan_head_lists_capacity"
    else:
        function = "plan_shared_capacity"
        limits |= {
            "max_levels": max_levels,
            "max_shared_tokens": max_requests if max_shared_tokens is None else max_shared_tokens,
        }
    try:
        return _capacity(function, *settings, *limits.values())
    except TypeError as error:
        _refuse_types(error, settings, limits)


def _rounded(n: int) -> int:
    """The next power of two, so that batches of similar sizes find their capacity computed."""
    return min(1 << max(n - 1, 15).bit_length(), _MAX_INT32)


def _allocate(
    qo_indptr: Any, kv_len: Any, num_levels: int, fixed_split_size: int, settings: tuple[Any, ...], head_lists: bool
) -> tuple[np.ndarray, int]:
    """A buffer that holds any plan of these lengths, and its most partial rows. Lengths may be wrong: the planner says so."""
    indptr = np.asarray(qo_indptr)
    max_tokens = max(int(indptr.flat[-1]), 0) if indptr.size else 0
    max_keys = 0
    if fixed_split_size > 0:
        max_keys = _rounded(int(np.maximum(np.asarray(kv_len, dtype=np.int64), 0).sum()))
    limits = (_rounded(indptr.size), _rounded(max_tokens), max_keys)
    if head_lists:
        size = _capacity("plan_head_lists_capacity", *settings, *limits)
    else:
        size = _capacity(
            "plan_shared_capacity", *settings, *limits, num_levels, _rounded(max_tokens) if num_levels else 0
        )
    return np.empty(size.plan_bytes // 4, np.int32), size.partial_rows


def _flat_lists(kv_len: Any, num_kv_heads: int) -> Any:
    """`kv_len` of each request and KV head as one row of numbers; another as it is."""
    lists, shape = kv_len, getattr(kv_len, "shape", None)
    if shape is None:
        if not (isinstance(kv_len, (list, tuple)) and kv_len and isinstance(kv_len[0], (list, tuple, np.ndarray))):
            return kv_len
        try:
            lists = np.array(kv_len, np.int32)
        except (TypeError, ValueError, OverflowError):
            raise ArgumentError(
                "argument `kv_len` is a list of lists that are not as many 32-bit integers each; it must have one number for each "
                "request, or for each request and KV head"
            ) from None
        shape = lists.shape
    if len(shape) != 2:
        return kv_len
    if shape[1] != num_kv_heads:
        raise ArgumentError(
            f"argument `kv_len` has shape {tuple(shape)}; with a list of keys for each KV head it must be [num_requests, "
            f"{num_kv_heads}], num_kv_heads"
        )
    if not hasattr(lists, "reshape") and _device.cuda_index(lists) is None:
        lists = np.from_dlpack(lists)
    return lists.reshape(-1)


def level_words(levels: Any) -> np.ndarray:
    """`levels` as the planner reads them: of each group its level, its keys, its number of requests, the requests."""
    words: list[int] = []
    for number, level in enumerate(levels):
        for group, entry in enumerate(level):
            try:
                requests, num_keys = entry
                words += [number, operator.index(num_keys), len(requests), *map(operator.index, requests)]
            except (TypeError, ValueError):
                raise ArgumentError(
                    f"argument `levels`: group {group} of level {number} is {entry!r}; it must be a pair of its requests "
                    "(integers) and of the number of keys that they share"
                ) from None
    bad = next((word for word in words if not -(2**31) <= word < 2**31), None)
    if bad is not None:
        raise ArgumentError(f"argument `levels` has {bad}; requests and keys must fit in 32 bits")
    return np.array(words, np.int32)


def plan(
    qo_indptr: Any,
    kv_len: Any,
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    head_dim_vo: int | None = None,
    dtype: str = "float32",
    kv_dtype: str | None = None,
    causal: bool | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    num_sink: int | None = None,
    chunk: int | None = None,
    num_ctas: int | None = None,
    fixed_split_size: int = 0,
    tile_table: Any = None,
    device: Any = None,
    out: np.ndarray | None = None,
    device_out: Any = None,
    max_partial_rows: int | None = None,
    variant: Any = None,
    levels: Any = (),
) -> Plan:
    """Schedule a batch: who computes which rows against which keys (section 3.3.1, Algorithm 1).

    A plan depends on lengths and heads only, so one plan serves every layer of a model. Planning is host work; with a cuda
    `device` the plan is then copied there, in the order of the current stream and without waiting for it, so that `out` may be
    planned into again at once. A captured CUDA graph is replayed with the next step's plan by planning into the same `device_out`.

    Parameters
    ----------
    qo_indptr : int32 [num_requests + 1], host; query tokens of request r are [qo_indptr[r], qo_indptr[r + 1]). A list will do.
    kv_len : int32 [num_requests], host; keys of each request, its new tokens included. Or [num_requests, num_kv_heads]: each KV head of
        a request attends to a list of keys of its own, as the page table then has it, list ``r * num_kv_heads + h`` that of head h
        (docs/kv-formats.md). Positions are then those in the list: with `causal` its last keys are the request's new tokens. Not with
        windows, sinks, chunks, variants or levels.
    num_qo_heads, num_kv_heads : the first is a multiple of the second.
    head_dim, dtype : choose the executor's tile table; the plan itself does not depend on them otherwise. On cuda dtype is
        "bfloat16" or "float16".
    head_dim_vo : of values and outputs, where it is not `head_dim`, that of queries and keys: narrower, on cuda 128 beside 192.
    kv_dtype : of keys and values in memory, where it is not `dtype`: "float8_e4m3fn" or "float8_e5m2". Chooses the tile table, too.
    causal : a query sees no key after its own position; query token t of request r stands at
        ``kv_len[r] - (qo_indptr[r + 1] - t)``. Default: the variant's, else True.
    window_left : keys before its own position that a query sees; -1 for all. Default: the variant's, else -1.
    window_right : keys after its own position that a query sees; -1 for all, 0 is causal. Default: the variant's, else what `causal`
        says.
    num_sink : first keys that a query sees besides those of its window or chunk. chunk : positions a chunk; a query sees no key of
        another. Default: the variant's, else 0, none. Such plans run with a variant whose mask has them.
    num_ctas : work queues to fill; default: the CPU executor's threads, or the SMs of the device.
    fixed_split_size : 0 splits KV where that shortens the makespan; > 0 cuts KV at its multiples, so that a row's result does
        not depend on the rest of the batch; -1 never splits.
    tile_table : costs, picoseconds: five integers per tile class and, where there are `levels`, two of merging shared keys, as
        :func:`cpu_tile_table` has them; default: the executor's.
    device : where the plan runs: "cpu", "cuda", "cuda:1", a torch.device or a TVM device; default: that of `device_out`, else
        "cpu".
    out : int32 host buffer to write the plan to (see :func:`workspace_size`); default: one is allocated.
    device_out : int32 buffer on the device to copy the plan to, contiguous, at least the plan's ``bytes_used``; default: one is
        allocated, by torch where torch is loaded, else by TVM. Memory of a stream of its own is the caller's to order.
    max_partial_rows : partial rows that the workspace at hand has; default: no limit with an allocated plan.
    variant : a tvm_infer.variant.BoundVariant, or a Variant without parameters, that the plan will run with: `causal`,
        windows, sinks and chunks are taken from it. The plan depends on nothing else of it, and serves every variant of the same band.
    levels : requests that begin with the same keys, as in pages that they share. Outermost level first, each a list of groups
        ``(requests, num_keys)``: the first num_keys keys of these requests are the same, whichever of them is read. A group of a level
        lies within one of the level before, and shares more keys: ``[[(range(8), 512)], [([0, 1, 2], 700), ([5, 6], 900)]]``. The keys
        are read once for all where that shortens the plan (``plan.num_shared_works``). Not with windows, sinks, chunks, variants or a
        fixed split size.

    Returns
    -------
    Plan : ``plan.device_buffer`` is the plan on the device (None for the cpu).

    Raises
    ------
    ArgumentError : an indptr that does not start at 0 or decreases, kv_len shorter than the new tokens, bad heads, a device that
        is none, lengths that lie on a device, `causal`, windows, sinks or chunks that contradict the variant or each other, levels that
        are no prefix relation, or share keys that some query of a request does not see.
    WorkspaceError : `out`, `device_out` or `max_partial_rows` is too small; says what is needed.
    ExecutorError : no such device, or no kernels for its architecture, the dtype or head_dim.
    DeviceError : the stream is being captured for a graph, or the driver failed.
    """
    target = _target(device, device_out)
    lists = _flat_lists(kv_len, num_kv_heads)
    head_lists = lists is not kv_len
    qo_indptr, kv_len = _array.as_index(qo_indptr, "qo_indptr"), _array.as_index(lists, "kv_len")
    for name, x in (("qo_indptr", qo_indptr), ("kv_len", kv_len)):
        if not isinstance(x, np.ndarray) and _device.cuda_index(x) is not None:
            raise ArgumentError(
                f"argument `{name}` is {_device.describe(x)}; plans are made by the host: keep the lengths there (`.cpu()` waits "
                "for the device at every step)"
            )
    band = variant_call.band(variant, causal, window_left, window_right, num_sink, chunk)
    num_ctas, tile_table = _settings(target, num_ctas, tile_table, dtype, head_dim, kv_dtype, head_dim_vo)
    settings = (num_qo_heads, num_kv_heads, num_ctas, band, fixed_split_size, tile_table)
    words = level_words(levels)
    if len(words) and variant is not None:
        raise ArgumentError(
            "argument `levels` with a `variant`: shared keys run without variants so far. Plan without levels"
        )
    if head_lists:
        _check_head_lists(len(words) > 0, variant, band)
    is_allocated = out is None
    try:
        if out is None:
            num_levels = len(levels) if len(words) else 0
            out, most_partial_rows = _allocate(qo_indptr, kv_len, num_levels, fixed_split_size, settings, head_lists)
            if max_partial_rows is None:
                max_partial_rows = most_partial_rows
        else:
            _check_out(out, max_partial_rows)
        if len(words):
            bytes_used = _ffi.func("plan_shared")(qo_indptr, kv_len, words, *settings, max_partial_rows, out)
        else:
            function = "plan_head_lists" if head_lists else "plan"
            bytes_used = _ffi.func(function)(qo_indptr, kv_len, *settings, max_partial_rows, out)
    except TypeError as error:
        _refuse_types(error, settings, {"max_partial_rows": max_partial_rows})
    if is_allocated:
        out = out[: bytes_used // 4]
    if target.kind == "cuda":
        if device_out is None:
            device_out = _array.empty_on(target, (bytes_used // 4,), "int32")
        _ffi.func("plan_upload")(out, device_out)
    return Plan(out, device_out)


def _check_head_lists(has_levels: bool, variant: Any, band: Any) -> None:
    """Refuse what a plan with lists of KV heads has no meaning for."""
    for name, is_given in (("levels", has_levels), ("variant", variant is not None)):
        if is_given:
            raise ArgumentError(
                f"argument `{name}` with a `kv_len` of each KV head; such a plan runs without {name}: leave it out, or give one kv_len "
                "for each request"
            )
    for name, value in band._asdict().items():
        if value != {"window_left": -1, "num_sink": 0, "chunk": 0}.get(name, min(value, 0)):
            raise ArgumentError(
                f"argument `{name}` is {value} with a `kv_len` of each KV head; such a plan is causal or sees all keys of a list, "
                "since positions are those in the list: leave out of the lists what a window hides"
            )


def _check_out(out: Any, max_partial_rows: int | None) -> None:
    if max_partial_rows is None:
        raise ArgumentError(
            "argument `max_partial_rows` is None with a given `out`; say how many partial rows the workspace has "
            "(tvm_infer.workspace_size gives both)"
        )
    if not isinstance(out, np.ndarray):
        raise ArgumentError(
            f"argument `out` is a {type(out).__name__}; it must be a numpy int32 array (of a torch tensor on the host: `.numpy()`)"
        )
    if out.dtype != np.int32:
        raise DTypeError(f"argument `out` has dtype {out.dtype}; it must be int32")
    if not out.flags.writeable:
        raise ArgumentError("argument `out` is a read-only numpy array; outputs must be writable")


def _target(device: Any, device_out: Any) -> _device.Device:
    """The device to plan for; `device_out`, if there is one, lies on it."""
    if device_out is None:
        return _device.parse(device)
    index = _device.cuda_index(device_out)
    if index is None:
        raise ArgumentError(
            f"argument `device_out` is {_device.describe(device_out)}; it must be int32 memory of a cuda device. A plan for the cpu "
            "executor is `out` itself"
        )
    target = _device.Device("cuda", index)
    if device is not None and _device.parse(device) != target:
        raise ArgumentError(
            f"argument `device` is {str(device)!r}, `device_out` is on cuda:{index}; they must be the same device"
        )
    return target


def plan_status(plan: Any) -> str:
    """What the kernels that ran with a plan found: "accepted", or an error that says why they refused it.

    A kernel checks its plan on the device, because a captured graph is replayed with plans that no host code has seen. One that
    refuses writes nothing but this word. Waits for the current stream.

    Parameters
    ----------
    plan : Plan with a device buffer, or the int32 device buffer itself.

    Raises
    ------
    PlanMismatchError : a launch refused the plan.
    ArgumentError : the plan lies on the host only, where calls raise at once.
    """
    buffer = plan.device_buffer if isinstance(plan, Plan) else plan
    if _device.cuda_index(buffer) is None:
        raise ArgumentError(
            "argument `plan` has no device buffer; the cpu executor raises at once instead of keeping a status"
            if isinstance(plan, Plan)
            else f"argument `plan` is {_device.describe(plan)}; it must be a Plan or its buffer on a cuda device"
        )
    status = int(_ffi.func("plan_status")(buffer))
    if status == 0:
        return "accepted"
    meaning = _REFUSALS.get(status, "this version does not know the reason")
    result = "" if status in _REFUSED_BY_SELECTION else " and wrote nothing"
    raise PlanMismatchError(f"a kernel refused the plan (status {status}){result}: {meaning}")
