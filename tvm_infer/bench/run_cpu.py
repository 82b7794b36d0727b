"""One row of the benchmark on the CPU executor: correctness first, then times, ours and the peers'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import ops
from ..testing import relative_error
from ..testing.batches import PagedBatch
from .ceilings import read_bandwidth
from .inputs import host_batch, indptr
from .peers import measure_peer, peer
from .rows import WrongResult, shape_of, vs_best_peer
from .timing import measure
from .workloads import Workload

# what each dtype loses against float64 on random data, with room; a peer or kernel beyond it is wrong, not slow
_TOLERANCE = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}
METHOD = (
    "repeated calls on the host, median; a plain read of 0.5 GiB by as many threads before and after, the faster counts. Results "
    "checked against float64 before. gb_per_s: K and V of every request once."
)


def _arguments(workload: Workload, batch: PagedBatch) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(function, its tensors behind q, its named tensors) of the layout that the workload asks for."""
    if workload.ragged:
        k, v = np.concatenate(batch.keys), np.concatenate(batch.values)
        return ops.ragged_attention, (k, v), {"kv_indptr": indptr(workload.kv_lens)}
    cache = batch.kv_cache
    if workload.kv_layout == "NHD":
        cache = np.ascontiguousarray(cache.transpose(0, 1, 3, 2, 4))
    tables: dict[str, Any] = batch.tables
    return ops.attention, (cache,), {**tables, "kv_layout": workload.kv_layout}


def measure_workload(workload: Workload, peers: Sequence[str], threads: int) -> dict[str, Any]:
    """One row: our time between two measurements of the read bandwidth (the better one counts, because a shared machine's speed
    drifts), the planner's, and each peer's. Raises WrongResult, and whatever the library raises."""
    batch = host_batch(workload)
    settings: dict[str, Any] = {
        "num_qo_heads": workload.num_qo_heads,
        "num_kv_heads": workload.num_kv_heads,
        "head_dim": workload.head_dim,
        "dtype": workload.dtype,
    }
    plan = ops.plan(batch.qo_indptr, batch.kv_len, **settings)
    plan_timing = measure(lambda: ops.plan(batch.qo_indptr, batch.kv_len, **settings), seconds=0.2)
    row: dict[str, Any] = shape_of(workload) | {"plan_us": plan_timing.median, "predicted_us": plan.makespan_us}
    if workload.plan_only:
        return row
    out = np.zeros_like(batch.q)
    workspace = np.empty(max(1, plan.num_partial_rows * (workload.head_dim + 1)), np.float32)
    function, keys, tables = _arguments(workload, batch)

    def run() -> None:
        function(batch.q, *keys, plan, out=out, workspace=workspace, **tables)

    expected, _ = batch.reference()
    run()
    error = relative_error(out, expected)
    if not error <= _TOLERANCE[workload.dtype]:
        raise WrongResult(
            f"{workload.name} {workload.dtype}: relative error {error:.2e} (allowed {_TOLERANCE[workload.dtype]:.0e}); not timed"
        )
    bandwidth = read_bandwidth(threads)
    timing = measure(run)
    bandwidth = max(bandwidth, read_bandwidth(threads))
    share = workload.kv_bytes / timing.median / 1e3 / bandwidth
    row |= {
        "us": timing.median,
        "p10_us": timing.p10,
        "p90_us": timing.p90,
        "gb_per_s": workload.kv_bytes / timing.median / 1e3,
        "read_gb_per_s": bandwidth,
        "of_read_bandwidth": share,
        "bound": "read",
        "ceiling_us": share * timing.median,
        "of_ceiling": share,
        "gflop_per_s": workload.flops / timing.median / 1e3,
        "relative_error": error,
    }
    row["peers"] = {
        name: measure_peer(
            peer(name, "cpu"),
            workload,
            [batch],
            error_of=lambda o: relative_error(o, expected),
            tolerance=_TOLERANCE[workload.dtype],
            time=lambda runs: measure(runs[0], min_runs=3),
            ours_us=timing.median,
        )
        for name in peers
    }
    row["vs_best_peer"] = vs_best_peer(row["peers"])
    return row
