"""Plans with shared works on the CPU executor, against float64 and against the flat plan of the same batch; free slots are NaN."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tvm_infer
from tvm_infer import variant
from tvm_infer.errors import PlanMismatchError
from tvm_infer.testing import make_paged_batch, relative_error
from tvm_infer.testing.plan_checks import check_levels, check_plan

TOLERANCE = {"float32": 2e-6, "float16": 4e-4, "bfloat16": 3e-3}
# Tiles of 6 and 37 rows that cost by the key alone: whatever can be shared is, and cut.
TILES = (6, 8, 0, 0, 10**6, 37, 8, 0, 0, 11 * 10**5, 0, 0)

BATCHES = {
    "one prompt": ([1] * 20, [150] * 20, [[(range(20), 130)]]),
    "appends": ([3, 1, 7, 1, 2], [90, 97, 120, 80, 85], [[(range(5), 77)]]),
    "a tree": ([1] * 9, [70, 75, 80, 90, 64, 66, 50, 33, 200], [[((0, 2, 4, 6, 1), 32), ((8, 3), 60)], [((4, 1), 60), ((0, 2), 40)]]),
    "a deep chain": ([1] * 6, [30, 50, 70, 90, 111, 115], [[(range(r, 6), 16 * (r + 1))] for r in range(5)]),
    "prefills behind a prompt": ([40, 1, 23, 1, 1], [740, 701, 733, 720, 708], [[(range(5), 700)]]),
    "some without queries": ([1, 0, 2, 0, 1], [50, 40, 60, 30, 70], [[((0, 1, 2, 4), 35)]]),
    "two prompts and one alone": ([1] * 7, [99] * 7, [[((0, 3, 5), 48), ((1, 6), 90)]]),
}  # fmt: skip


def run(batch, levels, **kwargs):
    """(plan, o, lse) of the batch by a plan with levels, into poisoned outputs and a poisoned workspace."""
    causal, dtype = kwargs.pop("causal", True), kwargs.pop("dtype", "float32")
    settings = {"num_ctas": 5, "tile_table": TILES} | kwargs
    plan = tvm_infer.plan(
        batch.qo_indptr,
        batch.kv_len,
        num_qo_heads=batch.q.shape[1],
        num_kv_heads=batch.kv_cache.shape[2],
        head_dim=batch.q.shape[2],
        dtype=dtype,
        causal=causal,
        levels=levels,
        **settings,
    )
    check_plan(plan)
    check_levels(plan, levels)
    out = np.full_like(batch.q, np.nan)
    lse = np.full(batch.q.shape[:2], np.nan, np.float32)
    workspace = np.full(plan.num_partial_rows * (batch.q.shape[2] + 1), np.nan, np.float32)
    tvm_infer.attention(batch.q, batch.kv_cache, plan, out=out, lse=lse, workspace=workspace, **batch.tables)
    return plan, out, lse


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("name", BATCHES)
def test_against_float64(name, page_size, group):
    qo_lens, kv_lens, levels = BATCHES[name]
    shape = dict(num_qo_heads=2 * group, num_kv_heads=2, head_dim=24, page_size=page_size)
    batch = make_paged_batch(qo_lens, kv_lens, levels=levels, **shape)
    plan, out, lse = run(batch, levels)
    assert plan.num_shared_works > 0
    expected, expected_lse = batch.reference()
    seen = np.isfinite(expected_lse)
    assert relative_error(out, expected) < TOLERANCE["float32"]
    assert np.abs(lse - expected_lse)[seen].max() < 2e-5 and np.isneginf(lse[~seen]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("causal", [True, False])
def test_sixteen_bits_and_no_mask(dtype, causal):
    for qo_lens, kv_lens, levels in BATCHES.values():
        batch = make_paged_batch(
            qo_lens, kv_lens, levels=levels, num_qo_heads=6, num_kv_heads=2, head_dim=64, dtype=dtype
        )
        plan, out, _ = run(batch, levels, dtype=dtype, causal=causal)
        assert plan.num_shared_works > 0
        assert relative_error(out, batch.reference(causal=causal)[0]) < TOLERANCE[dtype]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_executors_own_costs(num_threads):
    """32 requests of a prompt of 700 keys: the tile table of this executor finds that sharing pays."""
    levels = [[(range(32), 704)]]
    batch = make_paged_batch([1] * 32, [720] * 32, levels=levels, num_qo_heads=8, num_kv_heads=2, head_dim=64)
    plan, out, _ = run(batch, levels, num_ctas=num_threads, tile_table=None)
    assert plan.num_shared_works > 0
    assert relative_error(out, batch.reference()[0]) < TOLERANCE["float32"]


@settings(max_examples=60)
@given(st.data())
def test_forests(data):
    """Random trees of three levels; a plan gives what the flat plan gives, and float64."""
    num_requests = data.draw(st.integers(2, 12))
    levels, below = [], [(list(range(num_requests)), 0)]
    for _ in range(3):
        level = []
        for requests, begin in below:
            rest = data.draw(st.permutations(requests))
            while rest:
                size = data.draw(st.integers(1, len(rest)))
                level.append((rest[:size], begin + data.draw(st.integers(1, 40))))
                rest = rest[size:]
        levels.append(level)
        below = level
    shared = {r: keys for level in levels for group, keys in level for r in group}
    qo_lens = [data.draw(st.sampled_from([1, 1, 1, 0, 2, 9])) for _ in range(num_requests)]
    kv_lens = [shared[r] + q + data.draw(st.integers(0, 30)) for r, q in enumerate(qo_lens)]
    group, page_size = data.draw(st.sampled_from([1, 3, 4])), data.draw(st.sampled_from([1, 4, 16]))
    shape = dict(num_qo_heads=2 * group, num_kv_heads=2, head_dim=16, page_size=page_size)
    batch = make_paged_batch(qo_lens, kv_lens, levels=levels, **shape)
    _, out, lse = run(batch, levels, num_ctas=data.draw(st.sampled_from([1, 3, 16])))
    expected, expected_lse = batch.reference()
    assert relative_error(out, expected) < TOLERANCE["float32"]
    flat, flat_out, _ = run(batch, [])
    assert flat.num_shared_works == 0 and relative_error(out, flat_out) < 2 * TOLERANCE["float32"]
    assert np.abs(lse - expected_lse).max(initial=0) < 2e-5


def test_shared_keys_are_read_from_one_of_the_group():
    """What the plan reads once it reads once: the other requests' entries for these pages may be anything."""
    qo_lens, kv_lens, levels = BATCHES["one prompt"]
    batch = make_paged_batch(qo_lens, kv_lens, levels=levels, num_qo_heads=8, num_kv_heads=2, head_dim=24, page_size=1)
    plan, out, _ = run(batch, levels)
    shared = plan.works[plan.works["merge_tiles"] > 1]
    readers = set(shared["kv_list"].tolist())
    assert len(readers) < 20
    for r in set(range(20)) - readers:
        batch.kv_page_indices[batch.kv_page_indptr[r] : batch.kv_page_indptr[r] + 130] = -1_234_567_890
    again = np.full_like(out, np.nan)
    tvm_infer.attention(batch.q, batch.kv_cache, plan, out=again, **batch.tables)
    assert again.tobytes() == out.tobytes()


def test_variants_are_refused():
    qo_lens, kv_lens, levels = BATCHES["one prompt"]
    batch = make_paged_batch(qo_lens, kv_lens, levels=levels, num_qo_heads=8, num_kv_heads=2, head_dim=24)
    plan, _, _ = run(batch, levels)
    soft_cap = variant.soft_cap.bind(cap=30.0)
    with pytest.raises(
        PlanMismatchError, match=f"{plan.num_shared_works} works with rows of several requests.*without levels"
    ):
        tvm_infer.attention(batch.q, batch.kv_cache, plan, variant=soft_cap, **batch.tables)
