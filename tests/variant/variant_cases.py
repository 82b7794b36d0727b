"""Cases of variants on the CPU executor, and one function that computes one.

Run as a script, it prints a JSON line per case, with tables that end where readable memory ends: a process of its own for each
instruction set, which a stray read kills.
"""

from __future__ import annotations

import itertools
import json
from typing import Any, NamedTuple

import cpu_variants
import numpy as np

import tvm_infer
from tvm_infer.testing import PagedBatch, make_paged_batch, relative_error

BATCHES = {
    "decode": ([1] * 5, [9, 64, 65, 200, 17]),
    "prefill": ([80, 33], [80, 33]),
    "mixed": ([1, 70, 0, 5, 1], [150, 70, 12, 5, 131]),
}
# float32: logits of tens carry a few units of 2^-24 each into the exponent; the 16-bit types round the output once
TOLERANCE = {"float32": 1e-5, "float16": 6e-4, "bfloat16": 4e-3}
SPLIT = {"tile_table": (6, 24, 10**9, 10**6, 10**7, 37, 24, 10**9, 10**6, 10**7), "num_ctas": 7, "fixed_split_size": 48}


class Case(NamedTuple):
    variant: str
    dtype: str
    batch: str
    group: int
    head_dim: int
    page_size: int
    way: str


def all_cases() -> list[Case]:
    """Every variant, dtype and batch; group, head_dim, page size and way take turns."""
    products = itertools.product(cpu_variants.KINDS, TOLERANCE, BATCHES)
    groups, dims, ways = (1, 4, 3, 8), (64, 24, 128, 80, 8), ("paged", "ragged", "append")
    return [
        Case(*product, groups[i % 4], dims[i % 5], (16, 1, 3, 7)[i // 3 % 4], ways[(i + i // 3 + i // 9) % 3])
        for i, product in enumerate(products)
    ]


def make(case: Case, seed: int = 0) -> PagedBatch:
    qo_lens, kv_lens = BATCHES[case.batch]
    return make_paged_batch(
        qo_lens,
        kv_lens,
        num_qo_heads=2 * case.group,
        num_kv_heads=2,
        head_dim=case.head_dim,
        page_size=case.page_size,
        dtype=case.dtype,
        seed=seed,
    )


def run(
    way: str, batch: PagedBatch, bound: Any, dtype: str = "float32", **plan_settings: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(o, lse) by the library, into poisoned outputs."""
    heads = {
        "num_qo_heads": batch.q.shape[1],
        "num_kv_heads": batch.keys[0].shape[1],
        "head_dim": batch.q.shape[2],
        "dtype": dtype,
    }
    plan = tvm_infer.plan(batch.qo_indptr, batch.kv_len, variant=bound, **heads, **plan_settings)
    out = np.full_like(batch.q, np.nan)
    lse = np.full(batch.q.shape[:2], np.nan, np.float32)
    common = {"out": out, "lse": lse, "variant": bound}
    if way == "paged":
        tvm_infer.attention(batch.q, batch.kv_cache, plan, **common, **batch.tables)
    elif way == "ragged":
        k, v = np.concatenate(batch.keys), np.concatenate(batch.values)
        indptr = np.concatenate([[0], np.cumsum(batch.kv_len)]).astype(np.int32)
        tvm_infer.ragged_attention(batch.q, k, v, plan, kv_indptr=indptr, **common)
    else:
        cache = batch.kv_cache.copy()
        for b, length in enumerate(batch.kv_len):
            first_new = int(length - (batch.qo_indptr[b + 1] - batch.qo_indptr[b]))
            for j in range(first_new, int(length)):
                page = batch.kv_page_indices[batch.kv_page_indptr[b] + j // batch.page_size]
                cache[page, :, :, j % batch.page_size] = np.nan  # what the call must write
        tvm_infer.append_attention(batch.q, batch.k_new, batch.v_new, cache, plan, **common, **batch.tables)
    return out, lse


def check(case: Case, *, is_guarded: bool = False, **plan_settings: Any) -> dict[str, Any]:
    """Errors of o and lse against float64."""
    batch = make(case)
    kind = cpu_variants.KINDS[case.variant]
    scalars, tables = cpu_variants.parameters(case.variant, batch, is_guarded=is_guarded)
    bound = cpu_variants.bind(kind, scalars, tables)
    out, lse = run(case.way, batch, bound, case.dtype, **plan_settings)
    expected_out, expected_lse = cpu_variants.expected(kind, batch, scalars, tables)
    seen = np.isfinite(expected_lse)
    return {
        "case": [str(x) for x in case],
        "error": relative_error(out, expected_out),
        "lse_error": float(np.abs(lse[seen] - expected_lse[seen]).max(initial=0.0)),
        "same_rows_see_nothing": bool(np.array_equal(np.isneginf(lse), ~seen)),
        "num_empty": int((~seen).sum()),
    }


def assert_right(result: dict[str, Any]) -> None:
    assert result["error"] <= TOLERANCE[result["case"][1]], result
    assert result["lse_error"] <= 5e-5 and result["same_rows_see_nothing"], result


def main() -> None:
    cpu_variants.install()
    for case in all_cases():
        print(json.dumps(check(case, is_guarded=True)))
        print(json.dumps(check(case, is_guarded=True, **SPLIT)))


if __name__ == "__main__":
    main()
