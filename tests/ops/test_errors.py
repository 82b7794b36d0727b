"""Bad input to the packed functions: a typed error that names the argument, its value and the limit; outputs stay untouched."""

from __future__ import annotations

import numpy as np
import pytest

import tvm_infer
from tvm_infer import _ffi, errors
from tvm_infer.testing import make_paged_batch

POISON = 123.0


@pytest.fixture
def batch():
    return make_paged_batch([1, 3], [20, 3], num_qo_heads=4, num_kv_heads=2, head_dim=16, page_size=8)


def make_plan(batch, **kwargs):
    kwargs = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 16, "num_ctas": 3, **kwargs}
    return tvm_infer.plan(kwargs.pop("qo_indptr", batch.qo_indptr), kwargs.pop("kv_len", batch.kv_len), **kwargs)


def attend(batch, **changes):
    out = np.full_like(batch.q, POISON)
    arguments = {
        "q": batch.q,
        "kv_cache": batch.kv_cache,
        "plan": None,
        "out": out,
        "sm_scale": 0.25,
        **batch.tables,
        **changes,
    }
    arguments["plan"] = make_plan(batch) if arguments["plan"] is None else arguments["plan"]
    try:
        return tvm_infer.attention(**arguments)
    finally:
        if arguments["out"] is out:
            assert (out == POISON).all()


# (name, exception, what the message must name, changes to the call)
ATTENTION_ERRORS = [
    ("q dtype", errors.DTypeError, ["`q`", "float64", "float32"], lambda b: {"q": b.q.astype(np.float64)}),
    ("q int", errors.DTypeError, ["`q`", "int32"], lambda b: {"q": b.q.astype(np.int32)}),
    ("q rank", errors.ArgumentError, ["`q`", "(4, 4, 16, 1)"], lambda b: {"q": b.q[:, :, :, None]}),
    ("q tokens", errors.PlanMismatchError, ["`q`", "3 tokens", "4"], lambda b: {"q": b.q[:3], "out": b.q[:3].copy()}),
    (
        "q heads",
        errors.PlanMismatchError,
        ["`q`", "2 heads", "4"],
        lambda b: {"q": b.q[:, :2], "out": b.q[:, :2].copy()},
    ),
    (
        "q head_dim",
        errors.ArgumentError,
        ["`q`", "head_dim 8", "16"],
        lambda b: {"q": b.q[..., :8], "out": b.q[..., :8].copy()},
    ),
    (
        "head_dim not of 8",
        errors.ArgumentError,
        ["head_dim 12", "multiple of 8"],
        lambda b: {"q": b.q[..., :12], "out": None},
    ),
    ("q last dim strided", errors.ArgumentError, ["`q`", "stride 2"], lambda b: {"q": np.repeat(b.q, 2, -1)[..., ::2]}),
    ("cache dtype", errors.DTypeError, ["`q`", "`k_cache`"], lambda b: {"kv_cache": b.kv_cache.astype(np.float16)}),
    ("cache heads", errors.PlanMismatchError, ["1 KV heads", "2"], lambda b: {"kv_cache": b.kv_cache[:, :, :1]}),
    ("cache rank", errors.ArgumentError, ["`k_cache`", "rank 4"], lambda b: {"kv_cache": b.kv_cache[:, 0]}),
    (
        "cache without values",
        errors.ArgumentError,
        ["`k_cache`", "dimension 1"],
        lambda b: {"kv_cache": b.kv_cache[:, :1]},
    ),
    (
        "v differs from k",
        errors.ArgumentError,
        ["`v_cache`", "as k_cache"],
        lambda b: {"kv_cache": (b.kv_cache[:, 0], b.kv_cache[:-1, 1])},
    ),
    ("layout", errors.ArgumentError, ["`kv_layout`", "'DNH'", "HND"], lambda b: {"kv_layout": "DNH"}),
    ("three caches", errors.ArgumentError, ["`kv_cache`", "3"], lambda b: {"kv_cache": (b.kv_cache,) * 3}),
    (
        "indptr dtype",
        errors.DTypeError,
        ["`kv_page_indptr`", "int64"],
        lambda b: {"kv_page_indptr": b.kv_page_indptr.astype(np.int64)},
    ),
    (
        "indptr length",
        errors.PlanMismatchError,
        ["`kv_page_indptr`", "2 entries", "3"],
        lambda b: {"kv_page_indptr": b.kv_page_indptr[:-1]},
    ),
    (
        "indptr start",
        errors.ArgumentError,
        ["`kv_page_indptr`", "starts at 1"],
        lambda b: {"kv_page_indptr": [1, 4, 6]},
    ),
    (
        "indptr decreases",
        errors.ArgumentError,
        ["`kv_page_indptr`", "decreases from 4 to 3"],
        lambda b: {"kv_page_indptr": [0, 4, 3]},
    ),
    (
        "too few pages",
        errors.PlanMismatchError,
        ["request 0", "kv_len 20", "needs 3"],
        lambda b: {"kv_page_indptr": [0, 2, 6]},
    ),
    ("indices end", errors.ArgumentError, ["ends at 9", "6 entries"], lambda b: {"kv_page_indptr": [0, 4, 9]}),
    (
        "indptr rank",
        errors.ArgumentError,
        ["`kv_page_indptr`", "rank 2"],
        lambda b: {"kv_page_indptr": b.kv_page_indptr[None]},
    ),
    (
        "indices strided",
        errors.ArgumentError,
        ["`kv_page_indices`", "contiguous"],
        lambda b: {"kv_page_indices": np.repeat(b.kv_page_indices, 2)[::2]},
    ),
    ("plan is not one", errors.PlanMismatchError, ["plan"], lambda b: {"plan": np.zeros(64, np.int32)}),
    (
        "plan dtype",
        errors.TvmInferError,
        ["plan"],
        lambda b: {"plan": np.zeros(64, np.float32), "workspace": np.zeros(4, np.float32)},
    ),
    ("out dtype", errors.DTypeError, ["`o`", "float16"], lambda b: {"out": np.zeros(b.q.shape, np.float16)}),
    ("out shape", errors.ArgumentError, ["`o`", "of values"], lambda b: {"out": np.zeros((4, 4, 8), np.float32)}),
    ("lse dtype", errors.DTypeError, ["`lse`", "float64"], lambda b: {"lse": np.zeros(b.q.shape[:2])}),
    ("lse shape", errors.ArgumentError, ["`lse`"], lambda b: {"lse": np.zeros((4, 3), np.float32)}),
    ("workspace dtype", errors.DTypeError, ["`workspace`", "float64"], lambda b: {"workspace": np.zeros(10_000)}),
    ("workspace is a list", errors.ArgumentError, ["`workspace`", "list"], lambda b: {"workspace": [1.0]}),
]


