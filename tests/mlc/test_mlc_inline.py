"""RoPE mode "inline": keys are stored unturned and attention turns queries and keys, by positions within a window where one has slid.

Against a float64 model, and against TVM's own cache with its own kernels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tvm_cache
from inline_model import InlineDriver, InlineLayerWindows, InlineSequenceWindows, frequencies, parts, turned
from mlc_model import TOLERANCE, attention_kv_cache, check, kv_state, shape, to_numpy, to_tvm
from test_mlc_rope import LLAMA3, LONGROPE, tvm_rotation
from test_mlc_trees import CHAIN, WIDE, Trees

from tvm_infer import errors
from tvm_infer.runtime import MLCPagedKVCache, mlc_rope

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 4, "beta_slow": 1}
# settings -> how a head of 32 channels turns
CASES = {
    "plain": {},
    "theta": {"rope_theta": 500000.0},
    "scaled positions": {"rope_scale": 0.25},
    "half of the head": {"rotary_dim": 16},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": YARN},
    "gptj": {"rope_scaling": {"rope_type": "gptj"}},
    "gptj, half of the head": {"rope_scaling": {"rope_type": "gptj"}, "rotary_dim": 16},
    "longrope without factors": {"rope_scaling": LONGROPE},
}
STEPS = [([0, 7], [5, 2]), ([7, 0], [1, 1]), ([7], [9]), ([0, 7], [3, 4]), ([0, 7], [1, 1])]


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request):
    if request.param == "bfloat16":
        pytest.importorskip("ml_dtypes")
    return request.param


@pytest.fixture(autouse=True)
def tolerance(monkeypatch):
    """float32's: angles are float32."""
    monkeypatch.setitem(TOLERANCE, "float32", 1e-5)


def turn_of(rotary_dim=32, rope_theta=1e4, rope_scale=1.0, rope_scaling=None):
    """By the tables that rotation before storing has (test_mlc_rope.py holds them against TVM's)."""
    import json

    scaling = json.dumps(rope_scaling) if rope_scaling else ""
    inv_freq, _, _, interleaved, magnitude = mlc_rope.rope_tables(rotary_dim, rope_theta, rope_scale, scaling, None)
    return lambda x, positions, layer: turned(x, positions, to_numpy(inv_freq), bool(interleaved), magnitude)


@pytest.mark.parametrize("name", CASES)
def test_rotations(name, dtype):
    settings = CASES[name]
    d = InlineDriver(dtype, head_dim=32, turn=turn_of(**settings), **settings)
    d.add(0), d.add(7)
    for ids, lengths in STEPS:
        d.step(ids, lengths, padding=2)
    d.fork(0, 1, 5), d.fork(7, 2), d.popn(7, 2)
    for ids, lengths in [([1, 2, 0], [2, 1, 1]), ([7, 2], [6, 1])]:
        d.step(ids, lengths)
    d.check_contents()  # keys lie unturned


def test_the_comparison_sees_the_rotation():
    d = InlineDriver()
    d.turn = lambda x, positions, layer: x
    d.add(0)
    with pytest.raises(AssertionError, match="off by"):
        d.step([0], [9])


@pytest.mark.parametrize("rope_mode", ["normal", "inline"])
@pytest.mark.parametrize(("size", "sink"), [(1, 0), (7, 0), (9, 1), (13, 4), (12, 7), (16, 8)])
def test_sequences_with_windows(size, sink, rope_mode):
    """Keys turn by where they stand in the window, anew in each step; one with a window, one without, chunks longer than the window."""
    d = InlineSequenceWindows(max_total_seq_len=400, rope_mode=rope_mode)
    for seq in (0, 1, 2):
        d.add(seq)
    d.enable(0, size, sink), d.enable(2, 5, 2)
    for ids, lengths in [
        ([0, 1], [9, 3]), ([1, 0], [1, 1]), ([0], [24]), ([1, 0], [20, 1]), ([2, 0], [24, 0]), ([1, 2, 0], [1, 1, 1]),
        *([([2, 0], [1, 1])] * 30), ([0, 2], [12, 12]),
    ]:  # fmt: skip
        d.step(ids, lengths, padding=1)
    d.popn(0, size - max(sink, 1))
    d.step([0], [3])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"], indirect=True)
