"""Measures the costs of cpu/tile_table.cc: what a work costs one thread, as fixed + row * rows + kv * keys picoseconds,
and what a merge of shared keys costs.

usage: PYTHONPATH=. python tests/cpu/measure_tiles.py [head_dim ...]
Keys come from memory that no cache holds. CPU time of the process is measured, so other processes disturb it little.
"""

from __future__ import annotations

import os
import sys
import time

os.environ["TVM_INFER_NUM_THREADS"] = "1"

import numpy as np

import tvm_infer
from tvm_infer import _array, _ffi

ROWS = (4, 8, 16, 32, 64, 192)
PAGE_SIZE = 16


def work_time(rows: int, kv_len: int, cache: np.ndarray, q: np.ndarray) -> float:
    """Picoseconds of one work, of many alike in a plan, the best of several runs."""
    num_pages, head_dim = cache.shape[0], cache.shape[-1]
    pages_each = max(kv_len // PAGE_SIZE, 1)
    count = min(512, num_pages // pages_each, q.shape[0] // rows)
    indptr = np.arange(count + 1, dtype=np.int32)
    plan = tvm_infer.plan(
        indptr * rows,
        np.full(count, kv_len, np.int32),
        num_qo_heads=1,
        num_kv_heads=1,
        head_dim=head_dim,
        causal=False,
        tile_table=(rows, 64, 10**6, 1, 1),
        num_ctas=1,
    )
    pages = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    out = np.empty_like(q[: count * rows])

    def run() -> float:
        start = time.process_time_ns()
        tvm_infer.attention(
            q[: count * rows], cache, plan, kv_page_indptr=indptr * pages_each, kv_page_indices=pages, out=out
        )
        return (time.process_time_ns() - start) / count * 1e3

    run()
    return min(run() for _ in range(7))


def measure(dtype: str, kv_dtype: str, head_dim: int) -> None:
    rng = np.random.default_rng(0)
    kind, kv_kind = _array.numpy_dtype(dtype), _array.numpy_dtype(kv_dtype)
    num_pages = 128 * 2**20 // (2 * PAGE_SIZE * head_dim * kv_kind.itemsize)  # 128 MiB
    cache = rng.standard_normal((num_pages, 2, 1, PAGE_SIZE, head_dim), dtype=np.float32).astype(kv_kind)
    q = rng.standard_normal((8192, 1, head_dim), dtype=np.float32).astype(kind)
    for rows in ROWS:
        empty, one = work_time(rows, 0, cache, q), work_time(1, 0, cache, q)
        row = (empty - one) / (rows - 1)
        kv = (work_time(rows, 1024, cache, q) - work_time(rows, 64, cache, q)) / 960
        print(
            f"{dtype:8} {kv_dtype:13} head_dim {head_dim:3} rows {rows:3}: fixed {one - row:9,.0f} row {row:8,.0f} kv {kv:9,.0f} ps"
            f" ({4e3 * rows * head_dim / kv:4.0f} GFLOP/s)"
        )


def merge_time(rows: int, dtype: str, head_dim: int) -> float:
    """Picoseconds of one merge of a row tile of `rows` rows, a shared partial and one of its own: 32 such requests of 8 KV heads with
    shared keys, less the same works apart, none of which merges. Keys are few and in the caches, where works differ least."""
    rng = np.random.default_rng(0)
    kind, count, heads, shared, own = _array.numpy_dtype(dtype), 32, 8, 64, 64
    prefix = np.arange(shared // PAGE_SIZE)
    rest = len(prefix) + np.arange(count * own // PAGE_SIZE).reshape(count, -1)
    cache = rng.standard_normal((rest[-1, -1] + 1, 2, heads, PAGE_SIZE, head_dim), dtype=np.float32).astype(kind)
    q = rng.standard_normal((count, heads * rows, head_dim), dtype=np.float32).astype(kind)
    table = (rows, 64, 0, 0, 10**6, count * rows, 64, 0, 0, 10**6 + 1, 0, 0)  # whatever can be shared is

    def time_of(qo_indptr, tables, levels=()):
        plan = tvm_infer.plan(
            np.array(qo_indptr, np.int32),
            np.array([PAGE_SIZE * len(pages) for pages in tables], np.int32),
            num_qo_heads=heads * rows,
            num_kv_heads=heads,
            head_dim=head_dim,
            dtype=dtype,
            causal=False,
            num_ctas=1,
            tile_table=table,
            levels=levels,
        )
        assert (plan.num_merges, plan.num_shared_works) == ((count * heads, 1) if levels else (0, 0))
        tables_of = {
            "kv_page_indptr": np.concatenate([[0], np.cumsum([len(pages) for pages in tables])]).astype(np.int32),
            "kv_page_indices": np.concatenate(tables).astype(np.int32),
        }
        workspace, out = np.zeros(plan.num_partial_rows * (head_dim + 1) + 1, np.float32), np.empty_like(q)
        times = []
        for _ in range(400):
            start = time.process_time_ns()
            tvm_infer.attention(
                q[: plan.num_tokens], cache, plan, **tables_of, out=out[: plan.num_tokens], workspace=workspace
            )
            times.append(time.process_time_ns() - start)
        return min(times)

    alone = list(range(count + 1))
    together = time_of(alone, [np.concatenate([prefix, pages]) for pages in rest], [[(range(count), shared)]])
    apart = time_of([0, count], [prefix]) + time_of(alone, list(rest)) - time_of([0, 0], [prefix[:0]])
    return (together - apart) * 1e3 / (count * heads)


if __name__ == "__main__":
    print(_ffi.func("cpu_info")().split()[0])
    for head_dim in [int(x) for x in sys.argv[1:]] or [64, 128]:
        for dtype in ("float32", "float16", "bfloat16"):
            measure(dtype, dtype, head_dim)
        for kv_dtype in ("float8_e4m3fn", "float8_e5m2"):
            measure("bfloat16", kv_dtype, head_dim)
        for dtype in ("float32", "bfloat16"):
            each = [f"{merge_time(rows, dtype, head_dim):9,.0f}" for rows in (4, 8, 16)]
            print(f"{dtype:8} head_dim {head_dim:3}: a merge of 4, 8, 16 rows {' '.join(each)} ps")
