"""Plans with shared works on the CPU executor, against float64 and against the flat plan of the same batch; free slots are NaN."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tvm_infer
from tvm_infer import _ffi, variant
from tvm_infer.errors import ArgumentError, PlanMismatchError
from tvm_infer.testing import make_paged_batch, relative_error
from tvm_infer.testing.plan_checks import check_levels, check_plan

TOLERANCE = {"float32": 2e-6, "float16": 4e-4, "bfloat16": 3e-3}
# Tiles of 6 and 37 rows that cost by the key alone: whatever can be shared is, and cut.
TILES = (6, 8, 0, 0, 10**6, 37, 8, 0, 0, 11 * 10**5, 0, 0, 1000)

BATCHES = {
    "one prompt": ([1] * 20, [150] * 20, [[(range(20), 130)]]),
    "appends": ([3, 1, 7, 1, 2], [90, 97, 120, 80, 85], [[(range(5), 77)]]),
    "a tree": ([1] * 9, [70, 75, 80, 90, 64, 66, 50, 33, 200], [[((0, 2, 4, 6, 1), 32), ((8, 3), 60)], [((4, 1), 60), ((0, 2), 40)]]),
    "a deep chain": ([1] * 6, [30, 50, 70, 90, 111, 115], [[(range(r, 6), 16 * (r + 1))] for r in range(5)]),
    "prefills behind a prompt": ([40, 1, 23, 1, 1], [740, 701, 733, 720, 708], [[(range(5), 700)]]),
    "some without queries": ([1, 0, 2, 0, 1], [50, 40, 60, 30, 70], [[((0, 1, 2, 4), 35)]]),
    "two prompts and one alone": ([1] * 7, [99] * 7, [[((0, 3, 5), 48), ((1, 6), 90)]]),
}  # fmt: skip


SLOPES = np.linspace(0.01, 0.3, 8, dtype=np.float32)
# name -> (variant, its logits in float64): of values alone, of positions besides, of a table by the key's position
VARIANTS = {
    "soft_cap": (variant.soft_cap.bind(cap=1.5), lambda s, h, i, j: 1.5 * np.tanh(s / 1.5)),
    "alibi": (variant.alibi.bind(slopes=SLOPES), lambda s, h, i, j: s + np.float64(SLOPES[h]) * (j - i)),
    "bias by key": (
        variant.Variant("by_key", logits=lambda value, kv_pos, bias: value + bias[kv_pos], mask=lambda q_pos, kv_pos: kv_pos <= q_pos,
                        bias=variant.tensor(1)).bind(bias=np.sin(np.arange(800, dtype=np.float32))),
        lambda s, h, i, j: s + np.sin(np.arange(800, dtype=np.float32)).astype(np.float64)[j],
    ),
}  # fmt: skip


def run(batch, levels, **kwargs):
    """(plan, o, lse) of the batch by a plan with levels, into poisoned outputs and a poisoned workspace."""
    bound, dtype = kwargs.pop("variant", None), kwargs.pop("dtype", "float32")
    causal = kwargs.pop("causal", True) if bound is None else None
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
        variant=bound,
        **settings,
    )
    check_plan(plan)
    check_levels(plan, levels)
    out = np.full_like(batch.q, np.nan)
    lse = np.full(batch.q.shape[:2], np.nan, np.float32)
    workspace = np.full(plan.num_partial_rows * (batch.q.shape[2] + 1), np.nan, np.float32)
    buffers = dict(out=out, lse=lse, workspace=workspace)
    tvm_infer.attention(batch.q, batch.kv_cache, plan, variant=bound, **buffers, **batch.tables)
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
    bound, logits = data.draw(
        st.sampled_from([(None, None), VARIANTS["soft_cap"], *([VARIANTS["alibi"]] * (group == 4))])
    )
    _, out, lse = run(batch, levels, num_ctas=data.draw(st.sampled_from([1, 3, 16])), variant=bound)
    expected, expected_lse = batch.reference(logits=logits)
    assert relative_error(out, expected) < TOLERANCE["float32"]
    flat, flat_out, _ = run(batch, [], variant=bound)
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


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_against_float64(name):
    """Rows of a shared work are told their own request's position."""
    bound, logits = VARIANTS[name]
    for qo_lens, kv_lens, levels in BATCHES.values():
        batch = make_paged_batch(qo_lens, kv_lens, levels=levels, num_qo_heads=8, num_kv_heads=2, head_dim=24)
        plan, out, lse = run(batch, levels, variant=bound)
        assert plan.num_shared_works > 0
        expected, expected_lse = batch.reference(logits=logits)
        seen = np.isfinite(expected_lse)
        assert relative_error(out, expected) < 2 * TOLERANCE["float32"]
        assert np.abs(lse - expected_lse)[seen].max() < 2e-5 and np.isneginf(lse[~seen]).all()