@pytest.mark.parametrize("case", ["half of the head", "gptj", "longrope without factors"])
def test_windows_with_other_rotations(case, dtype):
    settings = CASES[case]
    d = InlineSequenceWindows(dtype=dtype, head_dim=32, turn=turn_of(**settings), **settings)
    d.add(0), d.add(1)
    d.enable(0, 11, 3)
    for ids, lengths in [([0, 1], [15, 7]), ([1, 0], [1, 1]), ([0, 1], [6, 2]), *([([0], [1])] * 6)]:
        d.step(ids, lengths)


def test_forks_of_windows():
    d = InlineSequenceWindows()
    d.add(0)
    d.enable(0, 12, 5)
    d.step([0], [20])
    d.fork(0, 2, 4)
    d.step([0, 2], [3, 1])
    d.popn(0, 2)
    for _ in range(9):
        d.step([2, 0], [1, 2])


@pytest.mark.parametrize("kinds", [("mha", "mha_sliding"), ("mha_sliding", "mha_sliding")])
@pytest.mark.parametrize("support_sliding_window", [False, True])
def test_layers_with_windows(kinds, support_sliding_window):
    """Their base is 10000 whatever the cache's, as TVM's: Gemma 3 has it so."""

    def turn(x, positions, layer):
        is_sliding = kinds[layer] == "mha_sliding"
        return turned(x, positions if is_sliding else 0.5 * positions, frequencies(8, 1e4 if is_sliding else 777.0))

    d = InlineLayerWindows(
        5, kinds, turn=turn, rope_theta=777.0, rope_scale=0.5, support_sliding_window=support_sliding_window,
        rope_mode="normal" if support_sliding_window else "inline",
    )  # fmt: skip
    d.add(0), d.add(1)
    for ids, lengths in [([0, 1], [9, 3]), ([1, 0], [1, 1]), ([0], [24]), ([1, 0], [20, 1]), ([0, 1], [12, 12])]:
        d.step(ids, lengths)


@pytest.mark.parametrize("case", ["plain", "theta", "llama3", "gptj"])
def test_trees(case):
    """Which TVM's cache refuses with rotation inline: nodes stand at their depth behind the text."""
    settings = {k: v for k, v in CASES[case].items() if k != "rotary_dim"}
    rotate = tvm_rotation(**settings)
    d = Trees(rotate=rotate, rope_mode="inline", **settings)
    d.add(3), d.add(5), d.add(6)
    d.tree_step([3, 5], [[-1, *range(8)], [-1, 0]])
    d.commit([3, 5], [8, 1])
    d.tree_step([5, 3, 6], [WIDE, [-1, -1, 1], [-1, -1]])  # the last one's text is nothing
    d.tree_step([3], [[0, 2]])
    d.commit([3, 5, 6], [4, 6, 1])
    d.tree_step([3], [CHAIN])
    d.commit([3], [3])
    d.tree_step([6, 5, 3], [WIDE, WIDE[:3], WIDE])
    d.commit([3, 5, 6], [-1, 2, 8])
    d.tree_step([3, 6], [[-1], [-1]])


def test_trees_and_windows_do_not_go_together():
    d = InlineSequenceWindows()
    d.add(0)
    with pytest.raises(errors.ArgumentError, match=r"`token_tree_parent_ptr` on a cache .* support_sliding_window = 1"):
        kv_state("begin_forward", d.cache, shape([0]), shape([2]), shape([-1, 0]))


def new_keys(d, ids, lengths, layer_kv):
    for seq, (begin, end) in zip(ids, d.rows(lengths), strict=True):
        new = np.stack([x[begin:end] for x in layer_kv])[None].repeat(d.layers, axis=0)
        d.history[seq] = np.concatenate([d.history[seq], new], axis=2)


@pytest.mark.parametrize("lengths", [[5, 2, 9], [1, 1, 1]])
def test_attention_in_parts(lengths, dtype):
    """Turned, too, in this mode: queries of cross attention by where they stand behind the keys. One sequence has no keys."""
    d = InlineDriver(dtype)
    ids = [0, 1, 2]
    for seq in ids:
        d.add(seq)
    d.step(ids[:2], [3, 17])
    d.begin(ids, lengths)
    n = sum(lengths)
    q, k, v = d.random(n, 4, 16), d.random(n, 2, 16), d.random(n, 2, 16)
    if lengths == [1, 1, 1]:  # a decode step, whose keys cross attention sees: they are stored first
        d.fused(0, np.concatenate([q, k, v], axis=1))
        new_keys(d, ids, lengths, (k, v))
        for seq in ids:
            d.history[seq][1:] = np.nan
        (_, cross) = parts(d, 0, q, k, v)
        o = d.whole(0, ids, lengths, q)
        check(to_numpy(cross[0]), o, dtype, "cross")
        return
    for pair, expected in zip(
        parts(d, 1, q, k, v),
        (d.self_attention(ids, lengths, q, k, v), d.cross_attention(1, ids, lengths, q)),
        strict=True,
    ):
        for tensor, values in zip(pair, expected, strict=True):
            check(to_numpy(tensor), values, dtype, "self or cross")


