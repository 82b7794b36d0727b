"""The cache's own rotary embedding: attention_fused_qkv is a rotation in float64, then attention; what set_rope refuses."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_infer import PagedKVCache, RopeConfig, _array, _ffi, errors
from tvm_infer.testing import attention_reference, rope_reference
from tvm_infer.testing.batches import numpy_dtype

LAYERS, HQ, HKV, DIM = 2, 6, 2, 32
TOLERANCE = {"float32": 2e-6, "float16": 3e-3, "bfloat16": 2.5e-2}
YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
CONFIGS = {
    "halves": RopeConfig(DIM),
    "pairs": RopeConfig(DIM, 500.0, interleaved=True),
    "partial": RopeConfig(10, scale=0.5),
    "yarn": RopeConfig(DIM, scaling=YARN),
    "none": RopeConfig(0),
}


def make_cache(dtype="float32", **changes):
    settings = {"num_pages": 64, "page_size": 4, "max_batch": 8, "max_tokens": 40, **changes}
    return PagedKVCache(num_layers=LAYERS, num_qo_heads=HQ, num_kv_heads=HKV, head_dim=DIM, dtype=dtype, **settings)


class Model:
    """What each sequence's projections were, and the attention that follows in float64."""

    def __init__(self, rope: RopeConfig) -> None:
        self.rope = rope
        self.rows: dict[int, list[np.ndarray]] = {}

    def append(self, ids, lengths, qkv):
        start = 0
        for seq, n in zip(ids, lengths, strict=True):
            self.rows.setdefault(seq, []).extend(qkv[start : start + n])
            start += n

    def attention(self, seq, num_new):
        x = np.stack(self.rows[seq]).astype(np.float64)
        style = {"interleaved": self.rope.interleaved, "magnitude": self.rope.magnitude()}
        turned = rope_reference(x[:, : HQ + HKV], np.arange(len(x)), self.rope.inv_freq(), **style)
        q, k, v = turned[len(x) - num_new :, :HQ], turned[:, HQ:], x[:, HQ + HKV :]
        return attention_reference(q, k, v, sm_scale=DIM**-0.5)[0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CONFIGS)
def test_steps_against_float64(name, dtype):
    cache, model = make_cache(dtype), Model(CONFIGS[name])
    cache.set_rope(CONFIGS[name])
    rng = np.random.default_rng(0)
    for seq in (0, 1, 2):
        cache.add_sequence(seq)
    for lengths in ([5, 1, 9], [1, 1, 1], [0, 13, 1]):
        n, padding = sum(lengths), 2
        memory = rng.standard_normal((n + padding, HQ + 2 * HKV + 1, DIM)).astype(numpy_dtype(dtype))
        memory[n:], memory[:, -1] = np.nan, np.nan
        qkv, kept = memory[:, :-1], memory.copy()
        model.append((0, 1, 2), lengths, qkv[:n])
        cache.begin_step([0, 1, 2], lengths, num_rows=n + padding)
        for layer in range(LAYERS):
            out = cache.attention_fused_qkv(layer, qkv)
            again = cache.attention_fused_qkv(layer, qkv)  # as a graph's first call and its capture do
            np.testing.assert_array_equal(out.astype(np.float32), again.astype(np.float32))
            expected = np.concatenate([model.attention(s, m) for s, m in enumerate(lengths) if m])
            error = np.linalg.norm(out[:n].astype(np.float64) - expected) / np.linalg.norm(expected)
            assert error < TOLERANCE[dtype]
            assert not out[n:].astype(np.float32).any()
        np.testing.assert_array_equal(memory.astype(np.float32), kept.astype(np.float32))
        cache.end_forward()


def test_forks_keep_their_positions():
    """Keys are stored rotated: a fork at a position goes on from there."""
    rope = CONFIGS["halves"]
    cache, model = make_cache(), Model(rope)
    cache.set_rope(rope)
    rng = np.random.default_rng(1)
    cache.add_sequence(0)
    qkv = rng.standard_normal((10, HQ + 2 * HKV, DIM), np.float32)
    with cache.forward([0], [10]) as step:
        step.attention_fused_qkv(0, qkv)
    model.append([0], [10], qkv)
    cache.fork_sequence(0, 1, 7)
    model.rows[1] = model.rows[0][:7]
    cache.pop(0, 1), model.rows[0].pop()
    qkv = rng.standard_normal((5, HQ + 2 * HKV, DIM), np.float32)
    with cache.forward([1, 0], [3, 2]) as step:
        out = step.attention_fused_qkv(0, qkv)
    model.append([1, 0], [3, 2], qkv)
    expected = np.concatenate([model.attention(1, 3), model.attention(0, 2)])
    np.testing.assert_allclose(out, expected, rtol=0, atol=3e-6)


