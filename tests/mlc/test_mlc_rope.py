"""RoPE mode "normal": what is stored and attended to is what TVM's own rotation gives, for every scaling that it has right."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tvm
from mlc_model import TOLERANCE, Driver, attend, attention_kv_cache, check, to_numpy, to_tvm
from tvm.relax.frontend.nn.llm.position_embedding import llama_rope_with_position_map

from tvm_infer import errors
from tvm_infer.runtime import mlc_rope

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {"rope_type": "longrope", "max_position_embeddings": 64, "original_max_position_embeddings": 8}
FACTORS = np.concatenate([np.linspace(1.5, 9, 8), np.linspace(1, 2, 8)])  # long, short

CASES = {
    "plain": {},
    "theta": {"rope_theta": 500000.0},
    "scaled positions": {"rope_scale": 0.25},
    "half of the head": {"rotary_dim": 8},
    "llama3": {"rope_scaling": LLAMA3},
    "gptj": {"rope_scaling": {"rope_type": "gptj"}, "rotary_dim": 12},
    "longrope": {"rope_scaling": LONGROPE, "rope_ext_factors": FACTORS},
    "longrope without factors": {"rope_scaling": LONGROPE},
    "no rope_type": {"rope_scaling": {"factor": 4.0}},
}


def tvm_rotation(dtype="float32", rope_theta=1e4, rope_scale=1.0, rotary_dim=16, rope_scaling=None):
    """(qkv, positions) -> q, k, v by the kernel that TVM's cache would run."""
    made = llama_rope_with_position_map(rope_theta, rope_scale, 16, 4, 2, dtype, rope_scaling or {}, rotary_dim)
    f = tvm.compile(tvm.IRModule({"rope": made.with_attr("global_symbol", "rope")}), target="llvm")["rope"]

    def rotate(qkv, positions):
        out = [to_tvm(np.zeros((len(qkv), h, 16)), dtype) for h in (4, 2, 2)]
        f(to_tvm(qkv, dtype), tvm.runtime.tensor(np.asarray(positions, np.int32)), *out, 1)
        return [to_numpy(x) for x in out]

    return rotate


def run(d, rotate, steps):
    """Steps of the cache, whose outputs and stored keys are those of keys and queries that `rotate` turned."""
    for ids, lengths in steps:
        starts = [d.length(seq) for seq in ids]
        positions = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
        d.begin(ids, lengths)
        new, queries, outputs = [], [], []
        for layer in range(d.layers):
            qkv = d.random(sum(lengths), 8, 16)
            outputs.append(d.fused(layer, qkv, padding=2))
            q, k, v = rotate(qkv, positions)
            queries.append(q)
            new.append(np.stack([k, v]))
        d.end()
        for seq, (begin, end) in zip(ids, d.rows(lengths), strict=True):
            kv = np.stack(new)[:, :, begin:end]
            d.history[seq] = np.concatenate([d.history[seq], kv], axis=2)
        for layer, (q, o) in enumerate(zip(queries, outputs, strict=True)):
            check(o, d.whole(layer, ids, lengths, q), d.dtype, f"o of layer {layer}, {ids} + {lengths}")
    for seq, kv in d.history.items():
        k, v = d.get(seq, 0, d.length(seq))
        check(k, kv[:, 0], d.dtype, "stored keys")
        assert np.array_equal(v, kv[:, 1])


STEPS = [([0, 7], [5, 2]), ([7, 0], [1, 1]), ([7], [9]), ([0, 7], [3, 4])]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rotation_is_tvms(monkeypatch, name, dtype):
    monkeypatch.setitem(TOLERANCE, "float32", 2e-5)  # TVM's angles are float32
    settings = CASES[name]
    given = dict(settings)
    if "rope_ext_factors" in settings:
        given["rope_ext_factors"] = to_tvm(settings["rope_ext_factors"])
    d = Driver(dtype, rope_mode="normal", **given)
    d.add(0), d.add(7)
    is_longrope = settings.get("rope_scaling") is LONGROPE
    run(d, longrope_by_hand(settings) if is_longrope else tvm_rotation(dtype, **settings), STEPS)


