"""Keys that begin anywhere, on the CPU executor, against float64; rows that are no request's are NaN."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tvm_infer
from tvm_infer import variant
from tvm_infer.errors import ArgumentError, PlanMismatchError
from tvm_infer.testing import attention_reference, relative_error

HEADS = dict(num_qo_heads=6, num_kv_heads=2, head_dim=16)


def reference(q, qo_lens, keys, values, **kwargs):
    o, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    end = np.cumsum(qo_lens)
    for e, n, k, v in zip(end, qo_lens, keys, values, strict=True):
        o[e - n : e], lse[e - n : e] = attention_reference(q[e - n : e], k, v, sm_scale=0.25, **kwargs)
    return o, lse


def run(q, k, v, plan, **kwargs):
    out, lse = np.full_like(q, np.nan), np.full(q.shape[:2], np.nan, np.float32)
    workspace = np.full(plan.num_partial_rows * (q.shape[2] + 1), np.nan, np.float32)
    tvm_infer.contiguous_attention(q, k, v, plan, out=out, lse=lse, workspace=workspace, sm_scale=0.25, **kwargs)
    return out, lse


def check(out, lse, expected, expected_lse, tolerance=2e-6):
    assert relative_error(out, expected) < tolerance
    seen = np.isfinite(expected_lse)
    assert np.isneginf(lse[~seen]).all() and np.abs(lse[seen] - expected_lse[seen]).max(initial=0) < 2e-5


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_in_any_order(data):
    """Requests in any order with gaps of NaN between them, some with the same rows."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    causal = data.draw(st.booleans())
    lens = data.draw(st.lists(st.tuples(st.sampled_from([0, 1, 1, 3, 20]), st.integers(0, 90)), max_size=7))
    qo_lens, kv_lens = [q for q, _ in lens], [k + (q if causal else 0) for q, k in lens]
    start, row = np.zeros(len(lens), np.int32), 0
    for r in rng.permutation(len(lens)):
        row += data.draw(st.integers(0, 9))
        start[r] = row
        row += kv_lens[r]
    row += data.draw(st.integers(0, 9))
    k, v = np.full((2, row, 2, 16), np.nan, np.float32)
    for s, n in zip(start, kv_lens, strict=True):
        k[s : s + n], v[s : s + n] = rng.standard_normal((2, n, 2, 16))
    q = rng.standard_normal((sum(qo_lens), 6, 16)).astype(np.float32)
    plan = tvm_infer.plan(
        np.cumsum([0, *qo_lens]).astype(np.int32),
        np.array(kv_lens, np.int32),
        causal=causal,
        num_ctas=data.draw(st.sampled_from([1, 4])),
        fixed_split_size=data.draw(st.sampled_from([0, 7])),
        **HEADS,
    )
    keys, values = ([x[s : s + n] for s, n in zip(start, kv_lens, strict=True)] for x in (k, v))
    check(*run(q, k, v, plan, kv_start=start), *reference(q, qo_lens, keys, values, causal=causal))
    twice = tvm_infer.plan([0, 1, 2], [max(kv_lens, default=0)] * 2, causal=False, **HEADS)
    if kv_lens and max(kv_lens) > 0:
        r = int(np.argmax(kv_lens))
        both = np.repeat(rng.standard_normal((1, 6, 16)), 2, 0).astype(np.float32)
        out, _ = run(both, k, v, twice, kv_start=[int(start[r])] * 2)
        assert out[0].tobytes() == out[1].tobytes() and np.isfinite(out).all()


def buffers(layout, rng, kv_lens, max_len=40):
    """k and v [len(kv_lens) + 1, max_len, 2, 16] as a cache has them, NaN where no key is."""
    shape = {
        "BSHD": (max_len, 2, 16),
        "BHSD": (2, max_len, 16),
        "sliced": (max_len + 13, 2, 16),
        "joined": (max_len, 4, 16),
    }[layout]
    k, v = np.full((2, len(kv_lens) + 1, *shape), np.nan, np.float32)
    if layout == "joined":  # keys and values side by side in one tensor
        k, v = k[..., :2, :], k[..., 2:, :]
    if layout == "BHSD":
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    k, v = k[:, :max_len], v[:, :max_len]
    for r, n in enumerate(kv_lens):
        k[r, :n], v[r, :n] = rng.standard_normal((2, n, 2, 16))
    return k, v


