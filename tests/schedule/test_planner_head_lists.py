"""Plans in which every KV head of a request has a list of keys of its own: what any plan must hold, and the planner in Python."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tvm_infer
from tvm_infer import variant
from tvm_infer.errors import ArgumentError, WorkspaceError
from tvm_infer.schedule import Band, reference
from tvm_infer.testing.plan_checks import check_plan

GPU = (64, 64, 1_500_000, 5_000, 15_300, 128, 128, 2_500_000, 10_000, 11_000)
TABLES = [GPU, (16, 16, 400_000, 1_000, 2_000, 64, 32, 900_000, 1_000, 7_000), (1, 1, 0, 0, 1), (4, 1000, 10, 0, 1)]


def check(qo_len, kv_len, *, group, num_ctas, causal, fixed_split_size, tile_table):
    """The plan, which is the reference's to the byte and no larger than workspace_size says."""
    indptr = np.cumsum([0, *qo_len]).astype(np.int32)
    kv_len = np.array(kv_len, np.int32)
    num_kv_heads = kv_len.shape[1]
    heads = dict(num_qo_heads=num_kv_heads * group, num_kv_heads=num_kv_heads)
    shared = dict(num_ctas=num_ctas, fixed_split_size=fixed_split_size, tile_table=tile_table)
    plan = tvm_infer.plan(indptr, kv_len, head_dim=64, causal=causal, **heads, **shared)
    check_plan(plan)
    assert (plan.kv_len == kv_len.ravel()).all() and plan.num_requests == len(qo_len)
    band = Band(window_right=0 if causal else -1)
    assert plan.buffer.tobytes() == reference.plan(indptr, kv_len, band=band, **heads, **shared).tobytes()
    size = tvm_infer.workspace_size(
        head_dim=64,
        causal=causal,
        max_requests=len(qo_len),
        max_tokens=int(indptr[-1]),
        max_kv_tokens=int(kv_len.sum()),
        head_lists=True,
        **heads,
        **shared,
    )
    assert plan.bytes_used <= size.plan_bytes and plan.num_partial_rows <= size.partial_rows
    out = np.empty(size.plan_bytes // 4, np.int32)
    again = tvm_infer.plan(
        indptr, kv_len, head_dim=64, causal=causal, out=out, max_partial_rows=size.partial_rows, **heads, **shared
    )
    assert again.buffer[: again.bytes_used // 4].tobytes() == plan.buffer.tobytes()
    return plan


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_lists(data):
    causal = data.draw(st.booleans())
    fixed = data.draw(st.sampled_from([0, 0, 0, -1, 1, 64, 1000]))
    longest = 70 if fixed == 1 else data.draw(st.sampled_from([4, 70, 3000]))
    num_kv_heads = data.draw(st.sampled_from([2, 3, 8]))
    qo_lens = st.one_of(st.just(1), st.just(0), st.integers(0, min(longest, 300)))
    lists = st.lists(st.integers(0, longest), min_size=num_kv_heads, max_size=num_kv_heads)
    requests = data.draw(st.lists(st.tuples(qo_lens, lists), max_size=20))
    qo_len = [q for q, _ in requests]
    check(
        qo_len,
        np.array([[k + q if causal else k for k in row] for q, row in requests], np.int32).reshape(-1, num_kv_heads),
        group=data.draw(st.sampled_from([1, 3, 4])),
        num_ctas=data.draw(st.sampled_from([1, 2, 7, 132])),
        causal=causal,
        fixed_split_size=fixed,
        tile_table=data.draw(st.sampled_from(TABLES)),
    )


def test_half_of_the_heads_streaming():
    """16 decodes of 32768 keys, half of the heads of 4 + 64 pages: half of the load, and as balanced as the whole."""
    kv_len = np.full((16, 8), 32768)
    heads = dict(num_qo_heads=32, num_kv_heads=8, head_dim=128, num_ctas=132, tile_table=GPU)
    indptr = np.arange(17, dtype=np.int32)
    dense = tvm_infer.plan(indptr, kv_len[:, 0].astype(np.int32), **heads)
    kv_len[:, ::2] = 68 * 16
    plan = check([1] * 16, kv_len, group=4, num_ctas=132, causal=True, fixed_split_size=0, tile_table=GPU)
    keys = kv_len.sum() / (16 * 8 * 32768)
    assert 0.5 < keys < 0.52 and plan.makespan_us < 0.54 * dense.makespan_us and plan.balance > 0.97


def test_equal_lists_cost_what_the_request_costs():
    """Lists of equal lengths have the cost and, but for runs of heads, the works of a plan without lists."""
    indptr, kv_len = [0, 1, 40, 41], [3000, 500, 9000]
    heads = dict(num_qo_heads=8, num_kv_heads=2, head_dim=64, num_ctas=16, tile_table=GPU, fixed_split_size=-1)
    plan = tvm_infer.plan(indptr, [[n, n] for n in kv_len], **heads)
    flat = tvm_infer.plan(indptr, kv_len, **heads)
    assert plan.total_cost_us == flat.total_cost_us and plan.works["num_kv_heads"].max() == 1
    assert plan.capture_key == flat.capture_key and plan.has_head_lists and not flat.has_head_lists
    assert "r1[0:128] h0 kv[" in str(plan) and "r1[0:128] h1 kv[" in str(plan)
    one = dict(num_qo_heads=4, num_kv_heads=1, head_dim=64, num_ctas=16, tile_table=GPU)
    lists, plain = tvm_infer.plan(indptr, [[n] for n in kv_len], **one), tvm_infer.plan(indptr, kv_len, **one)
    assert lists.buffer.tobytes() == plain.buffer.tobytes() and not lists.has_head_lists


@pytest.mark.parametrize(
    "kv_len", [np.array([[5, 9], [4, 4]], np.int32), [[5, 9], [4, 4]], np.array([[5, 4], [9, 4]], np.int32).T]
)
def test_forms_of_lengths(kv_len):
    heads = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64, num_ctas=4)
    assert tvm_infer.plan([0, 1, 3], kv_len, **heads).kv_len.tolist() == [5, 9, 4, 4]


def test_torch_and_tvm_lengths():
    torch, tvm = pytest.importorskip("torch"), pytest.importorskip("tvm")
    heads = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64, num_ctas=4)
    lengths = np.array([[5, 9], [4, 4]], np.int32)
    for kv_len in (torch.from_numpy(lengths), tvm.runtime.tensor(lengths)):
        assert tvm_infer.plan([0, 1, 3], kv_len, **heads).kv_len.tolist() == [5, 9, 4, 4]
    plain = tvm_infer.plan([0, 1, 3], list(torch.tensor([5, 9])), **heads)
    assert plain.kv_len.tolist() == [5, 9] and not plain.has_head_lists


