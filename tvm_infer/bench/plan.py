"""Host time of the planner, through its packed function: random batches, 132 CTAs, 8 KV heads in groups of 4."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _ffi
from ..errors import ArgumentError
from ..planning import level_words
from ..schedule import Band, Plan

NUM_CTAS, NUM_QO_HEADS, NUM_KV_HEADS = 132, 32, 8
# An H200-like table (rows, kv_granule, fixed, row, kv): a decode tile reads 512 bytes a key at 1/132 of 4.4 TB/s, a prefill tile of
# 128 rows does 65,536 FLOP a key at 1/132 of 790 TFLOP/s; a work starts and ends in 1.5 to 2.5 us. The last two are of merges.
TILE_TABLE = (64, 64, 1_500_000, 5_000, 15_300, 128, 128, 2_500_000, 10_000, 11_000, 2_700_000, 9_000_000, 600)
_CAUSAL = Band(window_right=0)
_DISTINCT = 20  # batches of a workload, planned in turn: no branch predictor learns one batch by heart


@dataclass(frozen=True)
class PlanWorkload:
    """Batches of one kind: `make` draws (qo_len, kv_len) of every request. `bar_us`: what planning may take, if anything.
    `shared`: first keys that all requests have in common, 0 for none."""

    name: str
    make: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]
    bar_us: float | None = None
    shared: int = 0


def _decode(num_requests: int, longest: int = 8192) -> Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]:
    return lambda rng: (np.ones(num_requests, np.int64), rng.integers(1, longest + 1, num_requests))


def _answers(
    num_requests: int, shared: int, own: tuple[int, int]
) -> Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]:
    return lambda rng: (np.ones(num_requests, np.int64), shared + rng.integers(own[0], own[1] + 1, num_requests))


def _prefill(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    lengths = rng.integers(128, 4097, 16)
    return lengths, lengths


def _mixed(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    kv_len = rng.integers(1024, 8193, 64)
    return np.where(np.arange(64) < 4, rng.integers(128, 1025, 64), 1), kv_len


WORKLOADS = (
    PlanWorkload("64 decode, kv 1-8192", _decode(64), 15.0),
    PlanWorkload("16 prefill, 128-4096", _prefill, 50.0),
    PlanWorkload("1024 decode, kv 1-8192", _decode(1024), 100.0),
    PlanWorkload("1 decode, kv 1-131072", _decode(1, 131072)),
    PlanWorkload("8 decode, kv 1-8192", _decode(8)),
    PlanWorkload("60 decode + 4 chunks of 128-1024", _mixed),
    PlanWorkload("4096 decode, kv 1-8192", _decode(4096)),
    PlanWorkload("16 answers, 2048 shared + 256", _answers(16, 2048, (256, 256)), shared=2048),
    PlanWorkload("64 answers, 8192 shared + 256", _answers(64, 8192, (256, 256)), shared=8192),
    PlanWorkload("1024 answers, 1024 shared + 256", _answers(1024, 1024, (256, 256)), shared=1024),
    PlanWorkload("64 chats, 256 shared + 1-8192", _answers(64, 256, (1, 8192)), shared=256),
)


def measure(workload: PlanWorkload, repeats: int) -> dict[str, Any]:
    """Microseconds of `repeats` plans in steady state, and what the plans are like."""
    import tvm_ffi

    capacity_of = _ffi.func("plan_shared_capacity")
    rng = np.random.default_rng(0)
    settings = (NUM_QO_HEADS, NUM_KV_HEADS, NUM_CTAS, tvm_ffi.Shape(_CAUSAL), 0, tvm_ffi.Shape(TILE_TABLE))
    batches = []
    for _ in range(_DISTINCT):
        qo_len, kv_len = workload.make(rng)
        indptr = np.concatenate([[0], np.cumsum(qo_len)]).astype(np.int32)
        shared = (1, int(indptr[-1])) if workload.shared else (0, 0)
        plan_bytes, partial_rows = capacity_of(*settings, len(kv_len), int(indptr[-1]), 0, *shared)
        out = np.zeros(plan_bytes // 4, np.int32)
        batches.append((indptr, kv_len.astype(np.int32), *settings, partial_rows, out))
    flat_times = _time("plan", batches, repeats)
    times = flat_times
    if workload.shared:
        levels = level_words([[(range(len(batches[0][1])), workload.shared)]])
        times = _time("plan_shared", [(*batch[:2], levels, *batch[2:]) for batch in batches], repeats)
    plans = [Plan(batch[-1]) for batch in batches]
    return {
        "workload": workload.name,
        "median_us": float(np.median(times)),
        "p90_us": float(np.quantile(times, 0.9)),
        "flat_us": float(np.median(flat_times)) if workload.shared else None,
        "shared_works": float(np.mean([plan.num_shared_works for plan in plans])),
        "bar_us": workload.bar_us,
        "balance": float(np.mean([plan.balance for plan in plans])),
        "works": float(np.mean([plan.num_works for plan in plans])),
        "merges": float(np.mean([plan.num_merges for plan in plans])),
        "bytes": float(np.mean([plan.bytes_used for plan in plans])),
    }


def _time(name: str, batches: list[tuple[Any, ...]], repeats: int) -> list[float]:
    """Microseconds of `repeats` calls of a packed function, once it has seen all batches."""
    make = _ffi.func(name)
    for batch in batches:
        make(*batch)
    times = []
    for i in range(repeats):
        batch = batches[i % len(batches)]
        start = time.perf_counter_ns()
        make(*batch)
        times.append((time.perf_counter_ns() - start) / 1e3)
    return times


def run(json_path: str | None = None, repeats: int = 300) -> dict[str, Any]:
    """Measure every workload, print a table, write JSON if asked, and return the results.

    Raises
    ------
    ArgumentError : repeats is less than 1.
    """
    from rich.console import Console
    from rich.table import Table

    if repeats < 1:
        raise ArgumentError(f"argument `repeats` is {repeats}; it must be at least 1")
    rows = [measure(workload, repeats) for workload in WORKLOADS]
    results = {
        "num_ctas": NUM_CTAS,
        "num_qo_heads": NUM_QO_HEADS,
        "num_kv_heads": NUM_KV_HEADS,
        "tile_table": list(TILE_TABLE),
        "repeats": repeats,
        "rows": rows,
    }
    table = Table(
        title=f"planner: {NUM_CTAS} CTAs, {NUM_KV_HEADS} KV heads in groups of {NUM_QO_HEADS // NUM_KV_HEADS}, "
        f"{repeats} plans each",
        title_justify="left",
        caption="flat: the same batch, with nothing said of what is shared; balance: mean load / load of the busiest CTA, as "
        "predicted; means over the batches",
        caption_justify="left",
    )
    table.add_column("batch")
    for column in ("median µs", "p90 µs", "bar µs", "flat µs", "balance", "works", "shared", "merges", "bytes"):
        table.add_column(column, justify="right")
    for row in rows:
        bar = row["bar_us"]
        mark = "" if bar is None else f"{bar:.0f} {'✓' if row['median_us'] <= bar else '✗'}"
        counts = [f"{row[key]:.0f}" for key in ("works", "shared_works", "merges", "bytes")]
        table.add_row(
            row["workload"],
            f"{row['median_us']:.1f}",
            f"{row['p90_us']:.1f}",
            mark,
            "" if row["flat_us"] is None else f"{row['flat_us']:.1f}",
            f"{row['balance']:.3f}",
            *counts,
        )
    console = Console()
    Console(width=max(console.width, 124)).print(table)
    if json_path:
        with open(json_path, "w") as f:
            json.dump(results, f, indent=2)
    return results
