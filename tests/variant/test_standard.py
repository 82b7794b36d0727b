"""The standard variants, compiled for the CPU, against attention's definitions written by hand in numpy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from generated import At, element, logits, output

from tvm_infer import variant

KV_LEN, Q_LEN, HEADS, HEAD_DIM = 41, 9, 4, 48
keys = np.arange(KV_LEN)
CONTEXT = KV_LEN - Q_LEN
RNG = np.random.default_rng(7)
SLOPES = RNG.random(HEADS).astype(np.float32)
BIAS = RNG.standard_normal((HEADS, Q_LEN, KV_LEN)).astype(np.float32)
VISIBLE = RNG.random((Q_LEN, KV_LEN)) < 0.5
TREE = RNG.random((Q_LEN, Q_LEN)) < 0.5
WEIGHTS = RNG.standard_normal((2, HEAD_DIM)).astype(np.float32)
INV_FREQ = (10000.0 ** -np.linspace(0, 1, HEAD_DIM // 2)).astype(np.float32)


def packed(matrix, first_bit):
    """Bits that start at an odd place, among others that must not matter."""
    noise = RNG.random(first_bit) < 0.5
    bits = np.packbits(np.concatenate([noise, matrix.ravel()]), bitorder="little")
    # request 1 of 2 is the one that is asked for
    return {"bits": bits, "first_bit": np.array([999, first_bit], np.int32)}


def tree_visible(i):
    return np.concatenate([np.ones(CONTEXT, bool), TREE[i]])


# name -> parameters, logits of (x, q_pos, head), visible keys of q_pos besides the causal ones
CASES = {
    "full": ({}, None, lambda q: keys >= 0),
    "causal": ({}, None, lambda q: keys <= q),
    "sliding_window": ({"window": 6}, None, lambda q: (q - keys <= 6) & (keys <= q)),
    "two_sided_window": ({"left": 6, "right": 3}, None, lambda q: (q - keys <= 6) & (keys - q <= 3)),
    "chunked_local": ({"chunk": 7}, None, lambda q: (keys <= q) & (keys >= q - q % 7)),
    "soft_cap": ({"cap": 3.0}, lambda x, q, h: 3 * np.tanh(x / 3), lambda q: keys <= q),
    "alibi": ({"slopes": SLOPES}, lambda x, q, h: x - SLOPES[h] * (q - keys), lambda q: keys <= q),
    "attention_sink": ({"sink": SLOPES}, None, lambda q: keys <= q),
    "sink_window": ({"sink": 4, "window": 5}, None, lambda q: ((keys < 4) | (keys >= q - 5)) & (keys <= q)),
    "custom_mask": (packed(VISIBLE, 13), None, lambda q: VISIBLE[q - CONTEXT]),
    "tree_mask": (packed(TREE, 5), None, lambda q: tree_visible(q - CONTEXT)),
    "logit_bias": ({"bias": BIAS}, lambda x, q, h: x + BIAS[h, q - CONTEXT], lambda q: keys <= q),
    "sigmoid_attention": ({"bias": -1.0}, lambda x, q, h: 1 / (1 + np.exp(1 - x)), lambda q: keys <= q),
    "qk_norm": ({"q_weight": WEIGHTS[0], "k_weight": WEIGHTS[1], "eps": 0.01}, None, lambda q: keys <= q),
    "rope": ({"inv_freq": INV_FREQ, "magnitude": 1.1}, None, lambda q: keys <= q),
    "rope_interleaved": ({"inv_freq": INV_FREQ, "magnitude": 1.1}, None, lambda q: keys <= q),
    "rope_by_length": (
        {"short": INV_FREQ[::-1], "long": INV_FREQ, "limit": KV_LEN - 1, "magnitude": 1.0},
        None,
        lambda q: keys <= q,
    ),
    "streaming": (
        {"sink": 4, "window": 5, "inv_freq": INV_FREQ},
        None,
        lambda q: ((keys < 4) | (keys >= q - 5)) & (keys <= q),
    ),
}


def normed(x, weight):
    return x / np.sqrt((x**2).mean() + 0.01) * weight


def turned(x, position, *, apart=HEAD_DIM // 2):
    """Pairs of channels `apart` as complex numbers."""
    pairs = x.reshape(-1, 2, apart)
    z = (pairs[:, 0] + 1j * pairs[:, 1]).ravel() * np.exp(1j * position * INV_FREQ.astype(np.float64))
    return np.stack([z.real, z.imag]).reshape(2, -1, apart).swapaxes(0, 1).ravel()


def place(position):
    """In what `streaming` sees of KV_LEN keys: 4 sinks and 6 more."""
    return position if position < 4 else position - (KV_LEN - 10)


# name -> what becomes of a query's head at a position, and of a key's
ELEMENTS = {
    "qk_norm": (lambda x, pos: normed(x, WEIGHTS[0]), lambda x, pos: normed(x, WEIGHTS[1])),
    "rope": (lambda x, pos: turned(x, pos) * 1.21, turned),
    "rope_interleaved": (
        lambda x, pos: turned(x, pos, apart=1) * 1.21,
        lambda x, pos: turned(x, pos, apart=1),
    ),
    "rope_by_length": (turned, turned),
    "streaming": (lambda x, pos: turned(x, place(pos)), lambda x, pos: turned(x, place(pos))),
}


def rows():
    for head in range(HEADS):
        for q_pos in range(CONTEXT, KV_LEN):
            yield At(batch=1, qo_head=head, kv_head=head // 2, q_pos=q_pos, q_len=Q_LEN, kv_len=KV_LEN)


def inside(band, q_pos):
    """What executors test of a band."""
    seen = (keys <= q_pos + band.window_right) if band.window_right >= 0 else keys >= 0
    return seen & (q_pos - keys <= band.window_left) if band.window_left >= 0 and band.num_sink == 0 else seen


def test_every_one_is_here():
    assert CASES.keys() == variant.STANDARD.keys()
    assert all(getattr(variant, name) is v for name, v in variant.STANDARD.items())


@pytest.mark.parametrize("name", CASES)
def test_generated_code(name):
    parameters, change, visible = CASES[name]
    v = variant.STANDARD[name]
    bound = v.bind(**parameters)
    address = variant.cpu_functions(v)
    for at in rows():
        scores = RNG.standard_normal(KV_LEN).astype(np.float32) * 4
        got = logits(address, bound, at, scores)
        expected = scores if change is None else change(scores.astype(np.float64), at.q_pos, at.qo_head)
        # What generated code leaves to the plan's band is not hidden by it; nothing else may be missing.
        hidden = ~np.isfinite(got)
        assert (got[hidden] == -np.inf).all()
        np.testing.assert_array_equal(~hidden & inside(bound.band, at.q_pos), visible(at.q_pos))
        np.testing.assert_allclose(got[~hidden], expected[~hidden], rtol=1e-5, atol=1e-5)


def test_attention_sink_takes_its_share():
    """The output is that of a softmax with one logit more, whose value is zero."""
    bound = variant.attention_sink.bind(sink=SLOPES)
    address = variant.cpu_functions(variant.attention_sink)
    for at in rows():
        scores, values = RNG.standard_normal(KV_LEN), RNG.standard_normal((KV_LEN, 16))
        weights = np.exp(scores)
        o = weights @ values / weights.sum()
        expected = weights @ values / (weights.sum() + np.exp(SLOPES[at.qo_head]))
        np.testing.assert_allclose(output(address, bound, at, np.log(weights.sum()), o), expected, rtol=2e-5)
    np.testing.assert_array_equal(output(address, bound, at, -np.inf, np.zeros(3)), np.zeros(3))


@pytest.mark.parametrize("name", CASES)
def test_queries_and_keys(name):
    v = variant.STANDARD[name]
    bound, address = v.bind(**CASES[name][0]), variant.cpu_functions(v) if not v.is_plain else None
    if address is None:
        return
    query, key = ELEMENTS.get(name, (lambda x, pos: x,) * 2)
    for at in rows():
        x = RNG.standard_normal(HEAD_DIM).astype(np.float32)
        expected = query(x.astype(np.float64), at.q_pos)
        np.testing.assert_allclose(element(address, bound, at, x), expected, rtol=2e-6, atol=2e-6)
        for kv_pos in (0, 3, 4, CONTEXT + 1, KV_LEN - 1):
            expected = key(x.astype(np.float64), kv_pos)
            np.testing.assert_allclose(element(address, bound, at, x, kv_pos), expected, rtol=2e-6, atol=2e-6)


def test_angles_are_exact_far_away():
    """A float product of position and frequency would be off by 2^-5 radians here."""
    v = variant.rope
    bound, address = v.bind(inv_freq=INV_FREQ, magnitude=1.0), variant.cpu_functions(v)
    for pos in (131_071, 1_000_003, 2**24 - 1):
        x = RNG.standard_normal(HEAD_DIM).astype(np.float32)
        at = At(batch=0, qo_head=0, kv_head=0, q_pos=pos, q_len=1, kv_len=pos + 1)
        expected = turned(x.astype(np.float64), pos)
        np.testing.assert_allclose(element(address, bound, at, x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32", "uint8", "bool"])
def test_tables_of_every_dtype(dtype):
    """Strided, with extreme values."""
    numpy_type = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    table = np.array([0, 1, 1, 0, 1, 0, 1, 1]).astype(numpy_type)
    if "float" in dtype:
        table = np.array([0.1, -2.5, 6e-8, 65000, np.inf, -np.inf, 3e-5, -0.0], numpy_type)
    if dtype in ("int32", "uint8"):
        table = np.array([0, 1, 255, 127, 3, 4, 5, np.iinfo(dtype).max], numpy_type)
    spread = np.zeros((8, 3), numpy_type)
    spread[:, 1] = table
    v = variant.Variant(
        "v",
        logits=lambda t, kv_pos: variant.where(t[kv_pos], 1.0, 0.0) if dtype == "bool" else variant.to_float(t[kv_pos]),
        t=variant.tensor(1, dtype),
    )
    bound = v.bind(t=spread[:, 1])
    got = logits(variant.cpu_functions(v), bound, At(0, 0, 0, 0, 1, 8), np.zeros(8))
    np.testing.assert_allclose(got, table.astype(np.float32), rtol=1e-6)


def test_combined():
    v = variant.soft_cap & variant.logit_bias & variant.sink_window
    bound = v.bind(cap=2.0, bias=BIAS, sink=3, window=4)
    address = variant.cpu_functions(v)
    for at in rows():
        scores = RNG.standard_normal(KV_LEN).astype(np.float32)
        got = logits(address, bound, at, scores)
        q = at.q_pos
        seen = ((keys < 3) | (q - keys <= 4)) & (keys <= q)
        np.testing.assert_array_equal(np.isfinite(got) & inside(bound.band, q), seen)
        expected = 2 * np.tanh(scores / 2) + BIAS[at.qo_head, q - CONTEXT]
        np.testing.assert_allclose(got[seen], expected[seen], rtol=1e-5, atol=1e-5)
