"""Lists of keys for each KV head, on the CPU executor, against float64 head by head; slots and rows that no list has are NaN."""

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

DIM = 16


class Lists:
    """Requests whose KV heads have lists of kv_len[r][h] keys in pages of their own order; a page holds keys of one head."""

    def __init__(self, rng, qo_lens, kv_lens, page_size, group=3, dtype=np.float32):
        self.qo_lens, self.kv_lens, self.group = qo_lens, np.array(kv_lens, np.int32), group
        self.num_kv_heads = self.kv_lens.shape[1]
        self.indptr = np.cumsum([0, *qo_lens]).astype(np.int32)
        counts = -(-self.kv_lens.ravel() // page_size)
        order = rng.permutation(int(counts.sum()) + 2).astype(np.int32)
        shape = (len(order), 2, self.num_kv_heads, page_size, DIM)
        self.cache = np.full(shape, np.nan, dtype)
        self.q = rng.standard_normal((int(self.indptr[-1]), group * self.num_kv_heads, DIM)).astype(dtype)
        self.keys, indices, page_indptr = [], [], [0]
        for i, length in enumerate(self.kv_lens.ravel()):
            pages, head = order[sum(counts[:i]) :][: counts[i]], i % self.num_kv_heads
            keys = rng.standard_normal((2, length, DIM)).astype(dtype)
            for j in range(length):
                self.cache[pages[j // page_size], :, head, j % page_size] = keys[:, j]
            self.keys.append(keys)
            indices += [*pages.tolist(), -1_234_567_890]  # entries behind a list may be anything
            page_indptr.append(len(indices))
        self.tables = {
            "kv_page_indptr": np.array(page_indptr, np.int32),
            "kv_page_indices": np.array(indices, np.int32),
        }

    def plan(self, **kwargs):
        heads = dict(num_qo_heads=self.q.shape[1], num_kv_heads=self.num_kv_heads, head_dim=DIM)
        return tvm_infer.plan(self.indptr, self.kv_lens, **heads, **kwargs)

    def reference(self, causal):
        o, lse = np.zeros(self.q.shape), np.full(self.q.shape[:2], -np.inf)
        for i, (k, v) in enumerate(self.keys):
            r, h = divmod(i, self.num_kv_heads)
            rows, heads = slice(*self.indptr[r : r + 2]), slice(h * self.group, (h + 1) * self.group)
            o[rows, heads], lse[rows, heads] = attention_reference(
                self.q[rows, heads], k[:, None], v[:, None], sm_scale=DIM**-0.5, causal=causal
            )
        return o, lse

    def run(self, plan, **kwargs):
        out, lse = np.full_like(self.q, np.nan), np.full(self.q.shape[:2], np.nan, np.float32)
        rows = getattr(plan, "num_partial_rows", 0)
        workspace = np.full(rows * (DIM + 1), np.nan, np.float32)
        arguments = dict(out=out, lse=lse, workspace=workspace) | self.tables | kwargs
        tvm_infer.attention(self.q, self.cache, plan, **arguments)
        return out, lse

    def check(self, plan, causal, tolerance=2e-6):
        out, lse = self.run(plan)
        expected, expected_lse = self.reference(causal)
        assert relative_error(out, expected) < tolerance
        seen = np.isfinite(expected_lse)
        assert np.isneginf(lse[~seen]).all() and not out[~seen].any()
        assert np.abs(lse[seen] - expected_lse[seen]).max(initial=0) < 2e-5


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_lists(data):
    """Causal appends, whose new tokens are the last of every list, and rows that see all of a list, which may be empty."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    causal, num_kv_heads = data.draw(st.booleans()), data.draw(st.sampled_from([2, 3]))
    row = st.lists(st.integers(0, 120), min_size=num_kv_heads, max_size=num_kv_heads)
    requests = data.draw(st.lists(st.tuples(st.sampled_from([1, 1, 0, 4, 30]), row), min_size=1, max_size=5))
    kv_lens = [[k + q if causal else k for k in row] for q, row in requests]
    lists = Lists(rng, [q for q, _ in requests], kv_lens, data.draw(st.sampled_from([1, 4, 16])))
    plan = lists.plan(
        causal=causal,
        num_ctas=data.draw(st.sampled_from([1, 3, 16])),
        fixed_split_size=data.draw(st.sampled_from([0, -1, 9])),
        tile_table=data.draw(st.sampled_from([None, (6, 8, 0, 0, 10**6, 37, 8, 0, 0, 11 * 10**5)])),
    )
    lists.check(plan, causal)


def test_streaming_heads_of_one_cache():
    """The example of docs/kv-formats.md: pages of a request, of which every other head reads the first and the last ones only."""
    rng = np.random.default_rng(0)
    page, pages, num_sink, num_recent = 4, 30, 2, 5
    cache = rng.standard_normal((pages, 2, 2, page, DIM)).astype(np.float32)
    table = rng.permutation(pages).astype(np.int32)
    streaming = np.concatenate([table[:num_sink], table[-num_recent:]])
    cache[table[num_sink:-num_recent], :, 1] = np.nan  # of the streaming head
    kv_len = 4 * pages - 1
    q = rng.standard_normal((1, 6, DIM)).astype(np.float32)
    plan = tvm_infer.plan([0, 1], [[kv_len, 4 * 7 - 1]], num_qo_heads=6, num_kv_heads=2, head_dim=DIM)
    out = tvm_infer.attention(
        q, cache, plan, kv_page_indptr=[0, 30, 37], kv_page_indices=np.concatenate([table, streaming])
    )
    for head, rows in ((0, table), (1, streaming)):
        k, v = (x.reshape(-1, 1, DIM)[:-1] for x in (cache[rows, 0, head], cache[rows, 1, head]))
        expected, _ = attention_reference(q[:, head * 3 : head * 3 + 3], k, v, sm_scale=DIM**-0.5)
        assert relative_error(out[:, head * 3 : head * 3 + 3], expected) < 2e-6


def test_rows_without_pages():
    """Lists of rows: ragged, and beginning anywhere; a head's list is read of that head alone."""
    rng = np.random.default_rng(1)
    lengths = np.array([[7, 30], [12, 1]], np.int32)
    k, v = np.full((2, 80, 2, DIM), np.nan, np.float32)
    start = np.array([50, 0, 31, 70], np.int32)
    q = rng.standard_normal((3, 4, DIM)).astype(np.float32)
    expected = np.zeros(q.shape)
    for i, (s, n) in enumerate(zip(start, lengths.ravel(), strict=True)):
        r, h = divmod(i, 2)
        k[s : s + n, h], v[s : s + n, h] = rng.standard_normal((2, n, DIM))
        rows, heads = slice(r * 2, r + 2), slice(2 * h, 2 * h + 2)
        keys = k[s : s + n, h : h + 1], v[s : s + n, h : h + 1]
        expected[rows, heads], _ = attention_reference(q[rows, heads], *keys, sm_scale=DIM**-0.5, causal=False)
    plan = tvm_infer.plan([0, 2, 3], lengths, num_qo_heads=4, num_kv_heads=2, head_dim=DIM, causal=False)
    assert relative_error(tvm_infer.contiguous_attention(q, k, v, plan, kv_start=start), expected) < 2e-6
    runs = [np.concatenate([x[s : s + n] for s, n in zip(start, lengths.ravel(), strict=True)]) for x in (k, v)]
    indptr = np.cumsum([0, *lengths.ravel()]).astype(np.int32)
    assert relative_error(tvm_infer.ragged_attention(q, *runs, plan, kv_indptr=indptr), expected) < 2e-6


def test_refusals():
    lists = Lists(np.random.default_rng(2), [1, 2], [[20, 5], [9, 33]], 4)
    plan = lists.plan()
    table = lists.tables["kv_page_indptr"]
    for change, words in (
        ({"kv_page_indptr": table[:3]}, "`kv_page_indptr` has 3 entries; 4 lists, one for each request and KV head, need 5"),
        ({"kv_page_indptr": np.array([0, 5, 6, 9, 18], np.int32)}, "list 1 has kv_len 5 but argument `kv_page_indptr` gives it 1"),
        ({"variant": variant.soft_cap.bind(cap=30.0)}, "list of keys for each KV head, 4 lists of 2 requests, and the call a variant"),
    ):  # fmt: skip
        with pytest.raises(PlanMismatchError, match=re.escape(words)):
            lists.run(plan, **change)
    new = np.zeros((3, 2, DIM), np.float32)
    words = "4 lists of 2 requests, which say nothing of where a request's new tokens go"
    with pytest.raises(PlanMismatchError, match=words):
        tvm_infer.append_attention(lists.q, new, new, lists.cache, plan, **lists.tables)
    with pytest.raises(PlanMismatchError, match=words):  # bare words of a plan
        tvm_infer.append_attention(lists.q, new, new, lists.cache, plan.buffer, **lists.tables)
    rope = tvm_infer.RopeConfig(DIM)
    for bare in (plan, plan.buffer):
        with pytest.raises(PlanMismatchError, match=words):
            tvm_infer.rope_append(lists.q, new, new, lists.cache, rope=rope, plan=bare, **lists.tables)
    with pytest.raises(PlanMismatchError, match="a list of keys for each KV head"):
        lists.run(plan.buffer, workspace=None, variant=variant.soft_cap.bind(cap=30.0))
    with pytest.raises(ArgumentError, match=r"`kv_indptr` has 3 entries; it must have 5"):
        tvm_infer.ragged_attention(lists.q, new, new, plan, kv_indptr=[0, 1, 3])