LISTS = [[5, 9], [4, 4]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_len": [[5, 9, 3], [4, 4, 4]]}, "`kv_len` has shape (2, 3); with a list of keys for each KV head it must be [n"),
        ({"kv_len": [[5, 9]]}, "`kv_len` has 2 entries; 2 requests with 2 KV heads, each with a list of keys, need 4"),
        ({"kv_len": [[5, 9], [4]]}, "`kv_len` is a list of lists that are not as many 32-bit integers each"),
        ({"kv_len": [[5, 9], [4, 2**31]]}, "`kv_len` is a list of lists that are not as many 32-bit integers each"),
        ({"kv_len": [[5, 9], [4, 1]]}, "kv_len[1, 1] is 1, less than the request's 2 query tokens"),
        ({"kv_len": [[5, -9], [4, 4]]}, "kv_len[0, 1] is -9; lengths must be at least 0"),
        ({"qo_indptr": [0, 3, 1]}, "qo_indptr[2] is 1, less than qo_indptr[1] = 3"),
        ({"qo_indptr": [1, 2, 3]}, "qo_indptr[0] is 1"),
        ({"window_left": 3}, "`window_left` is 3 with a `kv_len` of each KV head; such a plan is causal or sees all keys of a list"),
        ({"window_right": 3, "causal": False}, "`window_right` is 3 with a `kv_len` of each KV head"),
        ({"window_left": 3, "num_sink": 2}, "`window_left` is 3 with"),
        ({"chunk": 3}, "`chunk` is 3 with"),
        ({"levels": [[([0, 1], 2)]]}, "`levels` with a `kv_len` of each KV head; such a plan runs without levels"),
        ({"variant": variant.soft_cap.bind(cap=30.0)}, "`variant` with a `kv_len` of each KV head"),
        ({"num_kv_heads": 3}, "`kv_len` has shape (2, 2)"),
        ({"kv_len": np.zeros((1, 2, 2), np.int32)}, "`kv_len` has rank 3"),
        ({"num_qo_heads": 3}, "multiple of num_kv_heads = 2"),
        ({"num_ctas": 0}, "num_ctas is 0"),
    ],
)  # fmt: skip
def test_refusals(change, words):
    good = dict(
        qo_indptr=[0, 1, 3], kv_len=LISTS, num_qo_heads=4, num_kv_heads=2, head_dim=64, num_ctas=4, tile_table=GPU
    )
    before = np.full(4096, -7, np.int32)
    with pytest.raises(ArgumentError, match=re.escape(words)):
        tvm_infer.plan(**(good | change), out=before, max_partial_rows=1000)
    assert (before == -7).all()
    tvm_infer.plan(**good)
    with pytest.raises(WorkspaceError, match="plan buffer holds"):
        tvm_infer.plan(**good, out=np.empty(100, np.int32), max_partial_rows=1000)


def test_workspace_size_has_no_levels():
    heads = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64, max_requests=2, max_tokens=3)
    with pytest.raises(ArgumentError, match="`max_levels` is 2 with head_lists"):
        tvm_infer.workspace_size(**heads, head_lists=True, max_levels=2)
