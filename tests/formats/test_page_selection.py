"""Page selection on the CPU executor: bounds exactly, scores and attention against float64, lists against numpy."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tvm_infer
from tvm_infer.errors import ArgumentError, DTypeError, PlanMismatchError
from tvm_infer.testing import attention_reference, relative_error
from tvm_infer.testing.plan_checks import check_plan

BF16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
TOLERANCE = {np.dtype(np.float32): 2e-6, BF16: 4e-3, np.dtype(np.float16): 6e-4}


class Requests:
    """Requests in pages of their own order. Slots behind kv_len, pages that nobody has, and all bounds are NaN."""

    def __init__(self, rng, kv_lens, *, page=4, heads=2, group=3, dim=16, dtype=np.float32, spare=2):
        self.page, self.heads, self.dim, self.dtype = page, heads, dim, np.dtype(dtype)
        self.kv_len = np.array(kv_lens, np.int32)
        counts = -(-self.kv_len // page)
        order = rng.permutation(int(counts.sum()) + spare).astype(np.int32)
        self.pages = np.split(order, np.cumsum(counts))[:-1]
        self.cache = np.full((len(order), 2, heads, page, dim), np.nan, self.dtype)
        self.keys = [rng.standard_normal((2, n, heads, dim)).astype(self.dtype) for n in kv_lens]
        for pages, keys in zip(self.pages, self.keys, strict=True):
            for j in range(keys.shape[1]):
                self.cache[pages[j // page], :, :, j % page] = keys[:, j]
        self.bounds = np.full((len(order), 2, heads, dim), np.nan, self.dtype)
        self.q = rng.standard_normal((len(kv_lens), heads * group, dim)).astype(self.dtype)
        table = [part for pages in self.pages for part in (pages, np.array([-1_234_567_890]))]  # entries behind a list
        self.tables = {
            "kv_page_indptr": np.cumsum([0, *(counts + 1)]).astype(np.int32),
            "kv_page_indices": np.concatenate([np.zeros(0, int), *table]).astype(np.int32),
        }

    def update(self, **kwargs):
        indptr = np.cumsum([0, *self.kv_len]).astype(np.int32)
        tvm_infer.update_page_bounds(
            self.bounds, self.cache, qo_indptr=indptr, kv_len=self.kv_len, **self.tables, **kwargs
        )

    def expected_bounds(self):
        bounds = np.full(self.bounds.shape, np.nan, np.float64)
        for pages, keys in zip(self.pages, self.keys, strict=True):
            for i, page in enumerate(pages):
                k = keys[0, i * self.page : (i + 1) * self.page].astype(np.float64)
                bounds[page] = k.min(0), k.max(0)
        return bounds

    def expected_scores(self, reduce):
        """float64, of each request [heads, pages]."""
        bounds, found = self.expected_bounds(), []
        for q, pages in zip(self.q.astype(np.float64), self.pages, strict=True):
            q = q.reshape(self.heads, -1, 1, self.dim)
            least, greatest = (bounds[pages, side].transpose(1, 0, 2)[:, None] for side in (0, 1))
            of = np.maximum(q * least, q * greatest).sum(3)
            found.append(of.max(1) if reduce == "max" else of.sum(1))
        return found

    def selection(self, num_pages, **kwargs):
        settings = dict(num_requests=len(self.kv_len), max_pages=max([1, *map(len, self.pages)]), page_size=self.page)
        settings |= dict(num_qo_heads=self.q.shape[1], num_kv_heads=self.heads, head_dim=self.dim)
        return tvm_infer.PageSelection(num_pages=num_pages, **(settings | {"dtype": self.dtype.name} | kwargs))

    def select(self, selection):
        return selection.select(self.q, self.bounds, kv_len=self.kv_len, **self.tables)


def chosen_by(scores, num_pages, sink, recent):
    """Numbers of the pages that a list takes, by numpy."""
    n = len(scores)
    if n <= num_pages:
        return list(range(n))
    between = np.arange(sink, n - recent)
    of = np.where(np.isnan(scores), np.inf, scores)[between] + 0.0
    best = between[np.lexsort((between, -of))][: num_pages - sink - recent]
    return sorted([*range(sink), *best.tolist(), *range(n - recent, n)])


def lists_of(requests, pages, num_pages):
    """Pages of each request and head, as they were selected."""
    table = np.asarray(pages.kv_page_indices).reshape(len(requests.kv_len), requests.heads, num_pages)
    taken = [min(len(own), num_pages) for own in requests.pages]
    return [[table[r, h, :n].tolist() for h in range(requests.heads)] for r, n in enumerate(taken)]


def attend(requests, selection, pages):
    """(o, lse) over the selected pages, into poison; whatever was not selected is NaN."""
    hidden = np.full_like(requests.cache, np.nan)
    for of_heads in lists_of(requests, pages, selection.num_pages):
        for h, own in enumerate(of_heads):
            hidden[own, :, h] = requests.cache[own, :, h]
    out = np.full_like(requests.q, np.nan)
    lse = np.full(requests.q.shape[:2], np.nan, np.float32)
    selection.workspace[...] = np.nan
    tvm_infer.attention(requests.q, hidden, pages.plan, **pages.tables, out=out, lse=lse, workspace=selection.workspace)
    return out, lse


def reference(requests, chosen):
    """float64 (o, lse) over exactly these pages of each request and head."""
    o, lse = np.zeros(requests.q.shape), np.full(requests.q.shape[:2], -np.inf)
    group = requests.q.shape[1] // requests.heads
    for r, of_heads in enumerate(chosen):
        for h, numbers in enumerate(of_heads):
            at = [j for i in numbers for j in range(i * requests.page, (i + 1) * requests.page)]
            at = [j for j in at if j < requests.kv_len[r]]
            heads = slice(h * group, (h + 1) * group)
            k, v = (x[at][:, h : h + 1] for x in requests.keys[r])
            o[r : r + 1, heads], lse[r : r + 1, heads] = attention_reference(
                requests.q[r : r + 1, heads], k, v, sm_scale=requests.dim**-0.5
            )
    return o, lse


def check_attention(requests, selection, pages, chosen):
    out, lse = attend(requests, selection, pages)
    expected, expected_lse = reference(requests, chosen)
    assert relative_error(out.astype(np.float64), expected) < TOLERANCE[requests.dtype]
    seen = np.isfinite(expected_lse)
    assert np.isneginf(lse[~seen]).all() and not out[~seen].astype(np.float32).any()
    assert np.abs(lse[seen] - expected_lse[seen]).max(initial=0) < 2e-3


def check_cut_short(planned, plan):
    """`planned` is a plan, and `plan` the same but that works end with their lists."""
    check_plan(planned)
    expected = planned.works.copy()
    lengths = plan.kv_len[expected["kv_list"]]
    expected["kv_end"] = np.clip(lengths, expected["kv_begin"], expected["kv_end"])
    expected["qo_pos_base"] = lengths - 1
    assert (plan.works == expected).all()
    rest = [x.buffer.copy() for x in (planned, plan)]
    for words in rest:  # what steps change, of both
        copy = tvm_infer.Plan(words)
        copy.works["kv_end"] = copy.works["qo_pos_base"] = copy.kv_len[...] = 0
        first = slice(copy.header.nbytes // 4, copy.header.nbytes // 4 + 12 * copy.num_ctas)
        works = words[first].view(copy.works.dtype)
        works["kv_end"] = works["qo_pos_base"] = 0
    np.testing.assert_array_equal(*rest)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, E4M3])
@pytest.mark.parametrize("dim", [8, 80, 128, 256])
def test_bounds_are_exact(dim, dtype):
    requests = Requests(np.random.default_rng(dim), [13, 0, 1, 16, 40], page=5, heads=3, dim=dim, dtype=dtype)
    requests.bounds = np.full(requests.bounds.shape, np.nan, BF16 if dtype == E4M3 else dtype)
    requests.update()
    np.testing.assert_array_equal(requests.bounds.astype(np.float64), requests.expected_bounds())


def test_bounds_follow_appends():
    """New tokens, page by page: append keeps bounds, as do the calls that append and attend, or rotate; slots in NHD and in halves."""
    rng = np.random.default_rng(1)
    whole = Requests(rng, [11, 30, 7], page=4, heads=2, group=2)
    requests = Requests(rng, [0, 0, 0], page=4, heads=2, group=2, spare=len(whole.cache))
    requests.tables, requests.pages = whole.tables, whole.pages
    cache, halves = (
        np.moveaxis(requests.cache.copy(), 3, 2).copy(),
        [np.full_like(whole.cache[:, 0], np.nan) for _ in "kv"],
    )
    bounds, by_plan, rotated = (np.full_like(whole.bounds, np.nan) for _ in range(3))
    done = np.zeros(3, np.int32)
    for step in ([3, 4, 0], [1, 9, 0], [0, 1, 7], [7, 16, 0]):
        before, done = done, done + np.array(step, np.int32)
        indptr = np.cumsum([0, *step]).astype(np.int32)
        k, v = (
            np.concatenate([x[side, a:b] for x, a, b in zip(whole.keys, before, done, strict=True)]) for side in (0, 1)
        )
        where = dict(qo_indptr=indptr, kv_len=done, **whole.tables)
        tvm_infer.append(k, v, cache, kv_layout="NHD", page_bounds=bounds, **where)
        q = np.zeros((len(k), 4, 16), np.float32)
        plan = tvm_infer.plan(indptr, done, num_qo_heads=4, num_kv_heads=2, head_dim=16)
        tvm_infer.append_attention(q, k, v, tuple(halves), plan, page_bounds=by_plan, **whole.tables)
        rope, room = tvm_infer.RopeConfig(16), np.full_like(whole.cache, np.nan)
        for lengths in (dict(plan=plan), where):
            tvm_infer.rope_append(
                q, k, v, room, rope=rope, page_bounds=rotated, **(whole.tables | lengths)
            )  # rotated keys of this step alone
    assert done.tolist() == whole.kv_len.tolist()
    for found in (bounds, by_plan):
        np.testing.assert_array_equal(found, whole.expected_bounds())
    again = np.full_like(bounds, np.nan)
    tvm_infer.update_page_bounds(
        again, cache, plan=tvm_infer.plan(
            np.cumsum([0, *done]).astype(np.int32), done, num_qo_heads=4, num_kv_heads=2, head_dim=16
        ), kv_layout="NHD", **whole.tables,
    )  # fmt: skip
    np.testing.assert_array_equal(again, bounds)


def test_bounds_of_rotated_keys():
    """Bounds are those of the keys as they are stored."""
    requests = Requests(np.random.default_rng(3), [9, 6], page=4)
    k, v = (np.concatenate([x[side] for x in requests.keys]) for side in (0, 1))
    q = np.zeros((15, 6, 16), np.float32)
    where = dict(qo_indptr=[0, 9, 15], kv_len=[9, 6], **requests.tables)
    tvm_infer.rope_append(q, k, v, requests.cache, rope=tvm_infer.RopeConfig(16), page_bounds=requests.bounds, **where)
    for r, keys in enumerate(requests.keys):
        for j in range(keys.shape[1]):
            keys[:, j] = requests.cache[requests.pages[r][j // 4], :, :, j % 4]
    np.testing.assert_array_equal(requests.bounds, requests.expected_bounds())


@pytest.mark.parametrize("reduce", ["max", "sum"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize(("dim", "group"), [(8, 1), (80, 3), (128, 8), (256, 5)])
def test_scores(dim, group, dtype, reduce):
    requests = Requests(np.random.default_rng(dim), [70, 0, 5, 33], heads=3, group=group, dim=dim, dtype=dtype)
    requests.update()
    room = np.full((4, 3, 20), 7.0, np.float32)
    where = dict(kv_len=requests.kv_len, page_size=4, group_reduce=reduce, **requests.tables)
    tvm_infer.page_scores(requests.q, requests.bounds, out=room, **where)
    made = tvm_infer.page_scores(requests.q, requests.bounds, **where)
    assert made.shape == (4, 3, 18)
    for r, expected in enumerate(requests.expected_scores(reduce)):
        n = expected.shape[1]
        np.testing.assert_allclose(room[r, :, :n], expected, rtol=2e-5, atol=2e-5 * dim**0.5)
        np.testing.assert_array_equal(room[r, :, :n], made[r, :, :n])
        assert (room[r, :, n:] == 7).all()


def test_scores_bound_every_logit():
    requests = Requests(np.random.default_rng(2), [63], dtype=np.float32)
    requests.update()
    scores = tvm_infer.page_scores(requests.q, requests.bounds, kv_len=requests.kv_len, page_size=4, **requests.tables)
    logits = np.einsum("hgd,jhd->hgj", requests.q[0].reshape(2, 3, 16), requests.keys[0][0]).max(1)
    for j in range(63):
        assert (logits[:, j] <= scores[0, :, j // 4] + 1e-5).all()


@pytest.mark.parametrize("channel", [0.0, 1.0, -1.0])
def test_a_key_that_is_no_number_is_selected(channel):
    """NaN and infinite keys make scores of NaN or +inf, above all others; they are read, and seen, as without a selection."""
    requests = Requests(np.random.default_rng(4), [80], heads=1)
    for j, value in ((21, np.nan), (50, np.inf)):
        requests.cache[requests.pages[0][j // 4], 0, 0, j % 4, 3] = value
    requests.update()
    requests.q[0, :, 3] = channel
    where = dict(kv_len=requests.kv_len, page_size=4, **requests.tables)
    scores = tvm_infer.page_scores(requests.q, requests.bounds, **where)[0, 0]
    assert np.isnan(scores[5]) and (np.isposinf(scores[12]) if channel > 0 else np.isnan(scores[12]))
    assert np.isfinite(np.delete(scores, [5, 12])).all()
    pages = requests.select(requests.selection(5, num_sink_pages=1, num_recent_pages=2))
    numbers = [requests.pages[0].tolist().index(p) for p in lists_of(requests, pages, 5)[0][0]]
    assert numbers == [0, 5, 12, 18, 19]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_selection(data):
    """Lists as numpy makes them of the same scores; attention over them as float64's over exactly these keys."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    page, heads = data.draw(st.sampled_from([1, 4, 16])), data.draw(st.sampled_from([1, 3]))
    kv_lens = data.draw(st.lists(st.integers(0, 40 * page), min_size=1, max_size=4))
    sink, recent, best = (data.draw(st.integers(least, 6)) for least in (0, 1, 0))
    num_pages = sink + recent + best
    requests = Requests(rng, kv_lens, page=page, heads=heads, group=data.draw(st.sampled_from([1, 2, 7])))
    if data.draw(st.booleans()):  # ties
        requests.q[...] = 0
        requests.q[:, :, 0] = rng.integers(-1, 2, requests.q.shape[:2])
        for keys, pages in zip(requests.keys, requests.pages, strict=True):
            keys[0] = np.round(keys[0])
            for j in range(keys.shape[1]):
                requests.cache[pages[j // page], 0, :, j % page] = keys[0, j]
    requests.update()
    reduce = data.draw(st.sampled_from(["max", "sum"]))
    selection = requests.selection(
        num_pages, num_sink_pages=sink, num_recent_pages=recent, group_reduce=reduce,
        num_ctas=data.draw(st.sampled_from([1, 3, 16])), fixed_split_size=data.draw(st.sampled_from([0, -1, 9])),
    )  # fmt: skip
    where = dict(kv_len=requests.kv_len, page_size=page, group_reduce=reduce, **requests.tables)
    scores = tvm_infer.page_scores(requests.q, requests.bounds, **where)
    for _ in range(2):  # nothing is left of the first time
        pages = requests.select(selection)
        check_cut_short(tvm_infer.Plan(selection._planned), pages.plan)
        chosen = [
            [chosen_by(scores[r, h, : len(own)], num_pages, sink, recent) for h in range(heads)]
            for r, own in enumerate(requests.pages)
        ]
        expected = [[own[numbers].tolist() for numbers in of] for own, of in zip(requests.pages, chosen, strict=True)]
        assert lists_of(requests, pages, num_pages) == expected
        check_attention(requests, selection, pages, chosen)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_room_for_all_is_dense_attention(dtype):
    requests = Requests(np.random.default_rng(5), [100, 1, 0, 37, 64], dim=64, dtype=dtype)
    requests.update()
    selection = requests.selection(25)
    pages = requests.select(selection)
    check_attention(requests, selection, pages, [[list(range(len(own)))] * 2 for own in requests.pages])
    plan = tvm_infer.plan(
        np.arange(6, dtype=np.int32), requests.kv_len, num_qo_heads=6, num_kv_heads=2, head_dim=64, causal=False,
        dtype=requests.dtype.name,
    )  # fmt: skip
    dense = tvm_infer.attention(requests.q, requests.cache, plan, **requests.tables).astype(np.float64)
    assert relative_error(attend(requests, selection, pages)[0].astype(np.float64), dense) < TOLERANCE[requests.dtype]


def test_one_selection_serves_all_steps():
    """Requests grow past the budget and come to an end; plan and lists of each step are those of a selection made for it alone."""
    rng = np.random.default_rng(6)
    selection = None
    for kv_lens in ([3, 0, 90], [20, 21, 91], [24, 80, 96], [25, 81, 0], [100, 7, 5]):
        requests = Requests(rng, kv_lens)
        requests.update()
        if selection is None:
            selection = requests.selection(6, num_sink_pages=1, num_recent_pages=2, num_ctas=5)
            selection._scores = np.full((3, 2, 25), np.nan, np.float32)  # as with max_pages=25
        pages = requests.select(selection)
        alone = requests.select(requests.selection(6, num_sink_pages=1, num_recent_pages=2, num_ctas=5))
        np.testing.assert_array_equal(pages.plan.buffer, alone.plan.buffer)
        assert lists_of(requests, pages, 6) == lists_of(requests, alone, 6)
        expected = [n if n <= 24 else n - (-(-n // 4) - 6) * 4 for n in kv_lens]
        assert pages.plan.kv_len.reshape(3, 2).tolist() == [[n, n] for n in expected]


def test_eight_bit_keys():
    """Bounds of elements, without their scale: which pages are best does not depend on it."""
    requests = Requests(np.random.default_rng(7), [60, 33], dim=16, dtype=BF16)
    small = requests.cache.astype(E4M3)
    for pages, keys in zip(requests.pages, requests.keys, strict=True):
        for j in range(keys.shape[1]):
            keys[:, j] = small[pages[j // 4], :, :, j % 4].astype(BF16)
    requests.cache = small
    requests.update()
    selection = requests.selection(5, num_sink_pages=1, num_recent_pages=1, kv_dtype="float8_e4m3fn")
    pages = requests.select(selection)
    scores = requests.expected_scores("max")
    chosen = [[chosen_by(scores[r][h], 5, 1, 1) for h in range(2)] for r in range(2)]
    assert lists_of(requests, pages, 5) == [
        [own[numbers].tolist() for numbers in of] for own, of in zip(requests.pages, chosen, strict=True)
    ]
    check_attention(requests, selection, pages, chosen)


def test_values_narrower_than_keys():
    """The same lists, and the first columns of what whole values give."""
    requests = Requests(np.random.default_rng(13), [60, 33, 7])
    requests.update()
    whole = requests.selection(5, num_recent_pages=2)
    expected, expected_lse = attend(requests, whole, requests.select(whole))
    cache = requests.cache[:, 0].copy(), requests.cache[:, 1, ..., :8].copy()
    selection, bounds = requests.selection(5, num_recent_pages=2, head_dim_vo=8), np.full_like(requests.bounds, np.nan)
    tvm_infer.update_page_bounds(
        bounds, cache, qo_indptr=np.cumsum([0, *requests.kv_len]).astype(np.int32), kv_len=requests.kv_len,
        **requests.tables,
    )  # fmt: skip
    np.testing.assert_array_equal(bounds, requests.bounds)
    pages = selection.select(requests.q, bounds, kv_len=requests.kv_len, **requests.tables)
    out, lse = tvm_infer.attention(
        requests.q, cache, pages.plan, workspace=selection.workspace, return_lse=True, **pages.tables
    )
    assert out.shape == (3, 6, 8) and relative_error(out, expected[..., :8]) < 2e-6
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5)


def test_no_requests():
    requests = Requests(np.random.default_rng(8), [])
    requests.update()
    selection = requests.selection(4)
    pages = requests.select(selection)
    assert attend(requests, selection, pages)[0].shape == (0, 6, 16)


def refused(kind, words):
    return pytest.raises(kind, match=re.escape(words))


def test_settings_are_checked():
    make = Requests(np.random.default_rng(9), [40]).selection
    for change, words in (
        ({"num_pages": 0}, "`num_pages` is 0; it must be at least 1"),
        ({"num_recent_pages": 0}, "`num_recent_pages` is 0; it must be at least 1"),
        ({"num_sink_pages": -1}, "`num_sink_pages` is -1; it must be at least 0"),
        ({"num_sink_pages": 4}, "`num_sink_pages` and `num_recent_pages` are 4 and 1, more than a list's num_pages, 4"),
        ({"num_sink_pages": 1.5}, "`num_sink_pages` is 1.5; it must be an integer"),
        ({"num_pages": 2**30}, "positions are of 32 bits: at most 536870911"),
        ({"group_reduce": "mean"}, '`group_reduce` is \'mean\'; it must be "max" or "sum"'),
        ({"group_reduce": ["max"]}, "`group_reduce` is ['max']; it must be"),
        ({"num_kv_heads": -1}, "`num_kv_heads` is -1; it must be at least 1"),
        ({"num_kv_heads": "2"}, "`num_kv_heads` is '2'; it must be an integer"),
        ({"num_qo_heads": None}, "`num_qo_heads` is None; it must be an integer"),
        ({"head_dim": 0}, "`head_dim` is 0; it must be at least 1"),
        ({"head_dim": "16", "tile_table": (0, 16, 4, 1, 0)}, "`head_dim` is '16'; it must be an integer"),
        ({"head_dim_vo": "8"}, "`head_dim_vo` is '8'; it must be an integer"),
        ({"num_requests": 2**40}, "`num_requests` is 1099511627776; it must fit in 32 bits"),
        ({"num_requests": 2**30}, "`num_pages` is 4 for 2147483648 lists; a page table has at most 2147483647 entries"),
        ({"max_pages": np.int32(2**20), "page_size": np.int32(4096)}, "positions are of 32 bits: at most 524287"),
        ({"num_sink_pages": np.int8(100), "num_recent_pages": np.int8(100)}, "are 100 and 100, more than a list's num_pages"),
    ):  # fmt: skip
        with refused(ArgumentError, words):
            make(**({"num_pages": 4} | change))
    for dtype in ("foo", "float8_e4m3fn", ["float32"]):
        with refused(DTypeError, f"`dtype` is {dtype!r}; it must be one of float32, float16, bfloat16"):
            make(4, dtype=dtype)


def test_tensors_are_checked():
    requests = Requests(np.random.default_rng(10), [40, 9])
    requests.update()
    selection = requests.selection(4)
    where = dict(kv_len=requests.kv_len, **requests.tables)
    for kind, change, words in (
        (ArgumentError, {"q": requests.q[:1]}, "`q` has shape [1, 6, 16]; the selection was made for [2, 6, 16] (num_requests,"),
        (ArgumentError, {"q": requests.q[:, :4]}, "`q` has shape [2, 4, 16]; the selection was made for [2, 6, 16]"),
        (ArgumentError, {"q": requests.q[0]}, "`q` has shape [6, 16]; the selection"),
        (ArgumentError, {"q": requests.q.tolist()}, "`q` is a list; it must be"),
        (ArgumentError, {"q": requests.q[..., :8], "page_bounds": requests.bounds[..., :8]}, "`q` has shape [2, 6, 8]; the"),
        (DTypeError, {"q": requests.q.astype(BF16), "page_bounds": requests.bounds.astype(BF16)},
         "`q` has dtype bfloat16; the selection was made for float32: pass that, or make a PageSelection with dtype='bfloat16'"),
        (ArgumentError, {"page_bounds": requests.bounds[:, :, :1]}, "the selection was made for [num_pages, 2, 2, 16] (num_pages, 2,"),
        (ArgumentError, {"page_bounds": requests.bounds[:, :1]}, "`page_bounds` has shape [15, 1, 2, 16]; the selection"),
        (ArgumentError, {"page_bounds": requests.bounds[..., :8]}, "`page_bounds` has shape [15, 2, 2, 8]; the selection"),
        (ArgumentError, {"page_bounds": requests.bounds[0]}, "`page_bounds` has shape [2, 2, 16]; the selection"),
        (ArgumentError, {"page_bounds": [1]}, "`page_bounds` is a list; it must be"),
        (DTypeError, {"page_bounds": requests.bounds.astype(np.float16)}, "`page_bounds` has dtype float16"),
        (ArgumentError, {"kv_len": requests.kv_len[:1]}, "`kv_page_indptr` has shape [3]"),
        (ArgumentError, {"kv_len": [40, -1]}, "`kv_len` is -1 for request 1; it must not be negative"),
        (PlanMismatchError, {"kv_len": [45, 9]}, "request 0 has kv_len 45 but argument `kv_page_indptr` gives it 11 pages"),
        (ArgumentError, {"kv_len": [44, 9]}, "`scores` has room for 10 pages of a request; request 0 has kv_len 44, 11 pages"),
    ):  # fmt: skip
        arguments = {"q": requests.q, "page_bounds": requests.bounds, **where} | change
        with refused(kind, words):
            selection.select(**arguments)


def test_scores_are_checked():
    requests = Requests(np.random.default_rng(14), [40, 9])
    requests.update()
    good = dict(q=requests.q, page_bounds=requests.bounds, kv_len=requests.kv_len, page_size=4, **requests.tables)
    for kind, change, words in (
        (ArgumentError, {"q": [[1]]}, "`q` is a list; it must be a torch tensor"),
        (ArgumentError, {"q": requests.q[:, :5]}, "query heads must be a multiple of KV heads"),
        (ArgumentError, {"page_bounds": [1]}, "`page_bounds` is a list; it must be a torch tensor"),
        (ArgumentError, {"page_bounds": requests.bounds[0, 0]}, "`page_bounds` has shape [2, 16]; it must be [num_pages, 2, num"),
        (ArgumentError, {"page_bounds": requests.bounds[0, 0], "out": np.zeros((2, 2, 10), np.float32)}, "`page_bounds`"),
        (ArgumentError, {"max_pages": -1}, "`max_pages` is -1; it must be at least 0"),
        (ArgumentError, {"max_pages": 2**40}, "`max_pages` is 1099511627776; it must fit in 32 bits"),
        (ArgumentError, {"max_pages": "3"}, "`max_pages` is '3'; it must be an integer"),
        (ArgumentError, {"page_size": 0}, "`page_size` is 0; it must be at least 1"),
        (ArgumentError, {"group_reduce": ["max"]}, "`group_reduce` is ['max']; it must be"),
        (ArgumentError, {"kv_len": np.array(40, np.int32)}, "`kv_len` has shape []; it must be [num_requests]"),
        (DTypeError, {"kv_len": np.array([np.nan, 9])}, "`kv_len` has dtype float64; it must be int32"),
    ):  # fmt: skip
        with refused(kind, words):
            tvm_infer.page_scores(**(good | change))


def test_room_for_bounds():
    make = tvm_infer.empty_page_bounds
    for dtype in (np.float32, np.float16, BF16):
        cache = np.zeros((3, 2, 4, 16, 8), dtype)
        bounds = make(cache)
        assert bounds.shape == (3, 2, 4, 8) and bounds.dtype == dtype
        halves = make((cache[:, 0], cache[:, 1]), kv_layout="NHD")
        assert halves.shape == (3, 2, 16, 8) and halves.dtype == dtype
    small = cache.astype(E4M3)
    assert make(small, dtype="bfloat16").dtype == BF16
    for eight in (small, small.astype(ml_dtypes.float8_e5m2), (small[:, 0], small[:, 1])):
        with refused(ArgumentError, "bounds are of the queries' type: name that, one of float32, float16, bfloat16"):
            make(eight)
    for kind, arguments, words in (
        (ArgumentError, {"kv_cache": ()}, "`kv_cache` is a tuple of 0; it must be a cache of rank 5, or (k_cache, v_cache)"),
        (ArgumentError, {"kv_cache": [[1], [1]]}, "`kv_cache` is a list; it must be a torch tensor"),
        (ArgumentError, {"kv_cache": cache[0, 0]}, "`kv_cache` has shape [4, 16, 8]; it must be a cache of rank 5"),
        (ArgumentError, {"kv_layout": "HDN"}, "`kv_layout` is 'HDN'"),
        (DTypeError, {"dtype": "foo"}, "`dtype` is 'foo'; it must be one of float32, float16, bfloat16"),
        (DTypeError, {"dtype": "float8_e4m3fn"}, "`dtype` is 'float8_e4m3fn'; it must be one of"),
        (DTypeError, {"dtype": ["float32"]}, "`dtype` is ['float32']; it must be one of"),
        (DTypeError, {"kv_cache": cache.astype(np.int32)}, "`kv_cache` has dtype int32; it must be one of"),
    ):  # fmt: skip
        with refused(kind, words):
            make(**({"kv_cache": cache} | arguments))


def test_plans_are_checked():
    """By the packed function: a plan for other lists, and one that is no copy."""
    from tvm_infer import _ffi

    requests = Requests(np.random.default_rng(11), [40, 9])
    selection = requests.selection(4)
    other = requests.selection(5)
    scores = np.zeros((2, 2, 10), np.float32)
    table = (requests.kv_len, *requests.tables.values())
    lists = np.zeros(16, np.int32)
    run = _ffi.func("select_pages")
    with refused(
        PlanMismatchError,
        "`planned` is not a plan of 2 requests of one query token and 2 KV heads, each with a list of 4",
    ):
        run(scores, *table, 4, 4, 1, 1, other.plan.buffer, other.plan.buffer.copy(), lists)
    one = tvm_infer.plan([0, 1], [40], num_qo_heads=6, num_kv_heads=2, head_dim=16)
    with refused(PlanMismatchError, "`plan` has another structure than `planned`"):
        run(scores, *table, 4, 4, 1, 1, selection._planned, one.buffer, lists)
    with refused(ArgumentError, "`page_lists` has shape [15]"):
        run(scores, *table, 4, 4, 1, 1, selection._planned, selection.plan.buffer, lists[:15])
    with refused(ArgumentError, "`num_sink` and `num_recent` are 1 and 0 of lists of 4 pages"):
        run(scores, *table, 4, 4, 1, 0, selection._planned, selection.plan.buffer, lists)


def test_bounds_are_checked():
    requests = Requests(np.random.default_rng(12), [40, 9])
    where = dict(qo_indptr=[0, 40, 49], kv_len=requests.kv_len, **requests.tables)
    plan = tvm_infer.plan([0, 1, 2], [[40, 4]] * 2, num_qo_heads=6, num_kv_heads=2, head_dim=16)
    update = tvm_infer.update_page_bounds
    with refused(ArgumentError, "`page_bounds` has shape"):
        update(requests.bounds[1:], requests.cache, **where)
    with refused(DTypeError, "`page_bounds`"):
        update(requests.bounds.astype(np.float16), requests.cache, **where)
    with refused(ArgumentError, "pass either `plan`, a tvm_infer.Plan, or `qo_indptr` and `kv_len`"):
        update(requests.bounds, requests.cache, plan=plan, **where)
    with refused(ArgumentError, "`qo_indptr`, `kv_len`, `plan`: none given"):
        update(requests.bounds, requests.cache, **requests.tables)
    with refused(PlanMismatchError, "a list of keys for each KV head"):
        update(requests.bounds, requests.cache, plan=plan, **requests.tables)
    with refused(ArgumentError, "`kv_len` is 9 for request 1, which appends 10 tokens"):
        update(requests.bounds, requests.cache, **(where | {"qo_indptr": [0, 40, 50]}))
    requests.bounds.flags.writeable = False
    with refused(ArgumentError, "`page_bounds` is a read-only numpy array"):
        update(requests.bounds, requests.cache, **where)


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_other_instruction_sets(isa):
    """Bounds and scores of the kernels that this machine would not choose."""
    import os
    import subprocess
    import sys

    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_page_selection as t, numpy as np\n"
        "t.test_bounds_are_exact(80, t.BF16); t.test_bounds_are_exact(8, np.float16); t.test_bounds_are_exact(128, t.E4M3)\n"
        "t.test_scores(80, 3, np.float16, 'max'); t.test_scores(128, 8, np.float32, 'sum')"
    )
    here = os.path.dirname(__file__)
    environment = os.environ | {"TVM_INFER_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code, here], capture_output=True, text=True, env=environment)
    if "which this machine or build does not have" in done.stderr:
        pytest.skip(f"no {isa} here")
    assert done.returncode == 0, done.stderr[-2000:]