@pytest.mark.parametrize("layout", ["BSHD", "BHSD", "sliced", "joined"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_buffers(layout, kind):
    rng = np.random.default_rng(4)
    qo_lens, kv_lens = [1, 5, 1, 30], [40, 17, 1, 33]
    k, v = buffers(layout, rng, kv_lens)
    plan = tvm_infer.plan([0, 1, 6, 7, 37], kv_lens, **HEADS)
    q = rng.standard_normal((37, 6, 16)).astype(np.float32)
    expected = reference(
        q, qo_lens, [k[r, :n] for r, n in enumerate(kv_lens)], [v[r, :n] for r, n in enumerate(kv_lens)]
    )
    if kind == "torch":
        torch = pytest.importorskip("torch")
        k, v = torch.from_numpy(k), torch.from_numpy(v)
    out, lse = run(q, k, v, plan)
    check(out, lse, *expected)
    # Requests in other buffers, and with padding before their keys.
    start = tvm_infer.contiguous_start(k, v)
    assert start.dtype == np.int32 and start.shape == (5,)
    other = tvm_infer.plan([0, 1, 2], [20, 11], **HEADS)
    rows = np.array([start[3] + 4, start[1]], np.int32)
    out, lse = run(q[:2], k, v, other, kv_start=rows)
    k, v = np.asarray(k), np.asarray(v)
    check(out, lse, *reference(q[:2], [1, 1], [k[3, 4:24], k[1, :11]], [v[3, 4:24], v[1, :11]]))


@pytest.mark.parametrize("shape", [(3, 1), (1, 9), (0, 9)])
def test_degenerate_buffers(shape):
    rng = np.random.default_rng(6)
    k, v = rng.standard_normal((2, *shape, 2, 16)).astype(np.float32)
    q = rng.standard_normal((shape[0], 6, 16)).astype(np.float32)
    plan = tvm_infer.plan(list(range(shape[0] + 1)), [shape[1]] * shape[0], **HEADS)
    check(*run(q, k, v, plan), *reference(q, [1] * shape[0], list(k), list(v)))


def test_variants_and_scales():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(7)
    k, v = rng.standard_normal((2, 50, 2, 16)).astype(ml_dtypes.float8_e4m3fn)
    k[20:30] = v[20:30] = np.nan
    q = rng.standard_normal((2, 6, 16)).astype(np.float32)
    rows = {"kv_start": np.array([30, 2], np.int32)}
    plan = tvm_infer.plan([0, 1, 2], [20, 18], kv_dtype="float8_e4m3fn", **HEADS)
    keys, values = ([f * x[30:].astype(np.float64), f * x[2:20].astype(np.float64)] for f, x in ((0.5, k), (2.0, v)))
    out, lse = run(q, k, v, plan, k_scale=0.5, v_scale=2.0, **rows)
    check(out, lse, *reference(q, [1, 1], keys, values), tolerance=1e-5)
    soft_cap = variant.soft_cap.bind(cap=1.0)
    wide = [x.astype(np.float32) for x in (k, v)]
    capped, _ = run(q, *wide, plan, variant=soft_cap, **rows)
    indptr = np.array([0, 20, 38], np.int32)
    ragged = [np.concatenate([x[30:], x[2:20]]) for x in wide]
    same = tvm_infer.ragged_attention(q, *ragged, plan, kv_indptr=indptr, sm_scale=0.25, variant=soft_cap)
    assert relative_error(capped, same) < 1e-6 and relative_error(capped, out) > 1e-3


def test_refusals():
    k = np.zeros((100, 2, 16), np.float32)
    q = np.zeros((2, 6, 16), np.float32)
    plan = tvm_infer.plan([0, 1, 2], [30, 40], **HEADS)
    run = tvm_infer.contiguous_attention
    cache = np.zeros((2, 50, 2, 16), np.float32)
    odd = np.lib.stride_tricks.as_strided(np.zeros(9999, np.float32), (2, 50, 2, 16), (4 * 1610, 4 * 32, 4 * 16, 4))
    longer = np.zeros((2, 60, 2, 16), np.float32)[:, :50]
    for arguments, kwargs, kind, words in (
        ((q, k, k, plan), {}, ArgumentError, "`kv_start` is None"),
        ((q, k, k, plan), {"kv_start": [0]}, ArgumentError, "`kv_start` has 1 entries; it must have 2"),
        ((q, k, k, plan), {"kv_start": [0, 30, 70]}, ArgumentError, "`kv_start` has 3 entries; it must have 2"),
        ((q, k, k, plan), {"kv_start": [0, 61]}, ArgumentError, "`kv_start` is 61 for request 1, which has 40"),
        ((q, k, k, plan), {"kv_start": [-1, 0]}, ArgumentError, "`kv_start` is -1 for request 0"),
        ((q, k, k, plan), {"kv_start": [2**31 - 1, 0]}, ArgumentError, "`kv_start` is 2147483647 for request 0"),
        ((q, k[:, :1], k[:, :1], plan), {"kv_start": [0, 30]}, ArgumentError, "num_kv_heads of the plan"),
        ((q, cache[:1], cache[:1], plan), {}, ArgumentError, "`kv_start` has 1 entries; it must have 2"),
        ((q, cache[:, :20], cache[:, :20], plan), {"kv_start": [0, 31]}, ArgumentError, "`kv_start` is 31 for request 1, which has 40"),
        ((q, odd, odd, plan), {}, ArgumentError, "`k`, shape [2, 50, 2, 16], has strides 1610 from one buffer to the next and 32"),
        ((q, cache, longer, plan), {}, ArgumentError, "`k` and `v` have 50 and 60 rows from one buffer to the next"),
        ((q, cache[0, 0], cache[0, 0], plan), {"kv_start": [0, 0]}, ArgumentError, "`k` has rank 2"),
        ((q[:1], k, k, plan), {"kv_start": [0, 30]}, PlanMismatchError, "`q` has 1 tokens"),
    ):  # fmt: skip
        with pytest.raises(kind, match=re.escape(words)):
            run(*arguments, **kwargs)