@pytest.mark.parametrize(
    ("kind", "words", "changes"), [c[1:] for c in ATTENTION_ERRORS], ids=[c[0] for c in ATTENTION_ERRORS]
)
def test_attention_refuses(batch, kind, words, changes):
    with pytest.raises(kind) as caught:
        attend(batch, **changes(batch))
    for word in words:
        assert word.strip("'") in str(caught.value), str(caught.value)


def test_workspace_too_small(batch):
    plan = make_plan(batch, fixed_split_size=4)
    assert plan.num_partial_rows > 0
    with pytest.raises(errors.WorkspaceError, match=r"`workspace` holds 10 floats.*needs \d+.*workspace_size"):
        attend(batch, plan=plan, workspace=np.zeros(10, np.float32))


def test_plan_for_other_lengths(batch):
    """The same tokens and requests, but keys that the plan does not know of."""
    k, v = np.concatenate(batch.keys), np.concatenate(batch.values)
    with pytest.raises(errors.PlanMismatchError, match=r"request 0 20 keys.*made for 19"):
        tvm_infer.ragged_attention(batch.q, k, v, make_plan(batch, kv_len=[19, 4]), kv_indptr=[0, 20, 23])
    with pytest.raises(errors.PlanMismatchError, match="request 1 has kv_len 30"):
        attend(batch, plan=make_plan(batch, kv_len=[20, 30]))


def test_page_indices_out_of_range_are_a_debug_check(batch):
    former = _ffi.func("set_debug_checks")(True)
    try:
        tvm_infer.attention(batch.q, batch.kv_cache, make_plan(batch), **batch.tables)
        indices = batch.kv_page_indices.copy()
        indices[1] = len(batch.kv_cache)
        with pytest.raises(errors.ArgumentError, match=r"`kv_page_indices` has page \d+ at entry 1 \(request 0\)"):
            attend(batch, kv_page_indices=indices)
    finally:
        _ffi.func("set_debug_checks")(former)


