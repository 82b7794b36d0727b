"""Page selection: bounds exactly, scores and attention against float64, lists against a sort; what nobody may read is NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import tvm_infer
from tvm_infer import errors

pytestmark = pytest.mark.family("page_selection")

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16}
FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
TOLERANCE = {"bfloat16": 4e-3, "float16": 6e-4}
GARBAGE = -1_234_567_890


def put(pool, pages, keys, page):
    """`keys` [2, n, heads, dim] into slots 0 … n - 1 of `pages`, of a cache [num_pages, 2, heads, page, dim]."""
    slots = torch.arange(keys.shape[1], device=pool.device)
    pool.permute(0, 3, 1, 2, 4)[pages[slots // page], slots % page] = keys.transpose(0, 1)


class Requests:
    """Requests that may grow to `room` keys each, of which they have kv_len. All other slots, and all bounds, are NaN."""

    def __init__(self, device, kv_lens, *, room=None, page=16, heads=(32, 8), dim=128, dtype="bfloat16", seed=0):
        generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        self.device, self.page, self.dim, self.dtype = device, page, dim, dtype
        self.num_heads, self.heads = heads
        rooms = [room or n for n in kv_lens]
        counts = [-(-n // page) for n in rooms]
        order = torch.from_numpy(rng.permutation(sum(counts) + 3))
        self.pages = [part.to(device) for part in order[:-3].split(counts)]
        shape = (len(order), 2, self.heads, page, dim)
        self.cache = torch.full(shape, math.nan, dtype=TORCH[dtype], device=device)
        self.all_keys = [
            torch.randn((2, n, self.heads, dim), generator=generator).to(TORCH[dtype]).to(device) for n in rooms
        ]
        self.bounds = torch.full((len(order), 2, self.heads, dim), math.nan, dtype=TORCH[dtype], device=device)
        self.q = torch.randn((len(kv_lens), self.num_heads, dim), generator=generator).to(TORCH[dtype]).to(device)
        garbage = torch.tensor([GARBAGE], device=device)
        table = [part for pages in self.pages for part in (pages, garbage)]
        index = {"dtype": torch.int32, "device": device}
        self.tables = {
            "kv_page_indptr": torch.tensor(np.cumsum([0, *(n + 1 for n in counts)]), **index),
            "kv_page_indices": torch.cat(table).to(torch.int32),
        }
        self.kv_len = torch.tensor(kv_lens, **index)
        for pages, keys in zip(self.pages, self.keys, strict=True):
            put(self.cache, pages, keys, page)

    @property
    def lengths(self):
        return self.kv_len.tolist()

    @property
    def keys(self):
        return [keys[:, :n] for keys, n in zip(self.all_keys, self.lengths, strict=True)]

    def index(self, values):
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def update(self, cache=None, bounds=None):
        indptr = self.index(np.cumsum([0, *self.lengths]))
        tvm_infer.update_page_bounds(
            self.bounds if bounds is None else bounds, self.cache if cache is None else cache, qo_indptr=indptr,
            kv_len=self.kv_len, **self.tables,
        )  # fmt: skip

    def expected_bounds(self, keys=None):
        bounds = torch.full(self.bounds.shape, math.nan, dtype=torch.float64, device=self.device)
        for pages, of in zip(self.pages, keys or self.keys, strict=True):
            for i, k in enumerate(of[0].double().split(self.page) if of.shape[1] else ()):
                bounds[pages[i]] = torch.stack([k.amin(0), k.amax(0)])
        return bounds

    def expected_scores(self, reduce):
        """float64 [heads, pages] of each request, and what rounding may be worth."""
        bounds, found = self.expected_bounds(), []
        for q, pages, n in zip(self.q.double(), self.pages, self.lengths, strict=True):
            q = q.view(self.heads, -1, 1, self.dim)
            sides = [bounds[pages[: -(-n // self.page)], side].transpose(0, 1)[:, None] for side in (0, 1)]
            least, greatest = (q * side for side in sides)
            of = torch.maximum(least, greatest).sum(3)
            size = torch.maximum(least.abs(), greatest.abs()).sum(3)
            found.append((of.amax(1), size.amax(1)) if reduce == "max" else (of.sum(1), size.sum(1)))
        return found

    def selection(self, num_pages, **changes):
        made = {"num_ctas": 20} if self.device == "cpu" else {"device": self.device}
        settings = dict(num_requests=len(self.lengths), max_pages=max(map(len, self.pages)), page_size=self.page)
        settings |= dict(num_qo_heads=self.num_heads, num_kv_heads=self.heads, head_dim=self.dim, dtype=self.dtype)
        return tvm_infer.PageSelection(num_pages=num_pages, **(settings | made | changes))

    def select(self, selection, **changes):
        where = dict(kv_len=self.kv_len, **self.tables) | changes
        return selection.select(self.q, self.bounds, **where)

    def scores(self, reduce="max"):
        room = torch.full((len(self.lengths), self.heads, max(map(len, self.pages)) + 2), 7.0, device=self.device)
        return tvm_infer.page_scores(
            self.q, self.bounds, kv_len=self.kv_len, page_size=self.page, group_reduce=reduce, out=room, **self.tables
        )


def chosen_by(scores, count, num_pages, sink, recent):
    """Numbers of the pages that a list takes, by a sort of these scores."""
    if count <= num_pages:
        return list(range(count))
    between = np.arange(sink, count - recent)
    of = scores[:count].cpu().double().numpy()[between]
    best = between[np.lexsort((between, -of))][: num_pages - sink - recent]
    return sorted([*range(sink), *best.tolist(), *range(count - recent, count)])


def all_chosen(requests, scores, num_pages, sink, recent):
    counts = [-(-n // requests.page) for n in requests.lengths]
    return [
        [chosen_by(scores[r, h], n, num_pages, sink, recent) for h in range(requests.heads)]
        for r, n in enumerate(counts)
    ]


def check_lists(requests, pages, chosen, num_pages):
    table = torch.as_tensor(pages.kv_page_indices).view(len(chosen), requests.heads, num_pages)
    for r, of_heads in enumerate(chosen):
        for h, numbers in enumerate(of_heads):
            assert table[r, h, : len(numbers)].tolist() == requests.pages[r][numbers].tolist(), (r, h)


def check_attention(requests, chosen, out, lse=None):
    """Against float64 over exactly these pages."""
    group = requests.num_heads // requests.heads
    for r, of_heads in enumerate(chosen):
        for h, numbers in enumerate(of_heads):
            heads = slice(h * group, (h + 1) * group)
            at = torch.arange(requests.lengths[r], device=requests.device)
            at = at[torch.isin(at // requests.page, torch.tensor(numbers, device=requests.device))]
            if len(at) == 0:
                assert not out[r, heads].any() and (lse is None or torch.isneginf(lse[r, heads]).all())
                continue
            k, v = (x[at, h].double() for x in requests.keys[r])
            scores = requests.q[r, heads].double() @ k.T / requests.dim**0.5
            expected = torch.softmax(scores, 1) @ v
            assert (out[r, heads].double() - expected).norm() <= TOLERANCE[requests.dtype] * expected.norm()
            if lse is not None:
                assert ((lse[r, heads] - torch.logsumexp(scores, 1)).abs() <= 2e-3).all()


def hide(requests, chosen):
    """The cache with NaN in all that no list has, head by head."""
    hidden = torch.full_like(requests.cache, math.nan)
    for pages, of_heads in zip(requests.pages, chosen, strict=True):
        for h, numbers in enumerate(of_heads):
            hidden[pages[numbers], :, h] = requests.cache[pages[numbers], :, h]
    return hidden


def attend(requests, selection, pages, cache):
    out = torch.full_like(requests.q, math.nan)
    lse = torch.full(requests.q.shape[:2], math.nan, device=requests.device)
    torch.as_tensor(selection.workspace).fill_(math.nan)
    tvm_infer.attention(requests.q, cache, pages.plan, out=out, lse=lse, workspace=selection.workspace, **pages.tables)
    if requests.device != "cpu":
        assert tvm_infer.plan_status(pages.plan) == "accepted"
    return out, lse


SHAPES = [
    ("bfloat16", (32, 8), 128, 16),
    ("float16", (8, 2), 64, 32),
    ("bfloat16", (16, 1), 256, 16),
    ("float16", (12, 4), 80, 16),
    ("bfloat16", (40, 2), 128, 64),
    ("bfloat16", (6, 3), 96, 1),
]
SHAPE = pytest.mark.parametrize(
    ("dtype", "heads", "dim", "page"),
    [pytest.param(*row, marks=[pytest.mark.subset, pytest.mark.sanitize] if row[2] == 80 else []) for row in SHAPES],
)


@SHAPE
def test_bounds(dtype, heads, dim, page, device):
    requests = Requests(device, [700, 1, 0, 33, 129], page=page, heads=heads, dim=dim, dtype=dtype)
    for _ in range(2):
        requests.update()
        torch.testing.assert_close(requests.bounds.double(), requests.expected_bounds(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kv_dtype", [pytest.param("float8_e4m3fn", marks=pytest.mark.subset), "float8_e5m2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bounds_of_eight_bits(dtype, kv_dtype, device):
    requests = Requests(device, [70, 0, 129], heads=(8, 2), dtype=dtype)
    small = [keys.to(FLOAT8[kv_dtype]) for keys in requests.keys]
    cache = torch.full(requests.cache.shape, 0x7F, dtype=torch.uint8, device=device)
    for pages, keys in zip(requests.pages, small, strict=True):
        put(cache, pages, keys.view(torch.uint8), requests.page)
    requests.update(cache.view(FLOAT8[kv_dtype]))
    torch.testing.assert_close(
        requests.bounds.double(), requests.expected_bounds([keys.float() for keys in small]), rtol=0, atol=0,
        equal_nan=True,
    )  # fmt: skip


def test_bounds_of_many_requests(device):
    """More than a warp looks up at once, some without new tokens."""
    rng = np.random.default_rng(1)
    requests = Requests(device, rng.integers(1, 60, 300).tolist(), heads=(2, 1), dim=64)
    new = [int(n) for n in rng.integers(0, 3, 300)]
    indptr = requests.index(np.cumsum([0, *(min(n, m) for n, m in zip(new, requests.lengths, strict=True))]))
    tvm_infer.update_page_bounds(
        requests.bounds, requests.cache, qo_indptr=indptr, kv_len=requests.kv_len, **requests.tables
    )
    expected, own = requests.expected_bounds(), torch.full_like(requests.bounds, math.nan).double()
    for r, (n, length) in enumerate(zip(new, requests.lengths, strict=True)):
        if n > 0:
            touched = requests.pages[r][max(length - n, 0) // 16 :]
            own[touched] = expected[touched]
    torch.testing.assert_close(requests.bounds.double(), own, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("reduce", ["max", "sum"])
@SHAPE
def test_scores(dtype, heads, dim, page, reduce, device):
    requests = Requests(device, [900, 1, 0, 33, 129], page=page, heads=heads, dim=dim, dtype=dtype)
    requests.update()
    scores = requests.scores(reduce)
    for r, (expected, size) in enumerate(requests.expected_scores(reduce)):
        n = expected.shape[1]
        assert ((scores[r, :, :n] - expected).abs() <= 1e-5 * size).all()
        assert (scores[r, :, n:] == 7).all()


@pytest.mark.parametrize(("num_pages", "sink", "recent"), [(8, 1, 2), (20, 0, 1), (5, 2, 3)])
@SHAPE
def test_selection(dtype, heads, dim, page, num_pages, sink, recent, device):
    lengths = [61 * page - page // 2, 1, 0, 8 * page, 8 * page + 1, 20 * page, 35 * page - 1]
    requests = Requests(device, lengths, page=page, heads=heads, dim=dim, dtype=dtype)
    requests.update()
    selection = requests.selection(num_pages, num_sink_pages=sink, num_recent_pages=recent)
    chosen = all_chosen(requests, requests.scores(), num_pages, sink, recent)
    hidden = hide(requests, chosen)
    for _ in range(2):
        pages = requests.select(selection)
        check_lists(requests, pages, chosen, num_pages)
        check_attention(requests, chosen, *attend(requests, selection, pages, hidden))


def test_room_for_all_is_dense_attention(device):
    requests = Requests(device, [1000, 40, 0, 513], heads=(8, 2))
    requests.update()
    selection = requests.selection(63)
    out, _ = attend(requests, selection, requests.select(selection), requests.cache)
    settings = {"num_ctas": 20} if device == "cpu" else {"device": device}
    plan = tvm_infer.plan(
        np.arange(5, dtype=np.int32), requests.lengths, num_qo_heads=8, num_kv_heads=2, head_dim=128, dtype="bfloat16",
        causal=False, **settings,
    )  # fmt: skip
    dense = tvm_infer.attention(requests.q, requests.cache, plan, **requests.tables)
    assert (out.double() - dense.double()).norm() <= TOLERANCE["bfloat16"] * dense.double().norm()


@pytest.mark.sanitize
@pytest.mark.racecheck
def test_ties_and_what_is_no_number(device):
    """Equal scores: the first pages. NaN is above all."""
    requests = Requests(device, [16 * 40], heads=(2, 1), dim=64)
    requests.q.zero_()
    requests.update()
    selection = requests.selection(9, num_sink_pages=2, num_recent_pages=3)
    check_lists(requests, requests.select(selection), [[[0, 1, 2, 3, 4, 5, 37, 38, 39]]], 9)
    for i in (20, 33):
        requests.bounds[requests.pages[0][i], 0, 0, 5] = math.nan
    check_lists(requests, requests.select(selection), [[[0, 1, 2, 3, 20, 33, 37, 38, 39]]], 9)


def test_longer_than_shared_memory_holds(device):
    """9,500 pages, of which a CTA keeps the scores of 8,192."""
    requests = Requests(device, [16 * 9500 - 3, 16 * 200], heads=(2, 2), dim=64)
    requests.update()
    selection = requests.selection(1200, num_sink_pages=4, num_recent_pages=60)
    chosen = all_chosen(requests, requests.scores(), 1200, 4, 60)
    check_lists(requests, requests.select(selection), chosen, 1200)


def test_eight_bit_keys(device):
    """Selection and attention of a cache of 8 bits; scales play no part in which pages are best."""
    requests = Requests(device, [16 * 50 - 7, 90], heads=(8, 2))
    requests.all_keys = [keys.to(torch.float8_e4m3fn).to(torch.bfloat16) for keys in requests.all_keys]
    cache = torch.zeros(requests.cache.shape, dtype=torch.float8_e4m3fn, device=device)
    for pages, keys in zip(requests.pages, requests.keys, strict=True):
        put(requests.cache, pages, keys, 16)
        put(cache.view(torch.uint8), pages, keys.to(torch.float8_e4m3fn).view(torch.uint8), 16)
    requests.update(cache)
    selection = requests.selection(6, num_sink_pages=1, num_recent_pages=1, kv_dtype="float8_e4m3fn")
    chosen = all_chosen(requests, requests.scores(), 6, 1, 1)
    pages = requests.select(selection)
    check_lists(requests, pages, chosen, 6)
    out = tvm_infer.attention(requests.q, cache, pages.plan, workspace=selection.workspace, **pages.tables)
    group = requests.num_heads // requests.heads
    for r, of_heads in enumerate(chosen):
        for h, numbers in enumerate(of_heads):
            at = [j for j in range(requests.lengths[r]) if j // 16 in numbers]
            k, v = (x[at, h].double() for x in requests.keys[r])
            heads = slice(h * group, (h + 1) * group)
            expected = torch.softmax(requests.q[r, heads].double() @ k.T / 128**0.5, 1) @ v
            # weights are of 8 bits on cuda
            assert (out[r, heads].double() - expected).norm() <= 0.05 * expected.norm()


class Decoding:
    """Steps of a request set that grows by a token each: append, bounds, selection, attention."""

    def __init__(self, device, kv_lens, room, num_pages, **settings):
        self.requests = requests = Requests(device, kv_lens, room=room, **settings)
        requests.update()
        self.selection = requests.selection(num_pages, num_sink_pages=1, num_recent_pages=2)
        num = len(kv_lens)
        self.k, self.v = (
            torch.zeros(num, requests.heads, requests.dim, dtype=requests.q.dtype, device=device) for _ in "kv"
        )
        self.indptr, self.out = requests.index(range(num + 1)), torch.full_like(requests.q, math.nan)

    def feed(self, generator):
        """Inputs of the next step, in place."""
        requests = self.requests
        requests.kv_len.add_(1)
        for r, (keys, n) in enumerate(zip(requests.all_keys, requests.lengths, strict=True)):
            self.k[r], self.v[r] = keys[:, n - 1]
        requests.q.copy_(torch.randn(requests.q.shape, generator=generator))
        self.out.fill_(math.nan)

    def step(self):
        requests = self.requests
        tvm_infer.append(
            self.k, self.v, requests.cache, qo_indptr=self.indptr, kv_len=requests.kv_len, page_bounds=requests.bounds,
            **requests.tables,
        )  # fmt: skip
        pages = requests.select(self.selection)
        tvm_infer.attention(
            requests.q, requests.cache, pages.plan, out=self.out, workspace=self.selection.workspace, **pages.tables
        )

    def check(self):
        requests = self.requests
        torch.testing.assert_close(requests.bounds.double(), requests.expected_bounds(), rtol=0, atol=0, equal_nan=True)
        check_attention(requests, all_chosen(requests, requests.scores(), self.selection.num_pages, 1, 2), self.out)


def test_steps(device):
    decoding, generator = Decoding(device, [60, 300, 127], 400, 8, heads=(8, 2)), torch.Generator().manual_seed(1)
    for _ in range(20):
        decoding.feed(generator)
        decoding.step()
        decoding.check()


def test_a_graph_of_a_step_serves_all_steps(cuda):
    """Captured once, replayed as requests grow from less than the budget to more: the host plans nothing."""
    decoding, generator = Decoding(cuda, [100, 1000, 127, 16], 1400, 8), torch.Generator().manual_seed(2)
    decoding.feed(generator)
    decoding.step()  # loads the kernels
    decoding.check()
    torch.cuda.synchronize()
    decoding.feed(generator)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoding.step()
    for i in range(60):
        if i > 0:
            decoding.feed(generator)
        graph.replay()
        if i % 6 == 0:
            decoding.check()
            assert tvm_infer.plan_status(decoding.selection.plan) == "accepted"
    decoding.requests.kv_len[1] = 16 * 90  # its table has 89 entries: an empty list, and a word for it
    graph.replay()
    with pytest.raises(errors.PlanMismatchError, match="a request has more pages than its table"):
        tvm_infer.plan_status(decoding.selection.plan)
    assert not decoding.out[1].any() and decoding.out[0].any()
    decoding.requests.kv_len[1] = 16 * 80  # the next step is right, and nothing is left of that one
    graph.replay()
    assert tvm_infer.plan_status(decoding.selection.plan) == "accepted" and decoding.out[1].any()


def test_more_pages_than_scores_have_room_for(cuda):
    requests = Requests(cuda, [16 * 30, 16 * 5], heads=(8, 2))
    requests.update()
    selection = requests.selection(6, max_pages=29)
    pages = requests.select(selection)
    out = tvm_infer.attention(requests.q, requests.cache, pages.plan, workspace=selection.workspace, **pages.tables)
    with pytest.raises(
        errors.PlanMismatchError, match="a request has more pages than its table, or than a selection's"
    ):
        tvm_infer.plan_status(pages.plan)
    assert not out[0].any() and torch.isfinite(out[1]).all() and out[1].any()


def test_refused_before_any_launch(device):
    requests = Requests(device, [16 * 30, 16 * 5], heads=(8, 2))
    requests.update()
    selection = requests.selection(6)
    for kind, change, words in (
        (errors.ArgumentError, {"q": requests.q[:1]}, "`q` has shape"),
        (errors.DTypeError, {"q": requests.q.half()}, "`q` has dtype float16"),
        (errors.ArgumentError, {"page_bounds": requests.bounds[..., :64]}, "`page_bounds`"),
        (errors.ArgumentError, {"kv_len": requests.kv_len[:1]}, "`kv_page_indptr` has shape"),
    ):
        arguments = dict(q=requests.q, page_bounds=requests.bounds, kv_len=requests.kv_len, **requests.tables) | change
        with pytest.raises(kind, match=words):
            selection.select(**arguments)
    check_lists(
        requests, requests.select(selection), all_chosen(requests, requests.scores(), 6, 1, 1), 6
    )  # a good call after