def longrope_by_hand(settings):
    """TVM 0.27 cannot build its kernel for it. More than original_max_position_embeddings tokens in a step take the long factors."""
    all_factors = settings.get("rope_ext_factors", np.ones(16))
    p = settings["rope_scaling"]
    stretch = p["max_position_embeddings"] / p["original_max_position_embeddings"]
    magnitude = math.sqrt(1 + math.log(stretch) / math.log(p["original_max_position_embeddings"]))

    def rotate(qkv, positions):
        factors = np.split(all_factors, 2)[0 if len(qkv) > p["original_max_position_embeddings"] else 1]
        angles = np.asarray(positions)[:, None, None] / (1e4 ** (np.arange(8) / 8) * factors)
        return turned(qkv, magnitude * np.cos(angles), magnitude * np.sin(angles))

    return rotate


def turned(qkv, cos, sin):
    a, b = qkv[:, :6, :8], qkv[:, :6, 8:]
    qk = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)
    return qk[:, :4], qk[:, 4:], qkv[:, 6:]


def test_yarn():
    """By the paper (arXiv 2309.00071, section 3.2), without a rounded ramp and without a factor on cosines: what TVM means to do. Its
    kernel takes the ramp of the second half of a head from beyond the first one's, which turns no pair by one angle."""
    scaling = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 4,
        "beta_slow": 1,
        "inv_theta_log_scale": 1 / (2 * math.log(1e4)),
    }
    plain = 1e4 ** -(np.arange(8) / 8)
    low, high = (16 * math.log(32 / (turns * 2 * math.pi)) / (2 * math.log(1e4)) for turns in (4, 1))
    ramp = np.clip((np.arange(8) - max(low, 0)) / (min(high, 15) - max(low, 0)), 0, 1)
    inv_freq = plain / 4 * ramp + plain * (1 - ramp)

    def rotate(qkv, positions):
        angles = np.asarray(positions)[:, None, None] * inv_freq
        return turned(qkv, np.cos(angles), np.sin(angles))

    d = Driver(rope_mode="normal", rope_scaling=scaling)
    d.add(0), d.add(7)
    run(d, rotate, STEPS)


def test_forks_and_pops_keep_positions():
    d = Driver(rope_mode="normal")
    rotate = tvm_rotation()
    d.add(0), d.add(7)
    run(d, rotate, STEPS[:2])
    d.fork(0, 1, 5), d.popn(7, 2), d.fork(7, 2)
    d.scale *= 0.5
    run(d, rotate, [([1, 2, 0], [2, 1, 1]), ([7, 2], [6, 1])])


def test_self_attention_is_not_rotated():
    """As in TVM: models of the fine-grained calls rotate themselves."""
    d = Driver(rope_mode="normal")
    d.add(0)
    d.begin([0], [3])
    q, k, v = d.random(3, 4, 16), d.random(3, 2, 16), d.random(3, 2, 16)
    o, lse = to_tvm(np.zeros((3, 4, 16))), to_tvm(np.zeros((3, 4)))
    attention_kv_cache("self_attention", d.cache, 0, d.scale, *(to_tvm(x) for x in (q, k, v)), o, lse)
    expected, _ = attend(q, k, v, d.scale, np.tri(3, dtype=bool))
    check(to_numpy(o), expected, "float32", "o")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rotary_dim": 7}, "`rotary_dim` is 7; it must be even, from 2 to head_dim = 16"),
        ({"rotary_dim": 18}, "`rotary_dim` is 18"),
        ({"rope_scaling": {"rope_type": "llama4", "factor": 8.0}}, "rope_type 'llama4'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
        ({"rope_theta": 0.0}, "`theta` is 0.0"),
        ({"rope_scaling": LONGROPE, "rope_ext_factors": to_tvm(np.ones(4))}, r"`rope_ext_factors` has shape \[4\]"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(errors.ArgumentError, match=message):
        Driver(**{"rope_mode": "normal", **settings})


def test_a_scaling_that_is_no_json():
    for text in ("{", "[1]"):
        with pytest.raises(errors.ArgumentError, match="`rope_scaling` is"):
            mlc_rope.rope_tables(16, 1e4, 1.0, text, None)
    assert json.loads("null") is None
    assert mlc_rope.rope_tables(16, 1e4, 1.0, "null", None)[3] == 0
