"""Keys wider than values, on the CPU executor, against float64; slots that no key fills are NaN."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tvm_infer
from tvm_infer import variant
from tvm_infer.errors import ArgumentError, WorkspaceError
from tvm_infer.testing import attention_reference, merge_reference, relative_error

DTYPES = {
    "float32": (np.float32, 2e-6),
    "float16": (np.float16, 1e-3),
    "bfloat16": (ml_dtypes.bfloat16, 8e-3),
}
# head_dim, head_dim_vo: DeepSeek's; widths that end inside of a vector; the narrowest
WIDTHS = [(192, 128), (256, 64), (104, 72), (24, 8), (64, 64)]


class Batch:
    """Requests in pages of their own; whatever holds no key is NaN, page tables end in garbage."""

    def __init__(self, rng, qo_lens, kv_lens, dtype, widths, *, heads=(6, 2), page=16, layout="HND"):
        self.type, self.tolerance = DTYPES[dtype]
        (self.num_qo, self.num_kv), (self.dim, self.dim_vo) = heads, widths
        self.dtype, self.page, self.layout, self.qo_lens, self.kv_lens = dtype, page, layout, qo_lens, kv_lens
        self.indptr = np.cumsum([0, *qo_lens]).astype(np.int32)
        self.q = self.normal(rng, sum(qo_lens), self.num_qo, self.dim)
        self.keys = [self.normal(rng, m, self.num_kv, self.dim) for m in kv_lens]
        self.values = [self.normal(rng, m, self.num_kv, self.dim_vo) for m in kv_lens]
        counts = [-(-m // page) for m in kv_lens]
        order = rng.permutation(sum(counts) + 2)
        ends = np.cumsum([0, *counts])
        self.pages = [order[a:b] for a, b in itertools.pairwise(ends)]
        self.tables = {
            "kv_page_indptr": np.cumsum([0, *(c + 1 for c in counts)]).astype(np.int32),
            "kv_page_indices": np.concatenate([[*pages, -12345] for pages in self.pages] or [[]]).astype(np.int32),
            "kv_layout": layout,
        }
        inner = (page, self.num_kv) if layout == "NHD" else (self.num_kv, page)
        self.cache = tuple(np.full((len(order), *inner, width), np.nan, self.type) for width in widths)

    def normal(self, rng, *shape):
        return rng.standard_normal(shape).astype(self.type)

    def rows(self, which):
        """A view [pages, page_size, heads, width] of keys (0) or values (1)."""
        return self.cache[which] if self.layout == "NHD" else self.cache[which].transpose(0, 2, 1, 3)

    def fill(self, before_new=False):
        for r, pages in enumerate(self.pages):
            slots = np.arange(self.kv_lens[r] - (self.qo_lens[r] if before_new else 0))
            for which, x in enumerate((self.keys[r], self.values[r])):
                self.rows(which)[pages[slots // self.page], slots % self.page] = x[: len(slots)]

    def new(self):
        """k, v of the new tokens."""
        parts = zip(self.qo_lens, self.keys, self.values, strict=True)
        both = [(k[len(k) - n :], v[len(v) - n :]) for n, k, v in parts]
        return tuple(np.concatenate(x) for x in zip(*both, strict=True))

    def plan(self, **kwargs):
        heads = dict(num_qo_heads=self.num_qo, num_kv_heads=self.num_kv, head_dim=self.dim, head_dim_vo=self.dim_vo)
        kwargs = {"num_ctas": 7, "dtype": self.dtype, **kwargs}
        return tvm_infer.plan(self.indptr, np.array(self.kv_lens, np.int32), **heads, **kwargs)

    def outputs(self, plan):
        out = np.full((*self.q.shape[:2], self.dim_vo), np.nan, self.type)
        workspace = np.full(plan.num_partial_rows * (self.dim_vo + 1), np.nan, np.float32)
        return {"out": out, "lse": np.full(self.q.shape[:2], np.nan, np.float32), "workspace": workspace}

    def check(self, made, **kwargs):
        out, lse = made["out"], made["lse"]
        expected, expected_lse = np.zeros(out.shape), np.full(lse.shape, -np.inf)
        for r, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            at = slice(*self.indptr[r : r + 2])
            expected[at], expected_lse[at] = attention_reference(
                self.q[at], k, v, **{"sm_scale": self.dim**-0.5, **kwargs}
            )
        assert relative_error(out, expected) < self.tolerance
        seen = np.isfinite(expected_lse)
        assert np.isneginf(lse[~seen]).all() and np.abs(lse[seen] - expected_lse[seen]).max(initial=0) < 2e-5


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pages(data):
    """Any dtype, widths, page size, layout, mask and split; decodes and prompts (few rows and many take different ways)."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    causal = data.draw(st.booleans())
    lens = data.draw(st.lists(st.tuples(st.sampled_from([0, 1, 1, 3, 45]), st.integers(0, 200)), max_size=5))
    qo_lens, kv_lens = [n for n, _ in lens], [m + (n if causal else 0) for n, m in lens]
    batch = Batch(
        rng,
        qo_lens,
        kv_lens,
        data.draw(st.sampled_from(list(DTYPES))),
        data.draw(st.sampled_from(WIDTHS)),
        heads=data.draw(st.sampled_from([(2, 2), (6, 2), (32, 1)])),
        page=data.draw(st.sampled_from([1, 5, 16, 64])),
        layout=data.draw(st.sampled_from(["HND", "NHD"])),
    )
    batch.fill()
    plan = batch.plan(causal=causal, fixed_split_size=data.draw(st.sampled_from([0, 64, -1])))
    made = batch.outputs(plan)
    tvm_infer.attention(batch.q, batch.cache, plan, **batch.tables, **made)
    batch.check(made, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", WIDTHS[:3])
def test_append_then_attend(dtype, widths):
    batch = Batch(np.random.default_rng(0), [1, 17, 0, 40], [99, 17, 30, 333], dtype, widths, layout="NHD")
    batch.fill(before_new=True)
    plan = batch.plan()
    made = batch.outputs(plan)
    k, v = batch.new()
    tvm_infer.append_attention(batch.q, k, v, batch.cache, plan, **batch.tables, **made)
    batch.check(made)
    stored = [x.copy() for x in batch.cache]
    batch.fill()
    for ours, theirs in zip(stored, batch.cache, strict=True):
        np.testing.assert_array_equal(ours.view(np.uint8), theirs.view(np.uint8))
    # the same by append alone, into poison
    again = Batch(np.random.default_rng(0), [1, 17, 0, 40], [99, 17, 30, 333], dtype, widths, layout="NHD")
    again.fill(before_new=True)
    kv_len = np.array(again.kv_lens, np.int32)
    tvm_infer.append(k, v, again.cache, qo_indptr=again.indptr, kv_len=kv_len, **again.tables)
    for ours, theirs in zip(again.cache, stored, strict=True):
        np.testing.assert_array_equal(ours.view(np.uint8), theirs.view(np.uint8))


@pytest.mark.parametrize("widths", WIDTHS[:2])
def test_outputs_and_workspace_are_allocated_as_wide_as_values(widths):
    batch = Batch(np.random.default_rng(1), [1, 1, 5], [700, 90, 400], "float32", widths)
    batch.fill()
    plan = batch.plan(fixed_split_size=128)
    assert plan.num_partial_rows > 0
    out, lse = tvm_infer.attention(batch.q, batch.cache, plan, **batch.tables, return_lse=True)
    assert out.shape == (7, 6, widths[1])
    batch.check({"out": out, "lse": lse})
    k, v = np.concatenate(batch.keys), np.concatenate(batch.values)
    kv_indptr = np.cumsum([0, *batch.kv_lens]).astype(np.int32)
    out, lse = tvm_infer.ragged_attention(batch.q, k, v, plan, kv_indptr=kv_indptr, return_lse=True)
    batch.check({"out": out, "lse": lse})
    out, lse = tvm_infer.contiguous_attention(batch.q, k, v, plan, kv_start=kv_indptr[:-1], return_lse=True)
    batch.check({"out": out, "lse": lse})
    size = tvm_infer.workspace_size(
        num_qo_heads=6, num_kv_heads=2, head_dim=widths[0], head_dim_vo=widths[1], max_requests=3, max_tokens=7
    )
    assert size.workspace_floats(widths[1]) == size.partial_rows * (widths[1] + 1)
    with pytest.raises(WorkspaceError, match=f"partial rows of head_dim {widths[1]}"):
        short = np.empty(plan.num_partial_rows * (widths[1] + 1) - 1, np.float32)
        tvm_infer.attention(batch.q, batch.cache, plan, **batch.tables, workspace=short)


def test_states_merge():
    rng = np.random.default_rng(2)
    batch = Batch(rng, [9], [200], "float32", (192, 128))
    heads = dict(num_qo_heads=6, num_kv_heads=2, head_dim=192, head_dim_vo=128, causal=False)
    states = []
    for keys in (slice(0, 77), slice(77, 200)):
        k, v = batch.keys[0][keys], batch.values[0][keys]
        plan = tvm_infer.plan([0, 9], [len(k)], **heads)
        states.append(tvm_infer.ragged_attention(batch.q, k, v, plan, kv_indptr=[0, len(k)], return_lse=True))
    (o_a, lse_a), (o_b, lse_b) = states
    out, lse = tvm_infer.merge(o_a, lse_a, o_b, lse_b)
    assert out.shape == (9, 6, 128)
    assert relative_error(out, merge_reference(o_a, lse_a, o_b, lse_b)[0]) < 2e-6
    batch.check({"out": out, "lse": lse}, causal=False)


def test_levels_block_sparse_and_lists_of_heads():
    rng = np.random.default_rng(3)
    heads = dict(num_qo_heads=6, num_kv_heads=2, head_dim=192, head_dim_vo=128)
    # shared keys: both requests' tables begin with the same pages
    batch = Batch(rng, [1] * 8, [530] * 8, "float32", (192, 128))
    for r in range(1, 8):
        batch.pages[r][:32] = batch.pages[0][:32]
        batch.keys[r][:512], batch.values[r][:512] = batch.keys[0][:512], batch.values[0][:512]
    batch.tables["kv_page_indices"] = np.concatenate([[*p, -12345] for p in batch.pages]).astype(np.int32)
    batch.fill()
    plan = batch.plan(levels=[[(range(8), 512)]])
    assert plan.num_shared_works > 0
    made = batch.outputs(plan)
    tvm_infer.attention(batch.q, batch.cache, plan, **batch.tables, **made)
    batch.check(made)

    q, k = (rng.standard_normal((n, h, 192)).astype("float32") for n, h in ((10, 6), (32, 2)))
    v = rng.standard_normal((32, 2, 128)).astype("float32")
    plan = tvm_infer.plan_block_sparse([0, 2, 3, 3], [0, 3, 1], (4, 8), num_qo_tokens=10, num_kv_tokens=32, **heads)
    o = tvm_infer.block_sparse_attention(q, k, v, plan)
    seen = np.r_[0:8, 24:32]
    expected, _ = attention_reference(q[:4], k[seen], v[seen], sm_scale=192**-0.5, causal=False)
    assert relative_error(o[:4], expected) < 2e-6 and o.shape == (10, 6, 128) and not o[8:].any()

    plan = tvm_infer.plan([0, 1], [[32, 9]], **heads)
    tables = dict(kv_page_indptr=[0, 2, 3], kv_page_indices=[1, 0, 1])
    cache = tuple(x.reshape(2, 16, 2, -1).transpose(0, 2, 1, 3) for x in (k, v))
    o = tvm_infer.attention(q[:1], cache, plan, **tables)
    for head, keys in ((0, np.r_[16:32, 0:16]), (1, np.r_[16:25])):
        at = slice(3 * head, 3 * head + 3)
        expected, _ = attention_reference(
            q[:1, at], k[keys, head : head + 1], v[keys, head : head + 1], sm_scale=192**-0.5
        )
        assert relative_error(o[:, at], expected) < 2e-6


def test_variants_and_rotation_on_the_host():
    batch = Batch(np.random.default_rng(4), [1, 20], [90, 64], "float32", (64, 40))
    batch.fill(before_new=True)
    k, v = batch.new()
    rope = tvm_infer.RopeConfig(32)
    plan = batch.plan()
    rotated = tvm_infer.rope_append(batch.q, k, v, batch.cache, rope=rope, plan=plan, **batch.tables)
    positions = np.concatenate([[89], np.arange(44, 64)])
    from tvm_infer.testing import rope_reference

    batch.q = rope_reference(batch.q, positions, rope.inv_freq()).astype(np.float32)
    assert relative_error(rotated, batch.q) < 1e-6
    new_k = rope_reference(k, positions, rope.inv_freq()).astype(np.float32)
    for r, n in enumerate(batch.qo_lens):
        batch.keys[r][-n:] = new_k[batch.indptr[r] : batch.indptr[r + 1]]
    capped = variant.STANDARD["soft_cap"].bind(cap=1e6)  # so high that it changes nothing
    plan = batch.plan(variant=capped)
    made = batch.outputs(plan)
    tvm_infer.attention(rotated, batch.cache, plan, **batch.tables, variant=capped, **made)
    batch.check(made)


def test_costs_lie_between_those_of_equal_widths():
    for table, dtype in ((tvm_infer.cpu_tile_table, "bfloat16"), (tvm_infer.cuda_tile_table, "bfloat16")):
        narrow, between, wide = (
            np.array(table(dtype, dim, head_dim_vo=vo)[:-3]).reshape(-1, 5)[:, 4]  # the last three are of shared keys
            for dim, vo in ((128, 128), (192, 128), (192, None))
        )
        assert (narrow < between).all() and (between < wide).all()


CACHE = (np.zeros((2, 2, 16, 192), np.float32), np.zeros((2, 2, 16, 128), np.float32))
TABLES = {"kv_page_indptr": [0, 1], "kv_page_indices": [1]}


@pytest.mark.parametrize(
    ("words", "cache", "out"),
    [
        (
            ["`v_cache`", "head_dim_vo of 192 beside keys of head_dim 128", "192 with head_dim_vo 128"],
            CACHE[::-1],
            None,
        ),
        (["`v_cache`", "head_dim 12 is not supported"], (CACHE[0], CACHE[1][..., :12]), None),
        (["`o`", "dimension 2 must be 128 (head_dim_vo, of values)"], CACHE, np.zeros((1, 4, 192), np.float32)),
        (["`v_cache`", "dimension 0 must be 2 (as k_cache)"], (CACHE[0], CACHE[1][:1]), None),
    ],
)
def test_attention_refuses(words, cache, out):
    q = np.zeros((1, 4, cache[0].shape[-1]), np.float32)
    plan = tvm_infer.plan([0, 1], [5], num_qo_heads=4, num_kv_heads=2, head_dim=192)
    with pytest.raises(ArgumentError) as caught:
        tvm_infer.attention(q, cache, plan, **TABLES, out=out)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_new_tokens_and_plans_refuse():
    k, v = np.zeros((1, 2, 192), np.float32), np.zeros((1, 2, 128), np.float32)
    lengths = {"qo_indptr": [0, 1], "kv_len": [5]}
    for name, pair in (("k", (v, v)), ("v", (k, k))):
        with pytest.raises(ArgumentError, match=f"`{name}`.*dimension 2 must be"):
            tvm_infer.append(*pair, CACHE, **lengths, **TABLES)
    for vo in (0, 193):
        with pytest.raises(ArgumentError, match=f"`head_dim_vo` is {vo}; it must be from 1 to head_dim = 192"):
            tvm_infer.plan([0, 1], [5], num_qo_heads=4, num_kv_heads=2, head_dim=192, head_dim_vo=vo)
    with pytest.raises(tvm_infer.errors.ExecutorError, match=r"head_dim 192 beside a head_dim_vo of 64.*192 with a"):
        tvm_infer.cuda_tile_table("bfloat16", 192, head_dim_vo=64)
    ragged = dict(kv_indptr=[0, 5])
    plan = tvm_infer.plan([0, 1], [5], num_qo_heads=4, num_kv_heads=2, head_dim=128)
    with pytest.raises(ArgumentError, match=r"`v`.*head_dim_vo of 192 beside keys of head_dim 128"):
        keys = np.zeros((5, 2, 128), np.float32)
        tvm_infer.ragged_attention(
            np.zeros((1, 4, 128), np.float32), keys, np.zeros((5, 2, 192), np.float32), plan, **ragged
        )
