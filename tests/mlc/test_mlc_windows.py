"""Windows of layers and of sequences: against a float64 model, and against TVM's own cache with TVM's own kernels."""

from __future__ import annotations

import numpy as np
import pytest
import tvm_cache
from mlc_model import Driver, attend, attention_kv_cache, check, kv_state, shape, to_numpy, to_tvm

from tvm_infer import errors
from tvm_infer.runtime import MLCPagedKVCache


class LayerWindows(Driver):
    """Layer 1 of two has a window."""

    def __init__(self, window, kinds=("mha", "mha_sliding"), **settings):
        super().__init__(attn_kinds=kinds, layer_sliding_window_size=window, **settings)
        self.windows = [window if kind == "mha_sliding" else 10**6 for kind in kinds]

    def whole(self, layer, ids, lengths, q):
        out = np.zeros_like(q)
        for seq, n, (begin, end) in zip(ids, lengths, self.rows(lengths), strict=True):
            k, v = self.history[seq][layer]
            i, j = np.arange(len(k) - n, len(k))[:, None], np.arange(len(k))[None]
            out[begin:end], _ = attend(q[begin:end], k, v, self.scale, (j <= i) & (j > i - self.windows[layer]))
        return out


STEPS = [([0, 1], [9, 3]), ([1, 0], [1, 1]), ([0], [24]), ([1, 0], [20, 1]), ([0, 1], [1, 1]), ([0, 1], [12, 12])]


@pytest.mark.parametrize("window", [1, 5, 16])
@pytest.mark.parametrize("kinds", [("mha", "mha_sliding"), ("mha_sliding", "mha_sliding")])
def test_layers_with_windows(window, kinds):
    d = LayerWindows(window, kinds)
    d.add(0), d.add(1)
    for ids, lengths in STEPS:
        d.step(ids, lengths)
    d.fork(0, 2)
    d.step([2, 0], [1, 1])
    d.popn(0, 1)
    d.step([0], [2])


def test_where_all_layers_have_windows_pages_come_back():
    d = LayerWindows(8, ("mha_sliding", "mha_sliding"), max_total_seq_len=48)
    d.add(0)
    for _ in range(10):
        d.step([0], [24])
    for _ in range(40):
        d.step([0], [1])
    assert d.cache.inner.num_used_pages == 2  # the last token, at 279, saw positions 272 on
    x = to_tvm(np.zeros((2, 4, 2, 16)))
    with pytest.raises(errors.ArgumentError, match="`start_pos` is 100, but positions 100 to 103 left the window"):
        attention_kv_cache("debug_get_kv", d.cache, 0, 100, 104, x, x)
    k, v = d.get(0, 276, 280)
    assert np.array_equal(k, d.history[0][:, 0, -4:]) and np.array_equal(v, d.history[0][:, 1, -4:])


@pytest.mark.parametrize("rope", [{}, {"rope_mode": "normal", "rope_scaling": {"rope_type": "longrope", "max_position_embeddings": 64,
    "original_max_position_embeddings": 8}}])  # fmt: skip
def test_shared_keys_of_a_layer_with_a_window(rope):
    """By plans of their own: the window shows, and longrope's tables, which the number of tokens chooses, come with a plan, too."""
    d = LayerWindows(5, **rope)
    d.add(0)
    d.begin([0], [20])
    qkv, o = d.random(20, 8, 16), to_tvm(np.zeros((20, 4, 16)))
    fused = d.fused(1, qkv)
    q, k, v = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    attention_kv_cache("attention_with_shared_kv", d.cache, 1, d.scale, *(to_tvm(x) for x in (q, k, v)), o)
    i, j = np.ogrid[:20, :20]
    d.end()
    stored, _ = d.get(0, 0, 20)
    expected, _ = attend(q, stored[1], v, d.scale, (j <= i) & (j > i - 5))
    check(to_numpy(o), expected, "float32", "shared")
    if not rope:
        check(fused, expected, "float32", "fused")


def test_attention_in_parts_is_refused_at_layers_with_windows():
    d = LayerWindows(5)
    d.add(0)
    d.begin([0], [2])
    q, k, o, lse = (to_tvm(np.zeros(s)) for s in ((2, 4, 16), (2, 2, 16), (2, 4, 16), (2, 4)))
    attention_kv_cache("self_attention", d.cache, 0, 1.0, q, k, k, o, lse)
    for name, args in (("self_attention", (q, k, k, o, lse)), ("cross_attention", (q, o, lse))):
        with pytest.raises(errors.ArgumentError, match=f"`layer_id` of {name} is 1, an mha_sliding layer"):
            attention_kv_cache(name, d.cache, 1, 1.0, *args)


