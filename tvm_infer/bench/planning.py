"""Host time of the planner for one batch, through its packed function, and of the copy of a plan to the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import _ffi
from ..planning import level_words
from ..schedule import Plan
from .inputs import indptr
from .timing import Timing, summarize
from .workloads import Workload

_ORDERS = 20  # orders of the same requests, planned in turn: no branch predictor learns one by heart
_CALLS = 200
_UPLOADS = 50


def time_plan(workload: Workload, plan: Plan, tile_table: tuple[int, ...], calls: int = _CALLS) -> Timing:
    """Microseconds of planning the workload into a given buffer. `plan`: one of the same batch, whose number of CTAs is the
    executor's; `tile_table` : the executor's."""
    import tvm_ffi

    has_lists = workload.has_lists
    make = _ffi.func("plan_head_lists" if has_lists else "plan_shared" if workload.levels else "plan")
    capacity_of = _ffi.func("plan_head_lists_capacity" if has_lists else "plan_shared_capacity")
    levels = [level_words(workload.levels)] if workload.levels else []
    table = tvm_ffi.Shape(tile_table)
    settings = (workload.num_qo_heads, workload.num_kv_heads, plan.num_ctas, tvm_ffi.Shape(plan.band), 0, table)
    num_requests, num_tokens = len(workload.qo_lens), sum(workload.qo_lens)
    limits: tuple[int, ...] = (num_requests, num_tokens, int(np.sum(workload.list_lens)))
    limits += () if has_lists else (len(levels), num_tokens)
    plan_bytes, partial_rows = capacity_of(*settings, *limits)
    out = np.zeros(int(plan_bytes) // 4, np.int32)
    rng = np.random.default_rng(0)
    qo, kv = np.asarray(workload.qo_lens, np.int32), np.asarray(workload.list_lens, np.int32)
    orders = [np.arange(num_requests), *(rng.permutation(num_requests) for _ in range(_ORDERS - 1))]
    batches = [
        (indptr(qo[order].tolist()), kv[order].ravel(), *levels, *settings, int(partial_rows), out) for order in orders
    ]
    for batch in batches:
        make(*batch)
    times = []
    for i in range(calls):
        batch = batches[i % len(batches)]
        start = time.perf_counter_ns()
        make(*batch)
        times.append((time.perf_counter_ns() - start) / 1e3)
    return summarize(times)


def time_upload(host_plan: Any, device_plan: Any, synchronize: Callable[[], None]) -> Timing:
    """Host microseconds of one `tvm_infer.plan_upload`, which returns before the copy has been made."""
    upload = _ffi.func("plan_upload")
    upload(host_plan, device_plan)
    times = []
    for _ in range(_UPLOADS):
        synchronize()
        start = time.perf_counter_ns()
        upload(host_plan, device_plan)
        times.append((time.perf_counter_ns() - start) / 1e3)
    return summarize(times)