PLAN_ERRORS = [
    ("indptr start", errors.ArgumentError, ["qo_indptr", "1", "0"], {"qo_indptr": [1, 2, 4]}),
    ("indptr decreases", errors.ArgumentError, ["qo_indptr", "3"], {"qo_indptr": [0, 4, 3]}),
    ("indptr length", errors.ArgumentError, ["qo_indptr", "3"], {"qo_indptr": [0, 4]}),
    ("kv_len negative", errors.ArgumentError, ["kv_len", "-1"], {"kv_len": [-1, 3]}),
    ("kv_len below new tokens", errors.ArgumentError, ["kv_len", "2", "3"], {"kv_len": [20, 2]}),
    ("kv_len dtype", errors.DTypeError, ["kv_len", "int64"], {"kv_len": np.asarray([20, 3])}),
    ("heads", errors.ArgumentError, ["num_qo_heads", "5", "2"], {"num_qo_heads": 5}),
    ("no kv heads", errors.ArgumentError, ["num_kv_heads", "0"], {"num_kv_heads": 0}),
    ("no ctas", errors.ArgumentError, ["num_ctas", "0"], {"num_ctas": 0}),
    ("split size", errors.ArgumentError, ["fixed_split_size", "-2"], {"fixed_split_size": -2}),
    ("window", errors.ArgumentError, ["window_left", "-2"], {"window_left": -2}),
    ("dtype", errors.DTypeError, ["dtype", "int8"], {"dtype": "int8"}),
    ("tile table", errors.ArgumentError, ["tile_table", "4"], {"tile_table": (1, 2, 3, 4)}),
    ("tile rows", errors.ArgumentError, ["tile_table", "0"], {"tile_table": (0, 16, 1, 1, 1)}),
    ("floats in a list", errors.DTypeError, ["kv_len", "float"], {"kv_len": [20.5, 3.0]}),
    ("huge list", errors.ArgumentError, ["kv_len", "int32"], {"kv_len": [2**40, 3]}),
    ("out without partial rows", errors.ArgumentError, ["max_partial_rows"], {"out": np.zeros(999, np.int32)}),
    ("out too small", errors.WorkspaceError, ["bytes"], {"out": np.zeros(40, np.int32), "max_partial_rows": 9999}),
    (
        "partial rows",
        errors.WorkspaceError,
        ["max_partial_rows", "1", "64"],
        {"out": np.zeros(9999, np.int32), "max_partial_rows": 1, "fixed_split_size": 2},
    ),
]


@pytest.mark.parametrize(("kind", "words", "changes"), [c[1:] for c in PLAN_ERRORS], ids=[c[0] for c in PLAN_ERRORS])
def test_plan_refuses(batch, kind, words, changes):
    with pytest.raises(kind) as caught:
        make_plan(batch, **changes)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_workspace_size_wants_the_number_of_keys_for_a_fixed_split():
    with pytest.raises(errors.ArgumentError, match="max_kv_tokens"):
        tvm_infer.workspace_size(
            num_qo_heads=4, num_kv_heads=2, head_dim=16, max_requests=2, max_tokens=9, fixed_split_size=16
        )


def append(batch, **changes):
    arguments = {
        "k": batch.k_new,
        "v": batch.v_new,
        "kv_cache": batch.kv_cache.copy(),
        "qo_indptr": batch.qo_indptr,
        "kv_len": batch.kv_len,
        **batch.tables,
        **changes,
    }
    before = arguments["kv_cache"].copy()
    try:
        tvm_infer.append(**arguments)
    finally:
        assert np.array_equal(before, arguments["kv_cache"], equal_nan=True)


@pytest.mark.parametrize(
    ("kind", "words", "changes"),
    [
        (errors.ArgumentError, ["`k`", "4 new tokens"], lambda b: {"k": b.k_new[:3]}),
        (errors.ArgumentError, ["`v`", "num_kv_heads"], lambda b: {"v": b.v_new[:, :1]}),
        (errors.DTypeError, ["`k`", "float16"], lambda b: {"k": b.k_new.astype(np.float16)}),
        (errors.ArgumentError, ["`kv_len`", "appends 3"], lambda b: {"kv_len": [20, 2]}),
        (errors.ArgumentError, ["`qo_indptr`", "starts at 1"], lambda b: {"qo_indptr": [1, 1, 4]}),
        (errors.PlanMismatchError, ["request 0", "needs"], lambda b: {"kv_page_indptr": [0, 2, 6]}),
    ],
    ids=["tokens", "heads", "dtype", "kv_len", "indptr", "pages"],
)
def test_append_refuses_and_changes_nothing(batch, kind, words, changes):
    with pytest.raises(kind) as caught:
        append(batch, **changes(batch))
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_merge_refuses():
    o, lse = np.zeros((3, 2, 16), np.float32), np.zeros((3, 2), np.float32)
    with pytest.raises(errors.ArgumentError, match=r"`o_b`.*as o_a"):
        tvm_infer.merge(o, lse, o[:2], lse[:2])
    with pytest.raises(errors.DTypeError, match=r"`lse_b`.*float64"):
        tvm_infer.merge(o, lse, o, lse.astype(np.float64))
    with pytest.raises(errors.ArgumentError, match="`o_a` has shape"):
        tvm_infer.merge(o[0], lse, o, lse)


def test_errors_are_also_what_python_expects():
    assert issubclass(errors.ArgumentError, ValueError)
    assert issubclass(errors.DTypeError, TypeError)
    assert issubclass(errors.UnknownSequenceError, KeyError)