@pytest.mark.parametrize("rope_mode", ["none", "normal"])
def test_layers_with_windows_as_tvm_has_them(rope_mode):
    """In chunks shorter than the window: of longer ones TVM's tokens see all."""
    kinds = ["mha", "mha_sliding"]
    both = tvm_cache.Both(
        MLCPagedKVCache(
            num_layers=2, num_qo_heads=4, num_kv_heads=2, head_dim=16, rope_mode=rope_mode, attn_kinds=kinds,
            layer_sliding_window_size=20, **tvm_cache.LIMITS,
        ),
        tvm_cache.create(rope_mode, attn_kinds=(0, 3), window=20),
        reads_garbage=True,
    )  # fmt: skip
    for seq in (3, 4):
        both.state("add_sequence", seq)
    for ids, lengths in [
        ([3, 4], [19, 7]),
        ([4, 3], [1, 1]),
        ([3, 4], [19, 18]),
        ([4], [1]),
        ([3, 4], [1, 1]),
        ([4, 3], [19, 5]),
    ]:
        both.step(ids, lengths)


class SequenceWindows(Driver):
    """The history is what a sequence keeps: its first tokens and its last ones."""

    def __init__(self, **settings):
        super().__init__(support_sliding_window=True, **settings)
        self.windows, self.slid = {}, set()

    def enable(self, seq, size, sink):
        attention_kv_cache("enable_sliding_window_for_seq", self.cache, seq, size, sink)
        self.windows[seq] = size, sink

    def step(self, ids, lengths, padding=0):
        super().step(ids, lengths, padding)
        for seq in ids:
            size, sink = self.windows.get(seq, (10**6, 0))
            kv, over = self.history[seq], self.length(seq) - size
            if over > 0:
                self.slid.add(seq)
                self.history[seq] = np.concatenate([kv[:, :, :sink], kv[:, :, sink + over :]], axis=2)

    def remove(self, seq):
        super().remove(seq)
        self.windows.pop(seq, None), self.slid.discard(seq)

    def held(self):
        return attention_kv_cache("get_total_sequence_length", self.cache)


@pytest.mark.parametrize("page_size", [1, 4])
def test_sinks_are_not_popped_once_the_window_has_slid(page_size):
    """With pages of one token nothing hidden is left behind: what has slid is remembered all the same."""
    d = SequenceWindows(max_total_seq_len=400, page_size=page_size)
    d.add(0)
    d.enable(0, 3, 1)
    d.step([0], [9])
    assert d.length(0) == 3
    with pytest.raises(errors.ArgumentError, match="from 0 to 2"):
        d.popn(0, 3)
    d.popn(0, 2)
    d.step([0], [4])
    assert d.held() == d.length(0) == 3