@pytest.mark.parametrize("n", [1, 4, 20])
@pytest.mark.parametrize(("size", "sink"), [(6, 2), (13, 9)])
def test_parts_of_windows(size, sink, n):
    """Queries whose number exceeds what is kept, and such that the executor takes for sinks."""
    d = InlineSequenceWindows()
    d.add(0)
    d.enable(0, size, sink)
    d.step([0], [23])
    d.step([0], [2])
    d.begin([0], [n])
    q, k, v = d.random(n, 4, 16), d.random(n, 2, 16), d.random(n, 2, 16)
    own, cross = parts(d, 1, q, k, v)
    for pair, expected in ((own, d.self_attention([0], [n], q, k, v)), (cross, d.cross_attention(1, [0], [n], q))):
        for tensor, values in zip(pair, expected, strict=True):
            check(to_numpy(tensor), values, "float32", "self or cross")


@pytest.mark.parametrize("make", [InlineDriver, InlineSequenceWindows, lambda: InlineLayerWindows(5)])
def test_shared_keys(make):
    """From the source layer's pages, turned as that layer's."""
    d = make()
    d.add(0)
    if isinstance(d, InlineSequenceWindows):
        d.enable(0, 9, 2)
    d.step([0], [17])
    for n in (6, 1):
        d.begin([0], [n])
        qkv, q = d.random(n, 8, 16), d.random(n, 4, 16)
        d.fused(0, qkv), d.fused(1, qkv)
        k, v = qkv[:, 4:6], qkv[:, 6:]
        out = []
        for layer in (0, 1):
            o = to_tvm(np.zeros((n, 4, 16)))
            attention_kv_cache("attention_with_shared_kv", d.cache, layer, d.scale, *(to_tvm(x) for x in (q, k, v)), o)
            out.append(to_numpy(o))
        d.end()
        before = d.history[0]
        new_keys(d, [0], [n], (k, v))
        for layer in (0, 1):
            check(out[layer], d.whole(layer, [0], [n], q), "float32", f"layer {layer}")
        if isinstance(d, InlineSequenceWindows):
            d.history[0] = np.concatenate([before, d.history[0][:, :, -n:]], axis=2)
            d.history[0] = np.concatenate([d.history[0][:, :, :2], d.history[0][:, :, -7:]], axis=2)


# TVM's own


def both(support_sliding_window=False, rope_mode="inline", kinds=("mha", "mha"), window=20, **rope):
    ours = {f"rope_{key}" if key != "rope_scaling" else key: value for key, value in rope.items()}
    return tvm_cache.Both(
        MLCPagedKVCache(
            num_layers=2, num_qo_heads=4, num_kv_heads=2, head_dim=16, rope_mode=rope_mode, attn_kinds=list(kinds),
            layer_sliding_window_size=window, support_sliding_window=support_sliding_window, **ours, **tvm_cache.LIMITS,
        ),
        tvm_cache.create(
            rope_mode, [{"mha": 0, "mha_sliding": 3}[kind] for kind in kinds], support_sliding_window, window, **rope
        ),
        reads_garbage="mha_sliding" in kinds,
    )  # fmt: skip


def stored(cache, seq, n):
    k, v = (to_tvm(np.zeros((tvm_cache.LAYERS, n, 2, 16))) for _ in range(2))
    attention_kv_cache("debug_get_kv", cache, seq, 0, n, k, v)
    return to_numpy(k), to_numpy(v)


@pytest.mark.parametrize(
    "rope", [{}, {"theta": 500.0, "scale": 0.5}, {"rope_scaling": LLAMA3}, {"rope_scaling": LONGROPE}], ids=str
)
def test_as_tvm_has_it(rope):
    """Forks at two depths, as TVM's kernels see them; pops."""
    b = both(**rope)
    for seq in (3, 4):
        b.state("add_sequence", seq)
    b.step([3, 4], [19, 7])
    b.step([4, 3], [1, 1])
    b.state("fork_sequence", 3, 5, 17)
    b.step([5, 3, 4], [1, 1, 1])
    b.step([4, 5], [9, 12])
    b.state("popn", 5, 3)
    b.step([5, 3], [1, 1])
    for ours, tvms in zip(*(stored(cache, 5, 28) for cache in b.caches), strict=True):
        assert np.array_equal(ours, tvms)


