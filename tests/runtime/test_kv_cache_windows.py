"""Sequences give back the pages that leave the windows of all layers: how many they hold, what is refused, results against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tvm_infer import errors, variant
from tvm_infer.rope import RopeConfig
from tvm_infer.runtime import PagedKVCache
from tvm_infer.testing import relative_error

HQ, HKV, DIM = 4, 2, 16


def make(window=64, num_layers=1, **settings):
    defaults = dict(page_size=16, num_pages=20, max_batch=2, max_tokens=128, num_ctas=5)
    cache = PagedKVCache(
        num_layers=num_layers, num_qo_heads=HQ, num_kv_heads=HKV, head_dim=DIM, **{**defaults, **settings}
    )
    if window is not None:
        cache.set_variant(variant.sliding_window.bind(window=window))
    return cache


def poison_free_pages(cache):
    """Nobody may read them."""
    state = np.asarray(cache._call("debug_state"))
    for layer in range(cache.num_layers):
        cache.pages(layer)[state[5 : 5 + state[4]]] = np.nan


def windowed(q, k, v, window):
    """float64 [n, HQ, DIM] of the last n tokens, whose own keys are the last; causal, `window` keys before a token's own."""
    return masked(q, k, v, lambda i, j: j >= i - window)


def masked(q, k, v, sees):
    """The same, of keys j up to a token's own that sees(i, j)."""
    n, m = len(q), len(k)
    k, v = (np.repeat(x.astype(np.float64), HQ // HKV, 1) for x in (k, v))
    i, j = np.arange(m - n, m)[:, None], np.arange(m)[None, :]
    s = np.einsum("nhd,mhd->hnm", q.astype(np.float64), k) / math.sqrt(DIM)
    s = np.where((j > i) | ~sees(i, j), -np.inf, s)
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("hnm,mhd->nhd", p / p.sum(-1, keepdims=True), v)


class Text:
    """A sequence that keeps all its keys, and a cache that does not."""

    def __init__(self, cache, seq, windows):
        self.cache, self.seq, self.windows = cache, seq, windows
        self.rng = np.random.default_rng(seq)
        self.k, self.v = np.zeros((2, cache.num_layers, 0, HKV, DIM), np.float32)

    def step(self, n, *, fused=False):
        q, k, v = (
            self.rng.standard_normal((self.cache.num_layers, n, h, DIM)).astype(np.float32) for h in (HQ, HKV, HKV)
        )
        self.k, self.v = np.concatenate([self.k, k], 1), np.concatenate([self.v, v], 1)
        with self.cache.forward([self.seq], [n]) as step:
            poison_free_pages(self.cache)
            for layer, window in enumerate(self.windows):
                if fused:
                    o = step.attention_fused_qkv(layer, np.concatenate([q[layer], k[layer], v[layer]], 1))
                else:
                    o = step.attention(layer, q[layer], k[layer], v[layer])
                seen = slice(-(n + window), None)
                expected = windowed(q[layer], self.k[layer, seen], self.v[layer, seen], window)
                assert relative_error(o, expected) <= 3e-6, (layer, self.k.shape[1])


def held(cache, seq):
    return sum(page >= 0 for page in cache.page_table(seq))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("page_size", [16, 1, 5])
def test_a_text_much_longer_than_the_pool(page_size, fused):
    """5000 tokens, in chunks and one by one, in 320 tokens' pages; at any time the pages of the window and no more."""
    cache = make(page_size=page_size, num_pages=320 // page_size)
    if fused:
        cache.set_rope(RopeConfig(theta=10000.0, rotary_dim=0))
    text = Text(cache, 7, [64])
    cache.add_sequence(7)
    lengths = [128] * 19 + [1] * 100 + [77, 128, 3] * 5 + [1] * 1428
    assert sum(lengths) == 5000
    length = 0
    for n in lengths:
        first = max(0, length - 64) // page_size
        assert cache.pages_after([7], [n]) == -(-(length + n) // page_size) - first
        if n > 1 or length % 16 == 0 or page_size == 16:
            text.step(n, fused=fused)
        else:  # its results were looked at
            with cache.forward([7], [1]) as step:
                k = np.zeros((1, HKV, DIM), np.float32)
                text.k, text.v = np.concatenate([text.k, k[None]], 1), np.concatenate([text.v, k[None]], 1)
                if fused:
                    step.attention_fused_qkv(0, np.zeros((1, HQ + 2 * HKV, DIM), np.float32))
                else:
                    step.attention(0, np.zeros((1, HQ, DIM), np.float32), k, k)
        length += n
        assert cache.num_used_pages == held(cache, 7) == -(-length // page_size) - first
        assert cache.num_used_pages <= cache.peak_pages(length)
        assert cache.page_table(7)[:first] == (-1,) * first
    assert cache.seq_len(7) == 5000
    cache.remove_sequence(7)
    assert cache.num_used_pages == 0


SINKS_AND_CHUNKS = {
    "sinks": (variant.sink_window.bind(sink=5, window=30), lambda i, j: (j < 5) | (j >= i - 30), 5, lambda p: p - 30),
    "many sinks": (
        variant.sink_window.bind(sink=33, window=9),
        lambda i, j: (j < 33) | (j >= i - 9),
        33,
        lambda p: p - 9,
    ),
    "chunks": (variant.chunked_local.bind(chunk=50), lambda i, j: i // 50 == j // 50, 0, lambda p: p // 50 * 50),
}


@pytest.mark.parametrize("name", SINKS_AND_CHUNKS)
@pytest.mark.parametrize("page_size", [16, 4, 1])
def test_sinks_stay_and_chunks_go(name, page_size):
    """Texts of three times the pool; sinks' pages are never given back, nor is a page that holds a sink and others."""
    bound, sees, num_sink, first = SINKS_AND_CHUNKS[name]
    cache = make(None, page_size=page_size, num_pages=320 // page_size)
    cache.set_variant(bound)
    assert cache.window_left == {"sinks": 30, "many sinks": 9, "chunks": 49}[name]
    cache.add_sequence(0)
    rng, length = np.random.default_rng(1), 0
    keys, values = np.zeros((2, 0, HKV, DIM), np.float32)
    sink_pages = -(-num_sink // page_size)
    for n in [100, 1, 77, *([1] * 40), 128, 3, *([1] * 90), 90, 128, 100, 128, *([1] * 30), 60]:
        q, k, v = (rng.standard_normal((n, h, DIM)).astype(np.float32) for h in (HQ, HKV, HKV))
        keys, values = np.concatenate([keys, k]), np.concatenate([values, v])
        predicted = cache.pages_after([0], [n])
        with cache.forward([0], [n]) as step:
            poison_free_pages(cache)
            assert relative_error(step.attention(0, q, k, v), masked(q, keys, values, sees)) <= 3e-6, length
        gone = range(sink_pages, max(0, first(length)) // page_size)
        length += n
        assert [i for i, page in enumerate(cache.page_table(0)) if page < 0] == list(gone)
        assert cache.num_used_pages == predicted == -(-length // page_size) - len(gone) <= cache.peak_pages(length)
    assert length > 900
    if num_sink:
        with pytest.raises(errors.ArgumentError, match=r"`num_sink` is 300, but sequence 0 gave back positions"):
            cache.set_variant(variant.sink_window.bind(sink=300, window=9))
    else:
        with pytest.raises(
            errors.ArgumentError,
            match=r"`chunk` is 5000, with which the next token of sequence 0 sees positions from 0",
        ):
            cache.set_variant(variant.chunked_local.bind(chunk=5000))


def test_peak_pages_is_reached():
    cache = make()
    assert cache.window_left == 64
    assert [cache.peak_pages(n) for n in (0, 1, 16, 17, 100)] == [0, 1, 1, 2, 7]
    # 64 keys and 128 new tokens lie in 13 pages where both ends are cut, as they are from position 72 on
    assert cache.peak_pages(10**9) == cache.peak_pages(5000) == 13
    assert cache.peak_pages(5000, 1) == 5 + 1 - 1
    cache.add_sequence(0)
    for n in (72, 8 * 16):
        cache.begin_forward([0], [n])
        cache.end_forward()
    assert cache.num_used_pages == 13
    assert make(window=None).peak_pages(5000) == 313
    for arguments, name in [((-1,), "length"), ((5, 0), "max_append")]:
        with pytest.raises(errors.ArgumentError, match=f"`{name}` is"):
            cache.peak_pages(*arguments)


def test_the_widest_window_decides_and_a_layer_without_one_keeps_all():
    cache = make(window=None, num_layers=3)
    text = Text(cache, 0, [10, 40, 25])
    cache.add_sequence(0)
    for layer, window in enumerate(text.windows):
        assert cache.window_left is None
        cache.set_variant(variant.sliding_window.bind(window=window), layers=[layer])
    assert cache.window_left == 40
    for n in [100, 60, 1, 1, 30, 90]:
        text.step(n)
    assert held(cache, 0) == -(-282 // 16) - (192 - 40) // 16
    cache.remove_sequence(0)
    cache.set_variant(variant.soft_cap.bind(cap=4.0), layers=[1])
    assert cache.window_left is None


def test_forks_share_what_both_see_and_the_last_owner_gives_it_back():
    cache = make(window=20, page_size=4, num_pages=64, max_tokens=64)
    for seq in (0, 2):
        cache.add_sequence(seq)
    for n in (64, 36):
        cache.begin_forward([0], [n])
        cache.end_forward()
    cache.fork_sequence(0, 1)
    assert cache.page_table(1) == cache.page_table(0) and held(cache, 0) == 25 - 11
    assert cache.num_used_pages == 14
    cache.begin_forward([0], [1])  # sees positions 80 on: pages 11 to 19 are its child's alone now
    cache.end_forward()
    assert held(cache, 0) == 6 and held(cache, 1) == 14 and cache.num_used_pages == 15
    assert cache.pages_after([1], [1]) == 7  # both copied nothing: position 100 begins a page
    cache.begin_forward([1], [1])
    cache.end_forward()
    assert cache.num_used_pages == 7
    assert cache.page_table(0)[20:25] == cache.page_table(1)[20:25]


def test_a_page_that_only_a_fork_still_sees_is_its_own():
    """The parent leaves the page that the child writes: no copy, whether it is counted before or made."""
    cache = make(window=6, page_size=4, num_pages=64, max_tokens=64)
    cache.add_sequence(0)
    for n in (12, 18):
        cache.begin_forward([0], [n])
        cache.end_forward()
        if n == 12:
            cache.fork_sequence(0, 1, 10)
    shared = cache.page_table(1)
    assert cache.page_table(0)[2] == shared[2] and cache.num_used_pages == 8
    assert cache.pages_after([1], [1]) == 8  # page 0 leaves, page 2 is copied
    assert cache.pages_after([0, 1], [1, 1]) == 4  # positions 24 to 30 of the one, 4 to 10 of the other
    cache.begin_forward([0, 1], [1, 1])
    assert cache.num_used_pages == 4
    cache.cancel_forward()
    assert cache.page_table(1) == (-1, *shared[1:]) and cache.num_used_pages == 4


def test_tokens_that_are_rejected_can_be_popped_after_their_step():
    """A step of proposed tokens gives back what its first token does not see; each of them can be taken away again."""
    cache = make(window=8, page_size=4, num_pages=12, max_tokens=40)
    text = Text(cache, 0, [8])
    cache.add_sequence(0)
    for i in range(60):
        text.step(7)
        cache.pop(0, i % 8)
        kept = 7 - i % 8
        text.k, text.v = text.k[:, : text.k.shape[1] - 7 + kept], text.v[:, : text.v.shape[1] - 7 + kept]


class TestRefused:
    @pytest.fixture
    def cache(self):
        """Sequence 3 has 200 tokens and gave back 0 to 47: the last step's first token was at 120."""
        cache = make()
        cache.add_sequence(3)
        for n in (120, 80):
            cache.begin_forward([3], [n])
            cache.end_forward()
        assert cache.page_table(3)[2:4] == (-1, 3)
        return cache

    @pytest.mark.parametrize(
        ("call", "name"),
        [
            (lambda cache: cache.pop(3, 89), "n` is 89"),
            (lambda cache: cache.truncate(3, 111), "length` is 111"),
            (lambda cache: cache.fork_sequence(3, 4, 111), "position` is 111"),
        ],
    )
    def test_what_would_see_pages_that_are_gone(self, cache, call, name):
        before = list(cache._call("debug_state"))
        with pytest.raises(
            errors.ArgumentError,
            match=f"{name}, which leaves 111 tokens of sequence 3: the next one sees positions from 47 on, but 0 to 47 left the "
            "window and were given back; at least 112 of its 200 tokens must stay, or at most 0",
        ):
            call(cache)
        assert list(cache._call("debug_state")) == before

    def test_what_would_not(self, cache):
        cache.fork_sequence(3, 4, 112)
        cache.pop(3, 88)
        assert held(cache, 3) == held(cache, 4) == 4
        cache.fork_sequence(3, 5, 0)
        cache.truncate(3, 0)
        cache.begin_forward([3, 5], [40, 20])
        cache.end_forward()
        assert held(cache, 3) == 3 and held(cache, 5) == 2

    def test_a_wider_window(self, cache):
        for window, text in [(153, "153"), (None, "-1")]:
            bound = None if window is None else variant.sliding_window.bind(window=window)
            with pytest.raises(
                errors.ArgumentError,
                match=f"`window_left` is {text}, with which the next token of sequence 3 sees positions from .* on, but 0 to 47 left "
                "the window that it had and were given back; it must be from 0 to 152",
            ):
                cache.set_variant(bound)
        assert cache.window_left == 64
        cache.set_variant(variant.sliding_window.bind(window=152))
        cache.set_variant(variant.sliding_window.bind(window=5))
        cache.begin_forward([3], [1])
        assert held(cache, 3) == 13 - 12
        cache.end_forward()

    def test_out_of_pages_counts_what_leaves(self, cache):
        """20 pages; 13 - 3 are held, 5 of them leave."""
        with pytest.raises(
            errors.OutOfPagesError,
            match=r"needs 16 pages .* but 15 of 20 are free, those that leave windows in this step counted",
        ):
            make_room = [8 + 15 * 16 + 1]
            cache = make(max_tokens=300)
            cache.add_sequence(3)
            for n in (120, 80):
                cache.begin_forward([3], [n])
                cache.end_forward()
            cache.begin_forward([3], make_room)

    def test_a_cancelled_step_leaves_the_pages_in_the_pool(self, cache):
        cache.begin_forward([3], [5])
        cache.cancel_forward()
        assert cache.seq_len(3) == 200 and held(cache, 3) == 13 - 8
        cache.begin_forward([3], [5])
        assert held(cache, 3) == 13 - 8
        cache.end_forward()

    def test_gather(self, cache):
        with pytest.raises(
            errors.ArgumentError, match=r"`start` is 47, but sequence 3 gave back positions .* take 48 or more"
        ):
            cache.gather(3, 0, 47)
        with pytest.raises(errors.ArgumentError, match="`start` is 201; sequence 3 has positions 0 to 199"):
            cache.gather(3, 0, 201)
        k, v = cache.gather(3, 0, 50)
        assert k.shape == v.shape == (150, HKV, DIM)