def test_an_output_is_computed_of_what_was_merged():
    sink = np.linspace(-1, 2, 8, dtype=np.float32)
    qo_lens, kv_lens, levels = BATCHES["a tree"]
    batch = make_paged_batch(qo_lens, kv_lens, levels=levels, num_qo_heads=8, num_kv_heads=2, head_dim=24)
    plan, out, _ = run(batch, levels, variant=variant.attention_sink.bind(sink=sink))
    assert plan.num_shared_works > 0
    expected, lse = batch.reference()
    assert relative_error(out, expected / (1 + np.exp(sink - lse))[..., None]) < 2 * TOLERANCE["float32"]


def test_keys_that_are_changed_are_shared():
    """Each key over its root mean square, the same for all requests; NaN behind the last of a page is none of theirs."""
    weight = np.linspace(0.5, 1.5, 24, dtype=np.float32)
    bound = variant.qk_norm.bind(q_weight=weight, k_weight=weight[::-1].copy(), eps=1e-6)
    qo_lens, kv_lens, levels = BATCHES["appends"]
    batch = make_paged_batch(qo_lens, kv_lens, levels=levels, num_qo_heads=8, num_kv_heads=2, head_dim=24)
    plan, out, _ = run(batch, levels, variant=bound)
    assert plan.num_shared_works > 0
    normed = lambda x, w: x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * w  # noqa: E731
    batch.q, batch.keys = normed(batch.q, weight), [normed(k, weight[::-1]) for k in batch.keys]
    assert relative_error(out, batch.reference()[0]) < 2 * TOLERANCE["float32"]


REFUSED = {
    "a mask of its own": variant.Variant("even", mask=lambda q_pos, kv_pos: (kv_pos <= q_pos) & (kv_pos % 2 == 0)),
    "the request's length": variant.Variant(
        "by_length", logits=lambda value, kv_len: value / kv_len, mask=lambda q_pos, kv_pos: kv_pos <= q_pos
    ),
    "a number of each request": variant.Variant(
        "temperature", logits=lambda value, t: value * t, mask=lambda q_pos, kv_pos: kv_pos <= q_pos, t=variant.per_request()
    ).bind(t=np.ones(20, np.float32)),
    "a rotation": variant.rope.bind(inv_freq=np.ones(12, np.float32), magnitude=1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_variants_that_see_the_request_are_refused(name):
    """By plan, by the call with a plan of the same band, and by the packed function."""
    qo_lens, kv_lens, levels = BATCHES["one prompt"]
    batch = make_paged_batch(qo_lens, kv_lens, levels=levels, num_qo_heads=8, num_kv_heads=2, head_dim=24)
    plan, _, _ = run(batch, levels)
    with pytest.raises(
        ArgumentError, match=r"argument `levels` with the `variant` \w+, which takes all rows.*without levels"
    ):
        run(batch, levels, variant=REFUSED[name])
    with pytest.raises(
        PlanMismatchError,
        match=rf"{plan.num_shared_works} works with rows of several requests.*`variant` \w+ takes.*without levels",
    ):
        tvm_infer.attention(batch.q, batch.kv_cache, plan, variant=REFUSED[name], **batch.tables)


def test_windows_are_refused_with_a_variant_as_without():
    qo_lens, kv_lens, levels = BATCHES["one prompt"]
    batch = make_paged_batch(qo_lens, kv_lens, levels=levels, num_qo_heads=8, num_kv_heads=2, head_dim=24)
    with pytest.raises(ArgumentError, match="`levels` with window_left 40"):
        run(batch, levels, variant=(variant.soft_cap & variant.sliding_window).bind(cap=1.5, window=40))


def test_the_executor_refuses_what_the_variant_says_of_itself():
    """Packed functions without a look at the variant: the call object says it."""
    qo_lens, kv_lens, levels = BATCHES["one prompt"]
    batch = make_paged_batch(qo_lens, kv_lens, levels=levels, num_qo_heads=8, num_kv_heads=2, head_dim=24)
    plan, _, _ = run(batch, levels)
    functions = _ffi.func("standard_variant")(variant.soft_cap.digest)
    cap, out = int(np.float32(1.5).view(np.uint32)), np.full_like(batch.q, np.nan)
    workspace = np.empty(plan.num_partial_rows * 25, np.float32)
    rest = (batch.kv_cache, None, 0, batch.kv_page_indptr, batch.kv_page_indices, batch.sm_scale, workspace, out, None)
    for takes in (1, 0):
        call = _ffi.func("variant_call")(variant.soft_cap.digest, functions, [cap], [], takes)
        attend = lambda: _ffi.func("variant_paged_attention")(plan.buffer, batch.q, *rest, call)  # noqa: E731, B023
        if takes:
            attend()
            assert relative_error(out, batch.reference(logits=VARIANTS["soft_cap"][1])[0]) < TOLERANCE["float32"] * 2
            continue
        with pytest.raises(PlanMismatchError, match="a variant that takes all rows of a work for one request's"):
            attend()
    with pytest.raises(ArgumentError, match="`takes_shared_keys` is 2; it must be 0 or 1"):
        _ffi.func("variant_call")(variant.soft_cap.digest, functions, [cap], [], 2)