@pytest.mark.parametrize("rope_mode", ["normal", "inline"])
@pytest.mark.parametrize("sink", [0, 3, 16, 20])
def test_sequences_with_windows_as_tvm_has_them(sink, rope_mode):
    b = both(True, rope_mode)
    for seq in (0, 1, 2):
        b.state("add_sequence", seq)
    b.call("enable_sliding_window_for_seq", 0, 37, sink)
    b.call("enable_sliding_window_for_seq", 2, 21, 2)
    for ids, lengths in [
        ([0, 1], [18, 9]), ([1, 2, 0], [1, 30, 1]), ([0], [40]), ([0, 2], [1, 1]), ([2, 0, 1], [5, 2, 1]),
        *([([0, 1, 2], [1, 1, 1])] * 20), ([0], [48]), ([0], [3]),
    ]:  # fmt: skip
        b.step(ids, lengths)


@pytest.mark.parametrize("lengths", [[1, 1], [6, 3]])
@pytest.mark.parametrize("slides", [False, True])
def test_attention_in_parts_as_tvm_has_it(lengths, slides):
    b = both(slides)
    for seq in (0, 1):
        b.state("add_sequence", seq)
    if slides:
        b.call("enable_sliding_window_for_seq", 0, 18, 5)
    b.step([0, 1], [30, 11])
    b.step([0, 1], [1, 1])
    b.state("begin_forward", shape([0, 1]), shape(lengths))
    n = sum(lengths)
    q, k, v = (to_tvm(b.rng.standard_normal((n, heads, 16))) for heads in (4, 2, 2))
    found = []
    for cache in b.caches:
        for name, args in (("self_attention", (q, k, v)), ("cross_attention", (q,))):
            if name == "cross_attention" and lengths == [1, 1] and not slides:
                continue  # its keys are stored by now, if at all, by other calls than these
            o, lse = to_tvm(np.full((n, 4, 16), np.nan)), to_tvm(np.full((n, 4), np.nan))
            attention_kv_cache(name, cache, 1, 0.25, *args, o, lse)
            found.append((to_numpy(o), to_numpy(lse)))
    half = len(found) // 2
    for (o, lse), (tvms_o, tvms_lse) in zip(found[:half], found[half:], strict=True):
        assert np.abs(o - tvms_o).max() <= 2e-5 and np.abs(lse - tvms_lse).max() <= 2e-5


@pytest.mark.parametrize("theta", [1e4, 500.0])
def test_layers_with_windows_as_tvm_has_them(theta):
    """Of other bases than 10000 TVM's decode steps only: its chunks turn the step's own keys by the cache's base, others by 10000."""
    b = both(kinds=("mha", "mha_sliding"), theta=theta)
    for seq in (3, 4):
        b.state("add_sequence", seq)
    chunks = [([3, 4], [19, 7]), ([3, 4], [19, 18])]
    decodes = [([4, 3], [1, 1]), ([4], [1]), ([3, 4], [1, 1])]
    for chunk, steps in zip(chunks, itertools.repeat(decodes)):
        if theta == 1e4:
            b.step(*chunk)
        else:
            store(b, *chunk)
        for step in steps:
            b.step(*step)


def store(b, ids, lengths):
    """A step whose outputs nobody compares."""
    b.state("begin_forward", shape(ids), shape(lengths))
    for layer in range(tvm_cache.LAYERS):
        qkv = to_tvm(b.rng.standard_normal((sum(lengths), 8, 16)))
        for cache in b.caches:
            attention_kv_cache(
                "attention_with_fused_qkv", cache, layer, 0.25, qkv, to_tvm(np.zeros((sum(lengths), 4, 16)))
            )
    b.state("end_forward")


def test_the_variants_of_whole_heads_need_no_compiler(monkeypatch):
    from tvm_infer.variant import cpu

    def compiled(variant):
        raise AssertionError(f"{variant.name} is compiled")

    monkeypatch.setattr(cpu, "compiled", compiled)
    d = InlineSequenceWindows()
    d.add(0)
    d.enable(0, 5, 1)
    d.step([0], [9]), d.step([0], [1])
    trees = Trees(rope_mode="inline", rotate=tvm_rotation())
    trees.add(0)
    trees.tree_step([0], [WIDE])
    with pytest.raises(AssertionError, match="rope is compiled"):
        InlineDriver(head_dim=32, rotary_dim=16)