@pytest.mark.parametrize(("size", "sink"), [(1, 0), (7, 0), (9, 1), (13, 4), (12, 7), (16, 8)])
def test_sequences_with_windows(size, sink):
    """One with a window, one without, in one step; chunks longer than the window."""
    d = SequenceWindows(max_total_seq_len=400)
    for seq in (0, 1, 2):
        d.add(seq)
    d.enable(0, size, sink), d.enable(2, 5, 2)
    for ids, lengths in [*STEPS, ([2, 0], [24, 0]), ([1, 2, 0], [1, 1, 1]), *([([2, 0], [1, 1])] * 30)]:
        d.step(ids, lengths, padding=1)
        assert d.held() == sum(map(d.length, d.history))
    assert d.length(0) == size and d.length(2) == 5
    kept = (size, sink, -(-sink // 4) * 4), (5, 2, 4)
    # sinks' pages, and the window's, cut outwards
    most = sum(end // 4 + (n - s + 6) // 4 + 1 for n, s, end in kept)
    assert d.cache.inner.num_used_pages - -(-d.length(1) // 4) <= most


def test_a_window_of_a_text_that_is_longer_already():
    d = SequenceWindows(max_total_seq_len=400)
    d.add(0)
    d.step([0], [24]), d.step([0], [21])
    d.enable(0, 10, 3)
    d.step([0], [1])
    assert d.held() == 10
    d.step([0], [2]), d.step([0], [1])


def test_pops_and_forks_of_windows():
    d = SequenceWindows()
    d.add(0)
    d.enable(0, 12, 5)
    d.step([0], [8])
    with pytest.raises(
        errors.ArgumentError, match=r"`fork_pos` is -1 but sequence 0 of 8 tokens has a window of 12.*from 0 to 5"
    ):
        d.fork(0, 1)
    d.fork(0, 1, 5)
    d.step([0, 1], [20, 3])
    for seq in (0, 1):
        d.step([seq], [1])
    with pytest.raises(errors.ArgumentError, match="`n` of popn is 8 but sequence 0 has 7 tokens behind its 5 sinks"):
        d.popn(0, 8)
    with pytest.raises(errors.ArgumentError, match="`fork_pos` is 6"):
        d.fork(0, 2, 6)
    d.fork(0, 2, 4)
    d.popn(0, 7)
    d.step([0, 2], [3, 1])
    d.popn(0, 2)
    for _ in range(9):
        d.step([2, 0, 1], [1, 2, 1])
    x = to_tvm(np.zeros((2, 1, 2, 16)))
    with pytest.raises(errors.CacheStateError, match="debug_get_kv on sequence 0, whose window has slid"):
        attention_kv_cache("debug_get_kv", d.cache, 0, 0, 1, x, x)
    d.remove(0)
    d.add(0)  # without a window
    d.step([0], [20])
    d.clear()
    assert d.held() == 0 and attention_kv_cache("empty", d.cache)


def test_self_and_cross_of_windows():
    """Cross attention sees what is kept, self attention the step's tokens; in a decode step, too."""
    d = SequenceWindows()
    d.add(0)
    d.enable(0, 6, 2)
    d.step([0], [15])
    kept = d.history[0][0]
    d.begin([0], [1])
    q, k, v = d.random(1, 4, 16), d.random(1, 2, 16), d.random(1, 2, 16)
    o, lse = to_tvm(np.full((1, 4, 16), np.nan)), to_tvm(np.full((1, 4), np.nan))
    attention_kv_cache("cross_attention", d.cache, 0, d.scale, to_tvm(q), o, lse)
    expected, expected_lse = attend(q, *kept, d.scale, np.ones((1, 6), bool))
    check(to_numpy(o), expected, "float32", "cross"), check(to_numpy(lse), expected_lse, "float32", "lse")
    attention_kv_cache("self_attention", d.cache, 0, d.scale, *(to_tvm(x) for x in (q, k, v)), o, lse)
    check(to_numpy(o), attend(q, k, v, d.scale, np.ones((1, 1), bool))[0], "float32", "self")


def test_what_is_refused():
    d = SequenceWindows()
    d.add(0)
    for size, sink, message in [
        (0, 0, "`sliding_window_size` is 0"),
        (4, 4, "`attn_sink_size` is 4 .*from 0 to 3"),
        (4, -1, "is -1"),
    ]:
        with pytest.raises(errors.ArgumentError, match=message):
            d.enable(0, size, sink)
    d.enable(0, 4, 3)
    with pytest.raises(errors.CacheStateError, match="sequence 0, which has a window of 4 tokens already"):
        d.enable(0, 5, 3)
    with pytest.raises(errors.UnknownSequenceError):
        d.enable(9, 5, 3)
    with pytest.raises(errors.ArgumentError, match=r"`token_tree_parent_ptr` on a cache .* support_sliding_window = 1"):
        kv_state("begin_forward", d.cache, shape([0]), shape([2]), shape([-1, 0]))
    plain = Driver()
    plain.add(0)
    with pytest.raises(errors.ArgumentError, match=r"attn_sink_size=4.*created with support_sliding_window = 0"):
        attention_kv_cache("enable_sliding_window_for_seq", plain.cache, 0, 128, 4)
    with pytest.raises(errors.ArgumentError, match=r"`attn_kinds` is .*mha, mha_sliding"):
        Driver(attn_kinds=["mla"])
    layers = LayerWindows(5)
    layers.add(0)
    attention_kv_cache("enable_sliding_window_for_seq", layers.cache, 0, 8, 1)  # as in TVM nothing comes of it
    layers.step([0], [20]), layers.step([0], [1])


@pytest.mark.parametrize("sink", [0, 3, 16, 20])
def test_sequences_with_windows_as_tvm_has_them(sink):
    both = tvm_cache.Both(
        MLCPagedKVCache(
            num_layers=2, num_qo_heads=4, num_kv_heads=2, head_dim=16, support_sliding_window=True, **tvm_cache.LIMITS
        ),
        tvm_cache.create(support_sliding_window=True),
    )
    for seq in (0, 1, 2):
        both.state("add_sequence", seq)
    both.call("enable_sliding_window_for_seq", 0, 37, sink)
    both.call("enable_sliding_window_for_seq", 2, 21, 2)
    for ids, lengths in [
        ([0, 1], [18, 9]), ([1, 2, 0], [1, 30, 1]), ([0], [40]), ([0, 2], [1, 1]), ([2, 0, 1], [5, 2, 1]),
        *([([0, 1, 2], [1, 1, 1])] * 40), ([0], [48]), ([0], [3]),
    ]:  # fmt: skip
        both.step(ids, lengths)
        assert both.caches[0].inner.num_free_pages >= attention_kv_cache("get_num_available_pages", both.caches[1])
