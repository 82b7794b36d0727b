"""The cases that every instruction set of the CPU executor must compute, and one function that computes one.

Run as a script, it prints a JSON line per case: its error and a digest of the output's bits. Tests run it so in processes of their
own, because the instruction set and the number of threads are chosen once per process.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from typing import Any, NamedTuple

import numpy as np

import tvm_infer
from tvm_infer.testing import PagedBatch, make_paged_batch, relative_error

# (qo_lens, kv_lens): every stage of serving, with lengths around the block of 64 keys and the tile of 16 rows
BATCHES = {
    "decode": ([1] * 5, [1, 64, 65, 200, 17]),
    "append": ([3, 9, 30], [70, 9, 130]),
    "prefill": ([80, 33], [80, 33]),
    "mixed": ([1, 70, 0, 5, 1], [150, 70, 12, 5, 1]),
}
MASKS = {"causal": (True, -1), "full": (False, -1), "window": (True, 20), "window of 0": (True, 0)}
GROUPS = (1, 3, 4, 7, 8)
HEAD_DIMS = (8, 24, 64, 80, 128, 256)
PAGE_SIZES = (1, 3, 16)
DTYPES = ("float32", "float16", "bfloat16")
# float32 accumulates over at most 200 keys; the 16-bit types lose half a unit of their last place, 2^-11 and 2^-8 at most
TOLERANCE = {"float32": 2e-6, "float16": 4e-4, "bfloat16": 3e-3}


class Case(NamedTuple):
    dtype: str
    group: int
    head_dim: int
    page_size: int
    batch: str
    mask: str
    layout: str
    kv_dtype: str = ""  # of the cache, where it is another

    @property
    def scales(self) -> dict[str, Any]:
        """Of the cache: of K one a KV head, of V one for all."""
        return {"k_scale": np.array([0.013, 0.02], np.float32), "v_scale": 0.011} if self.kv_dtype else {}

    @property
    def name(self) -> str:
        return "-".join(str(x) for x in self)


def all_cases() -> list[Case]:
    """Every dtype, group, head_dim and stage together; page size, mask and layout take turns, so that each meets each."""
    layouts = ("HND", "NHD", "HND separate", "NHD separate")
    cases = []
    for i, (dtype, group, head_dim, batch) in enumerate(itertools.product(DTYPES, GROUPS, HEAD_DIMS, BATCHES)):
        mask = list(MASKS)[(i + i // 4) % len(MASKS)]
        cases.append(
            Case(dtype, group, head_dim, PAGE_SIZES[i % 3], batch, mask, layouts[(i + i // 16) % len(layouts)])
        )
    return cases


def float8_cases() -> list[Case]:
    """Caches of 8 bits beside queries of every type, with every setting in turn."""
    layouts = ("HND", "NHD separate", "HND separate", "NHD")
    settings = itertools.product(DTYPES, ("float8_e4m3fn", "float8_e5m2"), GROUPS, HEAD_DIMS, BATCHES)
    return [
        Case(dtype, group, dim, PAGE_SIZES[i % 3], batch, list(MASKS)[(i + i // 4) % 4], layouts[(i + i // 16) % 4], kv)
        for i, (dtype, kv, group, dim, batch) in enumerate(settings)
    ][::5]


def make(case: Case) -> PagedBatch:
    """The case's batch; 2 KV heads."""
    qo_lens, kv_lens = BATCHES[case.batch]
    return make_paged_batch(
        qo_lens,
        kv_lens,
        num_qo_heads=2 * case.group,
        num_kv_heads=2,
        head_dim=case.head_dim,
        page_size=case.page_size,
        dtype=case.dtype,
        kv_dtype=case.kv_dtype or None,
        **case.scales,
    )


def cache_of(batch: PagedBatch, layout: str) -> tuple[Any, str]:
    """(kv_cache, kv_layout) of the batch's keys in another arrangement."""
    kind, _, separate = layout.partition(" ")
    cache = batch.kv_cache if kind == "HND" else np.ascontiguousarray(batch.kv_cache.swapaxes(2, 3))
    return ((np.ascontiguousarray(cache[:, 0]), np.ascontiguousarray(cache[:, 1])) if separate else cache), kind


def compute(case: Case, batch: PagedBatch, **plan_settings: Any) -> tuple[np.ndarray, np.ndarray]:
    """(o, lse) by the library, into poisoned outputs."""
    causal, window_left = MASKS[case.mask]
    plan = tvm_infer.plan(
        batch.qo_indptr,
        batch.kv_len,
        num_qo_heads=batch.q.shape[1],
        num_kv_heads=2,
        head_dim=case.head_dim,
        dtype=case.dtype,
        causal=causal,
        window_left=window_left,
        kv_dtype=case.kv_dtype or None,
        **plan_settings,
    )
    cache, layout = cache_of(batch, case.layout)
    out = np.full_like(batch.q, np.nan)
    lse = np.full(batch.q.shape[:2], np.nan, np.float32)
    tvm_infer.attention(batch.q, cache, plan, kv_layout=layout, out=out, lse=lse, **batch.tables, **case.scales)
    return out, lse


def check(case: Case, **plan_settings: Any) -> dict[str, Any]:
    """Errors of o and lse against float64, and a digest of both."""
    batch = make(case)
    causal, window_left = MASKS[case.mask]
    out, lse = compute(case, batch, **plan_settings)
    expected_out, expected_lse = batch.reference(causal=causal, window_left=window_left)
    seen = np.isfinite(expected_lse)
    return {
        "case": case.name,
        "error": relative_error(out, expected_out),
        "lse_error": float(np.abs(lse[seen] - expected_lse[seen]).max(initial=0.0))
        + (0.0 if np.array_equal(np.isneginf(lse), ~seen) else float("inf")),
        "digest": hashlib.sha256(out.tobytes() + lse.tobytes()).hexdigest(),
    }


# Costs so high that no plan counts as too small to wake a thread for; tiles of 6 and 37 rows, cuts at 24 keys.
DEAR_TILES = (6, 24, 10**9, 10**6, 10**7, 37, 24, 10**9, 10**6, 10**7)


def main(argv: list[str]) -> None:
    every = int(argv[0])
    settings = {"tile_table": DEAR_TILES, "num_ctas": 7, "fixed_split_size": 48} if "split" in argv else {}
    for case in (float8_cases() if "float8" in argv else all_cases())[::every]:
        print(json.dumps(check(case, **settings)))


if __name__ == "__main__":
    main(sys.argv[1:])
