"""Keys that a band hides from every query of a request: NaN in them, and in the table a page that is not theirs, do not show."""

from __future__ import annotations

import numpy as np
import pytest

import tvm_infer
from tvm_infer import errors, variant
from tvm_infer.testing import make_paged_batch, relative_error

HEADS = {"num_qo_heads": 6, "num_kv_heads": 2, "head_dim": 24}


def two_sided(left, right):
    return variant.two_sided_window.bind(left=left, right=right), lambda p, j: (p - j <= left) & (j - p <= right)


def sinks(num, left):
    return variant.sink_window.bind(sink=num, window=left), lambda p, j: ((j < num) | (p - j <= left)) & (j <= p)


def chunked(size):
    return variant.chunked_local.bind(chunk=size), lambda p, j: (p // size == j // size) & (j <= p)


_blocks = variant.Variant("blocks", mask=lambda q_pos, kv_pos, n: q_pos // n == kv_pos // n, n=variant.scalar("int32"))
_sinks_and_chunks = variant.Variant(
    "sinks_and_chunks",
    mask=lambda q_pos, kv_pos, s, n: ((kv_pos < s) | (q_pos // n == kv_pos // n)) & (kv_pos <= q_pos),
    s=variant.scalar("int32"),
    n=variant.scalar("int32"),
)


def blocks(size):
    return _blocks.bind(n=size), lambda p, j: p // size == j // size


def sinks_and_chunks(num, size):
    return _sinks_and_chunks.bind(s=num, n=size), lambda p, j: ((j < num) | (p // size == j // size)) & (j <= p)


BANDS = {
    "sinks": sinks(4, 9),
    "sinks, long window": sinks(33, 64),
    "one sink": sinks(1, 0),
    "chunks": chunked(17),
    "long chunks": chunked(64),
    "chunks, not causal": blocks(19),
    "sinks and chunks": sinks_and_chunks(5, 23),
    "both sides": two_sided(13, 3),
}
# (queries, keys) of each request: decodes at all distances from sinks and chunks, appended prompts, prompts, none
BATCHES = {
    "decode": ((1,) * 9, (1, 5, 14, 15, 17, 64, 200, 257, 333)),
    "append": ((7, 40, 3, 0, 1), (200, 301, 3, 40, 90)),
    "prefill": ((33, 130, 1), (33, 130, 1)),
}
SETTINGS = {
    "auto": {"num_ctas": 16},
    "one CTA": {"num_ctas": 1},
    "whole": {"num_ctas": 5, "fixed_split_size": -1},
    "cut": {"num_ctas": 5, "fixed_split_size": 16},
}


class Hidden:
    """A batch whose hidden keys are poisoned, and its results in float64."""

    def __init__(self, band, batch, *, dtype="float32", page_size=4):
        self.bound, sees = BANDS[band]
        self.batch = make_paged_batch(
            *map(list, BATCHES[batch]), **HEADS, page_size=page_size, dtype=dtype, spare_pages=1
        )
        b = self.batch
        poisoned = next(p for p in range(len(b.kv_cache)) if np.isnan(b.kv_cache[p].astype(np.float32)).all())
        self.k, self.v = ([x.copy() for x in parts] for parts in (b.keys, b.values))
        self.o, self.lse = np.zeros(b.q.shape), np.full(b.q.shape[:2], -np.inf)
        self.num_hidden = 0
        for r, m in enumerate(b.kv_len.tolist()):
            rows = slice(b.qo_indptr[r], b.qo_indptr[r + 1])
            n = rows.stop - rows.start
            seen = sees(np.arange(m - n, m)[:, None], np.arange(m)[None])
            hidden = ~seen.any(axis=0)
            self.num_hidden += int(hidden.sum())
            for x in (self.k[r], self.v[r]):
                x[hidden] = np.nan
            table = b.kv_page_indices[b.kv_page_indptr[r] :]
            for page in range(-(-m // page_size)):
                mine = hidden[page * page_size : (page + 1) * page_size]
                b.kv_cache[table[page], :, :, : len(mine)][:, :, mine] = np.nan
                if mine.all():
                    table[page] = poisoned
            self._attend(r, rows, seen)

    def _attend(self, r, rows, seen):
        b = self.batch
        for h in range(b.q.shape[1]):
            k, v = (x[r][:, h // 3].astype(np.float64) for x in (b.keys, b.values))
            s = np.where(seen, b.q[rows, h].astype(np.float64) @ k.T * b.sm_scale, -np.inf)
            lse = np.logaddexp.reduce(s, axis=1)
            self.o[rows, h], self.lse[rows, h] = np.exp(s - lse[:, None]) @ v, lse

    def plan(self, settings):
        return tvm_infer.plan(
            self.batch.qo_indptr, self.batch.kv_len, variant=self.bound, **HEADS, **SETTINGS[settings]
        )

    def check(self, got, tolerance=2e-6):
        o, lse = got
        assert relative_error(o, self.o) <= tolerance
        np.testing.assert_allclose(lse, self.lse, atol=2e-2 if tolerance > 1e-3 else 1e-5)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("band", BANDS)
def test_attention_reads_no_hidden_key(band, batch, settings):
    """Pages and ragged keys."""
    case = Hidden(band, batch)
    assert case.num_hidden > 0 or batch == "prefill"
    plan, b = case.plan(settings), case.batch
    case.check(tvm_infer.attention(b.q, b.kv_cache, plan, **b.tables, variant=case.bound, return_lse=True))
    indptr = np.concatenate([[0], np.cumsum(b.kv_len)]).astype(np.int32)
    k, v = np.concatenate(case.k), np.concatenate(case.v)
    case.check(tvm_infer.ragged_attention(b.q, k, v, plan, kv_indptr=indptr, variant=case.bound, return_lse=True))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("band", BANDS)
def test_append_attention_reads_no_hidden_key(band, batch):
    """New keys are stored first, those that are hidden too; the table is the true one, so that they have a place."""
    case = Hidden(band, batch, page_size=7)
    true = make_paged_batch(*map(list, BATCHES[batch]), **HEADS, page_size=7, spare_pages=1)
    b = case.batch
    out = tvm_infer.append_attention(
        b.q, b.k_new, b.v_new, b.kv_cache, case.plan("auto"), **true.tables, variant=case.bound, return_lse=True
    )
    case.check(out)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("band", ["sinks, long window", "chunks"])
def test_half_precision(band, dtype):
    case = Hidden(band, "append", dtype=dtype, page_size=16)
    b = case.batch
    got = tvm_infer.attention(b.q, b.kv_cache, case.plan("auto"), **b.tables, variant=case.bound, return_lse=True)
    case.check(got, 8e-3)


def test_the_poison_shows_where_it_is_read():
    """The same keys by a plan that reads them all: what the tests above are worth."""
    for band in ("sinks", "chunks", "both sides"):
        case = Hidden(band, "decode")
        b = case.batch
        plan = tvm_infer.plan(b.qo_indptr, b.kv_len, **HEADS)
        assert np.isnan(tvm_infer.attention(b.q, b.kv_cache, plan, **b.tables)).any()


def test_windows_on_both_sides_need_no_variant():
    """Executors test them; the plan alone says them."""
    case = Hidden("both sides", "append")
    b = case.batch
    plan = tvm_infer.plan(b.qo_indptr, b.kv_len, **HEADS, num_ctas=5, window_left=13, window_right=3)
    assert plan.band == case.bound.band and case.bound.variant.is_plain
    case.check(tvm_infer.attention(b.q, b.kv_cache, plan, **b.tables, return_lse=True))


@pytest.mark.parametrize("band", ["sinks", "chunks"])
def test_a_plan_with_sinks_or_chunks_needs_its_variant(band):
    case = Hidden(band, "decode")
    b, plan = case.batch, case.plan("auto")
    with pytest.raises(
        errors.PlanMismatchError, match=r"`plan` was made with causal=True, .* has no variant: sinks and chunks"
    ):
        tvm_infer.attention(b.q, b.kv_cache, plan, **b.tables)
    with pytest.raises(
        errors.PlanMismatchError, match=r"sinks and chunks of \d+, which only the mask of a variant tests"
    ):
        tvm_infer.attention(b.q, b.kv_cache, plan.buffer, **b.tables)
    with pytest.raises(
        errors.PlanMismatchError, match=r"(num_sink=4|chunk=17).* has causal=True, window_left=9, num_sink=3; plan"
    ):
        tvm_infer.attention(b.q, b.kv_cache, plan, **b.tables, variant=variant.sink_window.bind(sink=3, window=9))


def test_what_is_given_beside_a_variant():
    bound = variant.sink_window.bind(sink=3, window=9)
    plan = tvm_infer.plan([0, 1], [50], **HEADS, variant=bound, num_sink=3, window_left=9, window_right=0, chunk=0)
    assert plan.band == bound.band == variant.Band(9, 0, 3)
    for name in ("num_sink", "chunk", "window_right"):
        with pytest.raises(errors.ArgumentError, match=f"`{name}` is 7, and `variant` was made with {name}=[03]"):
            tvm_infer.plan([0, 1], [50], **HEADS, variant=bound, **{name: 7})