def test_no_rotation_is_plain_attention():
    plain, fused = make_cache(), make_cache()
    fused.set_rope(RopeConfig(0))
    qkv = np.random.default_rng(2).standard_normal((9, HQ + 2 * HKV, DIM), np.float32)
    plain.add_sequence(0), fused.add_sequence(0)
    with plain.forward([0], [9]) as a, fused.forward([0], [9]) as b:
        expected = a.attention(0, *np.split(qkv, [HQ, HQ + HKV], axis=1))
        np.testing.assert_array_equal(b.attention_fused_qkv(0, qkv), expected)


def test_torch_and_given_outputs():
    torch = pytest.importorskip("torch")
    cache = make_cache("bfloat16")
    cache.set_rope(CONFIGS["halves"])
    cache.add_sequence(0)
    qkv = torch.randn((4, HQ + 2 * HKV, DIM), dtype=torch.bfloat16)
    out = torch.empty((4, HQ, DIM), dtype=torch.bfloat16)
    with cache.forward([0], [4]) as step:
        assert step.attention_fused_qkv(0, qkv, out=out) is out
        assert torch.equal(step.attention_fused_qkv(1, qkv), out)


def test_set_rope_belongs_before_the_first_sequence():
    cache = make_cache()
    cache.add_sequence(0)
    qkv = np.zeros((2, HQ + 2 * HKV, DIM), np.float32)
    with cache.forward([0], [2]) as step:
        with pytest.raises(errors.CacheStateError, match="call kv_cache_set_rope"):
            step.attention_fused_qkv(0, qkv)
        with pytest.raises(errors.CacheStateError, match="in a step"):
            cache.set_rope(RopeConfig(DIM))
    with pytest.raises(errors.CacheStateError, match=r"holds 1 sequences.*clear\(\)"):
        cache.set_rope(RopeConfig(DIM))
    cache.clear()
    cache.set_rope(RopeConfig(DIM))
    cache.add_sequence(1)
    cache.set_rope(RopeConfig(DIM))  # the same again
    with pytest.raises(errors.CacheStateError, match="holds 1 sequences"):
        cache.set_rope(RopeConfig(DIM, interleaved=True))
    cache.clear()
    cache.set_rope(RopeConfig(8))


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        (None, "`rope` is a NoneType"),
        (RopeConfig(DIM + 2), "`inv_freq` has 17 entries.*heads of the cache have 32"),
        (
            RopeConfig(
                4,
                scaling={
                    "rope_type": "longrope",
                    "short_factor": [1, 1],
                    "long_factor": [2, 3],
                    "original_max_position_embeddings": 8,
                    "factor": 2.0,
                },
            ),
            "`seq_len` is None.*longrope",
        ),
    ],
)
def test_ropes_that_are_refused(rope, words):
    with pytest.raises(errors.ArgumentError, match=words):
        make_cache().set_rope(rope)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"qkv": np.zeros((3, HQ + HKV, DIM), np.float32)},
            errors.ArgumentError,
            r"`qkv`.*must be 10 .num_qo_heads \+ 2",
        ),
        ({"qkv": np.zeros((4, HQ + 2 * HKV, DIM), np.float32)}, errors.PlanMismatchError, "`qkv`.*announced 3 tokens"),
        ({"qkv": np.zeros((3, HQ + 2 * HKV, DIM), np.float16)}, errors.DTypeError, "`qkv` has dtype float16"),
        ({"out": np.zeros((3, HKV, DIM), np.float32)}, errors.ArgumentError, "`out`.*must be 6"),
        ({"layer": 2}, errors.ArgumentError, "`layer` is 2"),
        ({"sm_scale": np.nan}, errors.ArgumentError, "`sm_scale` is "),
        ({"causal": False}, errors.PlanMismatchError, "`causal` is 0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_calls_that_are_refused(change, error, words):
    cache = make_cache()
    cache.set_rope(RopeConfig(DIM))
    cache.add_sequence(0)
    arguments = {"layer": 0, "qkv": np.zeros((3, HQ + 2 * HKV, DIM), np.float32), **change}
    cache.begin_forward([0], [3])
    with pytest.raises(error, match=words):
        cache.attention_fused_qkv(**arguments)


# ---- the rotation in the call


def rope_attention(cache, layer, q, k, v, rope, *, out=None, **changes):
    """The packed function; queries of padding and what it need not write are NaN before."""
    rotated_q = np.full(q.shape, np.nan, q.dtype)
    out = np.full(q.shape, np.nan, q.dtype) if out is None else out
    arguments = {
        "layer": layer,
        "q": q,
        "k": k,
        "v": v,
        "inv_freq": rope.inv_freq(),
        "interleaved": int(rope.interleaved),
        "magnitude": rope.magnitude(),
        "sm_scale": DIM**-0.5,
        "causal": 1,
        "rotated_q": rotated_q,
        "out": out,
        **changes,
    }
    tensors = {name: as_tensor(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    _ffi.func("attention_with_kv_cache_rope")(cache._handle, *tensors.values())
    return out


def as_tensor(x):
    return _array.as_tensor(x, "x", output=True)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_layer_may_turn_otherwise(dtype):
    """Layers of one cache against float64, each with a rotation of its own; nothing is set before."""
    ropes = (CONFIGS["yarn"], CONFIGS["pairs"])
    cache, models = make_cache(dtype), [Model(rope) for rope in ropes]
    rng = np.random.default_rng(4)
    cache.add_sequence(0), cache.add_sequence(1)
    for lengths in ([7, 3], [1, 12], [0, 1], [1, 1]):
        n, padding = sum(lengths), 3
        cache.begin_step([0, 1], lengths, num_rows=n + padding)
        for layer, (rope, model) in enumerate(zip(ropes, models, strict=True)):
            qkv = rng.standard_normal((n + padding, HQ + 2 * HKV, DIM)).astype(numpy_dtype(dtype))
            qkv[n:] = np.nan
            model.append((0, 1), lengths, qkv[:n])
            q, k, v = (np.ascontiguousarray(part) for part in np.split(qkv, [HQ, HQ + HKV], axis=1))
            out = rope_attention(cache, layer, q, k, v, rope)
            again = rope_attention(cache, layer, *np.split(qkv, [HQ, HQ + HKV], axis=1), rope)  # as parts of one tensor
            np.testing.assert_array_equal(out.astype(np.float32), again.astype(np.float32))
            expected = np.concatenate([model.attention(s, m) for s, m in enumerate(lengths) if m])
            error = np.linalg.norm(out[:n].astype(np.float64) - expected) / np.linalg.norm(expected)
            assert error < TOLERANCE[dtype]
            assert not out[n:].astype(np.float32).any()
        cache.end_forward()


def test_the_call_is_the_cache_s_own_rotation():
    """Bit for bit; and a step without rows is none."""
    rope = CONFIGS["partial"]
    one, other = make_cache(), make_cache()
    one.set_rope(rope)
    qkv = np.random.default_rng(5).standard_normal((6, HQ + 2 * HKV, DIM), np.float32)
    one.add_sequence(0), other.add_sequence(0)
    q, k, v = np.split(qkv, [HQ, HQ + HKV], axis=1)
    with one.forward([0], [6]) as a, other.forward([0], [6]):
        np.testing.assert_array_equal(rope_attention(other, 0, q, k, v, rope), a.attention_fused_qkv(0, qkv))
    np.testing.assert_array_equal(one.gather(0, 0)[0], other.gather(0, 0)[0])
    with other.forward([], []):
        assert rope_attention(other, 0, q[:0], k[:0], v[:0], rope).shape == (0, HQ, DIM)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"inv_freq": np.ones(DIM // 2 + 1, np.float32)},
            errors.ArgumentError,
            "`inv_freq` has 17 entries.*heads of the cache",
        ),
        ({"inv_freq": np.ones(4)}, errors.DTypeError, "`inv_freq` has dtype float64"),
        ({"inv_freq": np.ones((1, 4), np.float32)}, errors.ArgumentError, "`inv_freq`"),
        ({"inv_freq": np.ones(8, np.float32)[::2]}, errors.ArgumentError, "`inv_freq`"),
        ({"interleaved": 2}, errors.ArgumentError, "`interleaved` is 2"),
        ({"magnitude": np.inf}, errors.ArgumentError, "`magnitude` is inf"),
        ({"q": np.zeros((2, HQ, DIM), np.float32)}, errors.PlanMismatchError, "`q`.*announced 3 tokens"),
        ({"k": np.zeros((3, HQ, DIM), np.float32)}, errors.ArgumentError, "`k`.*must be 2"),
        ({"v": np.zeros((3, HKV, DIM), np.float16)}, errors.DTypeError, "`v` has dtype float16"),
        ({"rotated_q": np.zeros((3, HKV, DIM), np.float32)}, errors.ArgumentError, "`rotated_q`.*must be 6"),
        ({"out": np.zeros((4, HQ, DIM), np.float32)}, errors.PlanMismatchError, "`out`"),
        ({"layer": 2}, errors.ArgumentError, "`layer` is 2"),
        ({"sm_scale": np.nan}, errors.ArgumentError, "`sm_scale` is "),
        ({"causal": 0}, errors.PlanMismatchError, "`causal` is 0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_rotations_that_are_refused(change, error, words):
    cache = make_cache()
    cache.add_sequence(0)
    heads = {name: np.zeros((3, count, DIM), np.float32) for name, count in (("q", HQ), ("k", HKV), ("v", HKV))}
    arguments = {"layer": 0, "rope": CONFIGS["halves"], **heads, **change}
    with pytest.raises(errors.CacheStateError):
        rope_attention(cache, **{**arguments, "layer": 0})  # no step is under way
    cache.begin_forward([0], [3])
    with pytest.raises(error, match=words):
        rope_attention(cache, **arguments)
