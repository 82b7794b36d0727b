"""Attention variants of a cache's layers, each step against float64: windows planned apart, logits, outputs, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tvm_infer import errors, variant
from tvm_infer.rope import RopeConfig
from tvm_infer.runtime import PagedKVCache
from tvm_infer.testing import relative_error

HQ, HKV, DIM = 6, 2, 16
SINK = np.linspace(-1, 3, HQ).astype(np.float32)
SLOPES = np.linspace(0.01, 0.4, HQ).astype(np.float32)


def same(x, *_):
    return x


# layer -> (variant, window, logits(scores, q_pos, kv_pos), output(o, lse)); scores [HQ, n, m], o [HQ, n, DIM]
LAYERS = [
    (None, None, same, same),
    (variant.sliding_window.bind(window=5), 5, same, same),
    (variant.soft_cap.bind(cap=1.5), None, lambda s, i, j: 1.5 * np.tanh(s / 1.5), same),
    (
        (variant.alibi & variant.sliding_window).bind(slopes=SLOPES, window=11),
        11,
        lambda s, i, j: s + SLOPES[:, None, None] * (j - i),
        same,
    ),
    (
        (variant.attention_sink & variant.sliding_window).bind(sink=SINK, window=5),
        5,
        same,
        lambda o, lse: o / (1 + np.exp(SINK[:, None] - lse))[..., None],
    ),
]


def reference(q, k, v, layer, causal=True):
    """float64 [n, HQ, DIM] of one sequence's last n tokens."""
    _, window, logits, output = layer
    n, m = len(q), len(k)
    k, v = (np.repeat(x.astype(np.float64), HQ // HKV, 1) for x in (k, v))
    i, j = np.arange(m - n, m)[:, None], np.arange(m)[None, :]
    s = logits(np.einsum("nhd,mhd->hnm", q.astype(np.float64), k) / math.sqrt(DIM), i, j)
    hidden = (j > i) & causal
    if window is not None:
        hidden = hidden | (j < i - window)
    s = np.where(hidden, -np.inf, s)
    lse = np.log(np.exp(s).sum(-1))
    return output(np.einsum("hnm,mhd->hnd", np.exp(s - lse[..., None]), v), lse).transpose(1, 0, 2)


class Cache:
    def __init__(self, layers=LAYERS, **settings):
        self.layers = layers
        defaults = dict(page_size=4, num_pages=96, max_batch=4, max_tokens=128, num_ctas=5)
        self.cache = PagedKVCache(
            num_layers=len(layers), num_qo_heads=HQ, num_kv_heads=HKV, head_dim=DIM, **{**defaults, **settings}
        )
        for layer in range(len(layers)):
            self.cache.pages(layer)[...] = np.nan
        self.rng = np.random.default_rng(0)
        self.keys: dict[int, list[np.ndarray]] = {}
        self.values: dict[int, list[np.ndarray]] = {}

    def set_variants(self):
        for i, (bound, *_) in enumerate(self.layers):
            if bound is not None:
                self.cache.set_variant(bound, layers=[i])

    def add(self, seq, parent=None):
        if parent is None:
            self.cache.add_sequence(seq)
            none = [np.zeros((0, HKV, DIM), np.float32)] * len(self.layers)
            self.keys[seq], self.values[seq] = list(none), list(none)
        else:
            self.cache.fork_sequence(parent, seq)
            self.keys[seq], self.values[seq] = list(self.keys[parent]), list(self.values[parent])

    def step(self, ids, lengths, *, causal=True, fused=False):
        with self.cache.forward(ids, lengths, causal=causal) as step:
            for layer in range(len(self.layers)):
                qkv = self.rng.standard_normal((sum(lengths), HQ + 2 * HKV, DIM)).astype(np.float32)
                q, k, v = qkv[:, :HQ], qkv[:, HQ : HQ + HKV], qkv[:, HQ + HKV :]
                o = step.attention_fused_qkv(layer, qkv) if fused else step.attention(layer, q, k, v)
                row = 0
                for seq, n in zip(ids, lengths, strict=True):
                    rows = slice(row, row + n)
                    row += n
                    self.keys[seq][layer] = np.concatenate([self.keys[seq][layer], k[rows]])
                    self.values[seq][layer] = np.concatenate([self.values[seq][layer], v[rows]])
                    if n:
                        expected = reference(
                            q[rows], self.keys[seq][layer], self.values[seq][layer], self.layers[layer], causal
                        )
                        assert relative_error(np.asarray(o)[rows], expected) <= 3e-6, (layer, seq)


@pytest.mark.parametrize("fused", [False, True])
def test_layers_of_different_variants_and_windows(fused):
    """Three windows, five layers: prompts, decodes, forks and mixtures."""
    c = Cache()
    c.set_variants()
    if fused:
        c.cache.set_rope(RopeConfig(theta=10000.0, rotary_dim=0))
    for seq in (3, 4):
        c.add(seq)
    c.step([3, 4], [70, 3], fused=fused)
    for _ in range(4):
        c.step([4, 3], [1, 1], fused=fused)
    c.add(5, parent=3)
    c.step([3, 5, 4], [1, 9, 20], fused=fused)
    c.step([5, 3], [1, 1], fused=fused)


def test_the_plan_of_a_window_reads_no_page_that_it_hides():
    """Keys behind the window, overwritten with NaN, do not show; without the window they would."""
    c = Cache([LAYERS[1]])
    c.set_variants()
    c.add(0)
    c.step([0], [60])
    (table,) = (c.cache.page_table(0),)
    for page in list(table)[:10]:  # positions 0 … 39; the next query sees 55 and on
        c.cache.pages(0)[int(page)] = np.nan
    c.step([0], [1])


def test_full_layers_share_beside_windows():
    """A prompt of 400 tokens and its answers: capped layers, by turns in a window and not; the others' keys are read once."""
    full = LAYERS[2]
    local = ((variant.soft_cap & variant.sliding_window).bind(cap=1.5, window=5), 5, *full[2:])
    c = Cache([local, full] * 2, num_pages=200, max_batch=16, max_tokens=400)
    c.set_variants()
    c.add(0)
    c.step([0], [400])
    for seq in range(1, 16):
        c.add(seq, parent=0)
    for lengths in ([1] * 16, [1, 3] * 8):
        c.step(list(range(16)), lengths)
        assert [c.cache.plan_of(layer).num_shared_works > 0 for layer in range(4)] == [False, True] * 2


def far(num, left):
    """Hides what is neither among the first `num` keys nor among the last."""
    return lambda s, i, j: np.where((j >= num) & (j < i - left), -np.inf, s)


learned_sink = variant.Variant(
    "learned_sink", output=lambda value, lse, logit: value * variant.sigmoid(lse - logit), logit=variant.per_head()
)
# Four bands: causal, sinks of two sizes, chunks; layers 1 and 4 share theirs, one with an output that follows the merge.
FAR_LAYERS = [
    (None, None, same, same),
    (variant.sink_window.bind(sink=3, window=5), None, far(3, 5), same),
    (variant.chunked_local.bind(chunk=7), None, lambda s, i, j: np.where(i // 7 != j // 7, -np.inf, s), same),
    ((variant.soft_cap & variant.sink_window).bind(cap=1.5, sink=6, window=20), None,
     lambda s, i, j: far(6, 20)(1.5 * np.tanh(s / 1.5), i, j), same),
    ((learned_sink & variant.sink_window).bind(logit=SINK, sink=3, window=5), None, far(3, 5),
     lambda o, lse: o / (1 + np.exp(SINK[:, None] - lse))[..., None]),
]  # fmt: skip


@pytest.mark.parametrize("num_ctas", [1, 5, 40])
def test_layers_with_sinks_and_chunks(num_ctas):
    """Prompts, decodes, forks and mixtures, near the first keys and far from them."""
    c = Cache(FAR_LAYERS, num_ctas=num_ctas)
    c.set_variants()
    for seq in (3, 4):
        c.add(seq)
    c.step([3, 4], [70, 3])
    for _ in range(8):
        c.step([4, 3], [1, 1])
    c.add(5, parent=3)
    c.step([3, 5, 4], [1, 9, 20])
    c.step([5, 3], [1, 1])


def test_pages_between_sinks_and_window_are_not_read():
    """NaN in them does not show, in decodes and in appended prompts."""
    c = Cache(FAR_LAYERS[1:])
    c.set_variants()
    c.add(0)
    c.step([0], [60])
    for layer in range(4):
        table = list(c.cache.page_table(0))
        hidden = {0: (1, 13), 1: (0, 14), 2: (2, 10), 3: (1, 13)}[layer]  # pages of 4 tokens, the next query at 60
        for page in table[slice(*hidden)]:
            c.cache.pages(layer)[int(page)] = np.nan
    c.step([0], [1])
    c.step([0], [2])
    c.step([0], [9])


def test_a_band_with_sinks_needs_a_variant():
    c = Cache()
    with pytest.raises(errors.ArgumentError, match="has 3 sinks and chunks of 0 without a variant"):
        c.cache._call("set_variant", (0,), None, 1, (5, 0, 3, 0))
    with pytest.raises(errors.ArgumentError, match="`band` has 2 values; it must have 4"):
        c.cache._call("set_variant", (0,), None, 1, (5, 0))
    with pytest.raises(errors.ArgumentError, match="`window_left` is -3; it must be -1"):
        c.cache._call("set_variant", (0,), None, 1, (-3, 0, 0, 0))


def test_set_before_and_between_steps():
    """A variant holds from the next step on, also where the number of plans changes; None takes it away."""
    c = Cache([LAYERS[0], LAYERS[0]])
    c.add(0)
    c.step([0], [30])
    c.cache.set_variant(LAYERS[3][0])
    c.layers = [LAYERS[3], LAYERS[3]]
    c.step([0], [5])
    c.cache.set_variant(LAYERS[1][0], layers=[1])
    c.layers = [LAYERS[3], LAYERS[1]]
    c.step([0], [1])
    with pytest.raises(
        errors.ArgumentError,
        match=r"`window_left` is -1, with which .* sequence 0 sees positions from 0 on, but 0 to 23 left",
    ):
        c.cache.set_variant(None)
    c.cache.remove_sequence(0)
    c.cache.set_variant(None)
    c.layers = [LAYERS[0], LAYERS[0]]
    c.add(0)
    c.step([0], [30])


def test_tables_may_change_between_steps_and_have_an_entry_for_each_sequence():
    rate = np.array([0.1, 0.5, 0.0, 0.0], np.float32)
    decay = variant.Variant(
        "decay",
        logits=lambda value, q_pos, kv_pos, rate: value - rate * (q_pos - kv_pos),
        mask=lambda q_pos, kv_pos: kv_pos <= q_pos,
        rate=variant.per_request(),
    )
    c = Cache([(None, None, same, same)])
    c.cache.set_variant(decay.bind(rate=rate))
    c.add(7)
    c.layers = [(None, None, lambda s, i, j: s - rate[0] * (i - j), same)]
    c.step([7], [20])
    rate[0] = 0.3
    c.step([7], [2])
    with pytest.raises(errors.VariantError, match="rate"):
        c.cache.set_variant(decay.bind(rate=rate[:3]))


def test_not_causal():
    two_sided = variant.two_sided_window.bind(left=3, right=2)
    c = Cache([(two_sided, 3, lambda s, i, j: np.where(j - i > 2, -np.inf, s), same)])
    c.set_variants()
    c.add(0)
    c.step([0], [20], causal=False)
    with pytest.raises(
        errors.PlanMismatchError, match=r"`layer` is 0, whose variant has causal = 0, but begin_forward .* causal = 1"
    ):
        c.step([0], [1])


def test_more_windows_than_plans():
    layers = [(variant.sliding_window.bind(window=w), w, same, same) for w in (1, 2, 3, 4, 5)]
    c = Cache(layers)
    for i in range(3):
        c.cache.set_variant(layers[i][0], layers=[i])  # layers 3 and 4 have none: with theirs four windows
    with pytest.raises(errors.ArgumentError, match="would have 5 different bands; a step has at most 4 plans"):
        c.cache.set_variant(layers[3][0], layers=[3])
    c.layers = [*layers[:3], LAYERS[0], LAYERS[0]]  # nothing changed
    c.add(0)
    c.step([0], [17])


def test_what_is_refused():
    c = Cache()
    cap = variant.soft_cap.bind(cap=2.0)
    with pytest.raises(errors.ArgumentError, match="`layer` is 5 but the cache has 5"):
        c.cache.set_variant(cap, layers=[0, 5])
    with pytest.raises(errors.VariantError, match="cap"):
        c.cache.set_variant(variant.soft_cap)
    with pytest.raises(errors.VariantError, match="slopes"):
        c.cache.set_variant(variant.alibi.bind(slopes=SLOPES[:4]))
    c.add(0)
    c.cache.begin_forward([0], [3])
    with pytest.raises(errors.CacheStateError, match="in a step, which is planned already"):
        c.cache.set_variant(cap)
    c.cache.cancel_forward()
    c.cache.bind(12)
    with pytest.raises(errors.CacheStateError, match="ran steps for executable 12"):
        c.cache.set_variant(cap)
    fresh = Cache().cache
    fresh.bind(12)
    fresh.set_variant(cap)  # an executable that has not run yet knows nothing of it


def test_keys_that_lie_unturned():
    """A cache of unturned keys with `rope` gives what one of turned keys gives without: prompt, piece, decode."""
    config = RopeConfig(DIM)
    sizes = dict(num_qo_heads=HQ, num_kv_heads=HKV, head_dim=DIM, page_size=4, num_pages=32, max_batch=2, max_tokens=64)
    unturned, turned = PagedKVCache(num_layers=1, **sizes), PagedKVCache(num_layers=1, **sizes)
    unturned.set_variant(variant.rope.bind(inv_freq=config.inv_freq(), magnitude=1.0))

    def turn(x, positions):
        angle = positions[:, None, None] * config.inv_freq().astype(np.float64)
        a, b = np.split(x.astype(np.float64), 2, -1)
        pair = (a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle))
        return np.concatenate(pair, -1).astype(np.float32)

    rng = np.random.default_rng(3)
    for cache in (unturned, turned):
        cache.add_sequence(0), cache.add_sequence(1)
    done = np.zeros(2, int)
    for counts in ((11, 3), (7, 1), (1, 1), (1, 9)):
        positions = np.concatenate([d + np.arange(n) for d, n in zip(done, counts, strict=True)])
        q, k, v = (rng.standard_normal((sum(counts), heads, DIM)).astype(np.float32) for heads in (HQ, HKV, HKV))
        outputs = []
        for cache, f in ((unturned, lambda x, _: x), (turned, turn)):
            cache.begin_forward([0, 1], list(counts))
            outputs.append(cache.attention(0, f(q, positions), f(k, positions), v))
            cache.end_forward()
        np.testing.assert_allclose(outputs[0], outputs[1], rtol=2e-5, atol=2e-5)
        done += counts


def test_turned_twice_is_refused():
    cache = PagedKVCache(
        num_layers=2,
        num_qo_heads=HQ,
        num_kv_heads=HKV,
        head_dim=DIM,
        page_size=4,
        num_pages=8,
        max_batch=1,
        max_tokens=8,
    )
    config = RopeConfig(DIM)
    cache.set_rope(config)
    cache.set_variant(variant.rope.bind(inv_freq=config.inv_freq(), magnitude=1.0), layers=[1])
    cache.add_sequence(0)
    cache.begin_forward([0], [1])
    qkv = np.zeros((1, HQ + 2 * HKV, DIM), np.float32)
    cache.attention_fused_qkv(0, qkv)
    with pytest.raises(errors.CacheStateError, match=r"`layer` is 1, whose variant turns .* call attention"):
        cache.attention_fused_qkv(1, qkv)
