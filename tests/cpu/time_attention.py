"""Speed of one thread of the CPU executor in CPU time, which other processes disturb little: what to look at while changing a kernel.

usage: PYTHONPATH=. python tests/cpu/time_attention.py [part of a case's name ...]
Decode prints gigabytes of keys and values per second (of keys that no cache holds), prefill GFLOP/s of visible scores and values.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

os.environ["TVM_INFER_NUM_THREADS"] = "1"

import numpy as np

import tvm_infer
from tvm_infer import _ffi
from tvm_infer.testing.batches import numpy_dtype

DECODE = {"batch": 8, "kv_len": 4096, "qo_len": 1, "page_size": 16, "heads": (32, 8), "head_dim": 128, "layout": "HND"}
PREFILL = {**DECODE, "batch": 1, "kv_len": 2048, "qo_len": 2048}
CASES: dict[str, dict[str, Any]] = {
    "decode": DECODE,
    "decode NHD": {**DECODE, "layout": "NHD"},
    "decode page_size 1": {**DECODE, "page_size": 1},
    "decode head_dim 64": {**DECODE, "head_dim": 64},
    "decode 32/32": {**DECODE, "heads": (32, 32), "batch": 2},
    "decode 64/8": {**DECODE, "heads": (64, 8)},
    "prefill": PREFILL,
    "prefill 32/32": {**PREFILL, "heads": (32, 32)},
}


def seconds(dtype: str, case: dict[str, Any]) -> tuple[float, int]:
    """CPU seconds of a call, median of several, and the bytes of its keys and values."""
    rng = np.random.default_rng(0)
    kind, (num_qo_heads, num_kv_heads) = numpy_dtype(dtype), case["heads"]
    pages_each, head_dim = case["kv_len"] // case["page_size"], case["head_dim"]
    rows = (num_kv_heads, case["page_size"]) if case["layout"] == "HND" else (case["page_size"], num_kv_heads)
    cache = rng.standard_normal((pages_each * case["batch"], 2, *rows, head_dim), dtype=np.float32).astype(kind)
    indptr = np.arange(case["batch"] + 1, dtype=np.int32)
    q = rng.standard_normal((case["batch"] * case["qo_len"], num_qo_heads, head_dim), dtype=np.float32).astype(kind)
    plan = tvm_infer.plan(
        indptr * case["qo_len"],
        np.full(case["batch"], case["kv_len"], np.int32),
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
    )
    tables = {
        "kv_page_indptr": indptr * pages_each,
        "kv_page_indices": rng.permutation(len(cache)).astype(np.int32),
        "kv_layout": case["layout"],
    }
    out = np.empty_like(q)
    times = []
    for _ in range(9 if case["qo_len"] == 1 else 4):
        start = time.process_time()
        tvm_infer.attention(q, cache, plan, out=out, **tables)
        times.append(time.process_time() - start)
    return float(np.median(times[1:])), cache.nbytes


def main(words: list[str]) -> None:
    print(_ffi.func("cpu_info")().split()[0])
    for name, case in CASES.items():
        if words and not any(word in name for word in words):
            continue
        for dtype in ("float32", "float16", "bfloat16"):
            took, nbytes = seconds(dtype, case)
            visible = sum(case["kv_len"] - i for i in range(case["qo_len"])) * case["batch"]
            gflops = 4 * visible * case["heads"][0] * case["head_dim"] / took / 1e9
            print(
                f"{name:20} {dtype:9} {took * 1e6:9.0f} us  {nbytes / took / 1e9:5.1f} GB/s  {gflops:4.0f} GFLOP/s",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
