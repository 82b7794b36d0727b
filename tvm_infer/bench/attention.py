"""Latency of attention on the CPU executor, beside its peers and the read bandwidth measured in the same run."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from .. import _ffi, ops
from ..errors import ArgumentError
from ..testing import make_paged_batch, relative_error
from ..testing.batches import PagedBatch, numpy_dtype
from . import peers as peers_module
from .timing import measure
from .workloads import Workload, select

# what each dtype loses against float64 on random data, with room; a peer or kernel beyond it is wrong, not slow
_TOLERANCE = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}


def read_bandwidth(num_threads: int, gib: float = 0.5) -> float:
    """GB/s at which `num_threads` threads read memory that no cache holds."""
    data = np.ones(int(gib * 2**24) * 16, np.float32)
    f = _ffi.func("cpu_stream_read")
    timing = measure(lambda: f(data, num_threads), seconds=0.5, min_runs=10)
    return data.nbytes / timing.median / 1e3


def _batch(workload: Workload) -> PagedBatch:
    """A random batch of the workload; big, so its cache is filled page by page instead of token by token."""
    if sum(workload.kv_lens) <= 4096:
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
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    keys, values = [], []
    for r, length in enumerate(workload.kv_lens):
        rows = cache[order[indptr[r] : indptr[r + 1]]].transpose(1, 0, 3, 2, 4)
        dense = rows.reshape(2, -1, workload.num_kv_heads, workload.head_dim)[:, :length]
        keys.append(dense[0])
        values.append(dense[1])
    qo_indptr = np.concatenate([[0], np.cumsum(workload.qo_lens)]).astype(np.int32)
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
        kv_page_indptr=indptr,
        kv_page_indices=order,
        page_size=workload.page_size,
        sm_scale=workload.head_dim**-0.5,
    )


def measure_workload(workload: Workload, peers: list[str], threads: int) -> dict[str, Any]:
    """One row: correctness first, then our time between two measurements of the read bandwidth (the better one counts, because a
    shared machine's speed drifts), the planner's, and each peer's."""
    batch = _batch(workload)
    settings: dict[str, Any] = {
        "num_qo_heads": workload.num_qo_heads,
        "num_kv_heads": workload.num_kv_heads,
        "head_dim": workload.head_dim,
        "dtype": workload.dtype,
    }
    plan = ops.plan(batch.qo_indptr, batch.kv_len, **settings)
    out = np.zeros_like(batch.q)
    workspace = np.empty(max(1, plan.num_partial_rows * (workload.head_dim + 1)), np.float32)

    tables: dict[str, Any] = batch.tables

    def run() -> None:
        ops.attention(batch.q, batch.kv_cache, plan, out=out, workspace=workspace, **tables)

    expected, _ = batch.reference()
    run()
    error = relative_error(out, expected)
    if not error <= _TOLERANCE[workload.dtype]:
        raise AssertionError(f"{workload.name} {workload.dtype}: relative error {error:.2e}; not timed")
    bandwidth = read_bandwidth(threads)
    timing = measure(run)
    bandwidth = max(bandwidth, read_bandwidth(threads))
    plan_timing = measure(lambda: ops.plan(batch.qo_indptr, batch.kv_len, **settings), seconds=0.2)
    row: dict[str, Any] = {
        "workload": workload.name,
        "dtype": workload.dtype,
        "us": timing.median,
        "p90_us": timing.p90,
        "gb_per_s": workload.kv_bytes / timing.median / 1e3,
        "read_gb_per_s": bandwidth,
        "of_read_bandwidth": workload.kv_bytes / timing.median / 1e3 / bandwidth,
        "gflop_per_s": workload.flops / timing.median / 1e3,
        "relative_error": error,
        "plan_us": plan_timing.median,
        "predicted_us": plan.makespan_us,
        "peers": {},
    }
    for name in peers:
        row["peers"][name] = _measure_peer(name, workload, batch, expected, timing.median)
    return row


def _measure_peer(
    name: str, workload: Workload, batch: PagedBatch, expected: np.ndarray, ours: float
) -> dict[str, Any]:
    try:
        run, output = peers_module.peer(name).prepare(workload, batch)
    except peers_module.Skipped as reason:
        return {"skipped": str(reason)}
    error = relative_error(output(), expected)
    if not error <= _TOLERANCE[workload.dtype]:
        return {"skipped": f"wrong result (relative error {error:.1e})"}
    timing = measure(run, min_runs=3)
    return {"us": timing.median, "speedup": timing.median / ours, "relative_error": error}


def run(
    *,
    device: str = "cpu",
    peers: list[str] | None = None,
    suite: str = "cpu",
    workloads: tuple[str, ...] = (),
    dtypes: tuple[str, ...] = (),
    json_path: str | None = None,
) -> dict[str, Any]:
    """Measure a suite, print a table, write JSON if asked, and return the results."""
    from rich.console import Console
    from rich.progress import track

    if device != "cpu":
        raise ArgumentError(f'argument `device` is {device!r}; this version has executors for "cpu" only')
    peers = ["torch", "tvm-tir"] if peers is None else peers
    for name in peers:
        peers_module.peer(name)
    chosen = select(suite, workloads, dtypes)
    threads = ops.num_threads()
    isa = _ffi.func("cpu_info")().split()[0]
    console = Console()
    console = Console(width=max(console.width, 160))  # a table that wraps cannot be read
    rows = [
        measure_workload(w, peers, threads)
        for w in track(chosen, "measuring", console=Console(stderr=True), transient=True)
    ]
    results = {"device": "cpu", "isa": isa, "threads": threads, "rows": rows}
    _print(console, results, peers)
    if json_path:
        with open(json_path, "w") as f:
            json.dump(results, f, indent=2)
    return results


def _print(console: Any, results: dict[str, Any], peers: list[str]) -> None:
    from rich.table import Table

    table = Table(
        title=f"attention on {results['device']} ({results['isa']}, {results['threads']} threads); medians, causal; "
        "of read: KV bytes a second against a plain read of 0.5 GiB by as many threads",
        title_justify="left",
    )
    for column in ("workload", "dtype", "µs", "KV GB/s", "read GB/s", "of read", "GFLOP/s", "error", "plan µs"):
        table.add_column(column, justify="left" if column in ("workload", "dtype") else "right")
    for name in peers:
        table.add_column(f"{name} µs (ours is … ×)", justify="right")
    notes = []
    for row in results["rows"]:
        cells = [
            row["workload"],
            row["dtype"],
            f"{row['us']:.0f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['read_gb_per_s']:.1f}",
            f"{row['of_read_bandwidth']:.0%}",
            f"{row['gflop_per_s']:.0f}",
            f"{row['relative_error']:.0e}",
            f"{row['plan_us']:.1f}",
        ]
        for name in peers:
            peer = row["peers"][name]
            if "skipped" in peer:
                cells.append("–")
                notes.append(f"{name}, {row['workload']} {row['dtype']}: {peer['skipped']}")
            else:
                cells.append(f"{peer['us']:.0f} ({peer['speedup']:.2f}×)")
        table.add_row(*cells)
    console.print(table)
    for note in notes:
        console.print(f"not measured: {note}")
