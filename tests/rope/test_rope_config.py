"""RopeConfig: frequencies and magnitudes against transformers and TVM, what it refuses, hashing and JSON."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest

from tvm_infer import RopeConfig, errors

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.01 * i for i in range(48)],
    "long_factor": [1.5 + 0.7 * i for i in range(48)],
    "original_max_position_embeddings": 4096,
    "max_position_embeddings": 131072,
}
# rotary_dim, theta, scaling
CONFIGS = {
    "llama2": (128, 10000.0, None),
    "default": (64, 1e6, {"rope_type": "default"}),
    "linear": (128, 10000.0, {"type": "linear", "factor": 2.5}),
    "llama3": (128, 500000.0, LLAMA3),
    "llama3 small": (64, 500000.0, {**LLAMA3, "factor": 32.0}),
    "yarn": (128, 1e6, YARN),
    "yarn betas": (64, 10000.0, {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False}),
    "yarn factor": (128, 1e6, {**YARN, "attention_factor": 0.75}),
    "yarn deepseek": (64, 10000.0, {**YARN, "factor": 40, "mscale": 1.0, "mscale_all_dim": 0.5}),
    "yarn step": (32, 1e9, {**YARN, "original_max_position_embeddings": 64, "beta_fast": 4, "beta_slow": 3.9}),
    "longrope": (96, 10000.0, LONGROPE),
}


def config(name: str, **changes) -> RopeConfig:
    dim, theta, scaling = CONFIGS[name]
    return RopeConfig(dim, theta, scaling=scaling, **changes)


def hugging_face(name: str, seq_len: int | None) -> tuple[np.ndarray, float]:
    """transformers' own inv_freq and attention factor."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    dim, theta, scaling = CONFIGS[name]
    parameters = {"rope_type": "default", "rope_theta": theta, **(scaling or {})}
    parameters["rope_type"] = parameters.pop("type", parameters["rope_type"])
    length = int(parameters.pop("max_position_embeddings", 131072))
    made = transformers.LlamaConfig(
        hidden_size=4 * dim,
        num_attention_heads=4,
        head_dim=dim,
        max_position_embeddings=length,
        rope_parameters=parameters,
    )
    if parameters["rope_type"] == "default":
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        inv_freq, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(made)
    else:
        inv_freq, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](made, "cpu", seq_len=seq_len)
    return inv_freq.numpy(), factor


@pytest.mark.parametrize("seq_len", [None, 4096, 100000])
@pytest.mark.parametrize("name", CONFIGS)
def test_frequencies_are_those_of_transformers(name, seq_len):
    expected, factor = hugging_face(name, seq_len)
    got = config(name).inv_freq(seq_len)
    assert got.dtype == np.float32 and got.shape == (CONFIGS[name][0] // 2,)
    # transformers computes in float32: a power, a division and a blend
    np.testing.assert_allclose(got, expected, rtol=2e-6)
    assert config(name).magnitude() == pytest.approx(factor, rel=1e-12)


def tvm_frequencies(name: str) -> np.ndarray:
    """What TVM's own functions compute for position 1, pair by pair."""
    tvm = pytest.importorskip("tvm")
    from tvm import te, tirx
    from tvm.relax.frontend.nn.llm import position_embedding

    dim, theta, scaling = CONFIGS[name]
    scaling = dict(scaling or {})
    if scaling.get("rope_type") == "yarn":
        scaling = {"beta_fast": 32, "beta_slow": 1, "inv_theta_log_scale": 1 / (2 * math.log(theta)), **scaling}
    function = position_embedding.switch_rope_freq_func(scaling)
    more = {}
    factors = te.placeholder((dim // 2,), "float32")
    if scaling.get("rope_type") == "longrope":
        more = {"ext_factors": factors}

    def value(d):
        *_, variables = function(tirx.const(1.0, "float32"), d, dim, theta, "float32", **more)
        (first, *rest) = variables
        expression = variables[first]
        for variable in rest:
            expression = tirx.Let(variable, variables[variable], expression)
        return expression

    result = te.compute((dim // 2,), value)
    out = tvm.runtime.tensor(np.zeros(dim // 2, np.float32))
    ext = tvm.runtime.tensor(np.asarray(scaling.get("long_factor", np.ones(dim // 2)), np.float32))
    tvm.compile(te.create_prim_func([factors, result]), target="llvm")(ext, out)
    return out.numpy()


@pytest.mark.parametrize("name", ["llama2", "llama3", "llama3 small", "yarn betas", "longrope"])
def test_frequencies_are_those_of_tvm(name):
    """Of YaRN TVM has the form without truncation, and no magnitude."""
    np.testing.assert_allclose(config(name).inv_freq(100000), tvm_frequencies(name), rtol=3e-6)
    if name == "longrope":  # math as in rope_freq_longrope
        assert config(name).magnitude() == math.sqrt(1 + math.log(32) / math.log(4096))


def test_definition_and_scale():
    np.testing.assert_array_equal(RopeConfig(4, 100.0).inv_freq(), np.float32([1.0, 0.1]))
    np.testing.assert_array_equal(RopeConfig(4, 100.0, 0.5).inv_freq(), np.float32([0.5, 0.05]))
    assert RopeConfig(0).inv_freq().shape == (0,) and RopeConfig(0).magnitude() == 1.0
    interleaved = RopeConfig(64, scaling={"rope_type": "gptj"})
    assert interleaved == RopeConfig(64, interleaved=True) and interleaved.rope_type == "default"


@pytest.mark.parametrize("name", CONFIGS)
def test_hash_json_and_pickle(name):
    one = config(name, interleaved=True)
    again = RopeConfig.from_dict(json.loads(json.dumps(one.to_dict())))
    assert one == again and hash(one) == hash(again) and {one: 1}[again] == 1
    assert pickle.loads(pickle.dumps(one)) == one
    assert one != config(name)
    np.testing.assert_array_equal(one.inv_freq(), again.inv_freq())


def test_spellings_of_one_configuration():
    old = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attention_factor": None}
    assert RopeConfig(128, 1e6, scaling=old) == RopeConfig(128, 1e6, scaling={**YARN, "rope_theta": 1e6})
    assert RopeConfig(96, scaling={**LONGROPE, "rope_type": "su"}) == RopeConfig(96, scaling=LONGROPE)
    assert RopeConfig(96, scaling={"rope_type": "default"}) == RopeConfig(96)


WRONG = [
    ({"rotary_dim": 7}, "`rotary_dim` is 7"),
    ({"rotary_dim": -2}, "`rotary_dim` is -2"),
    ({"rotary_dim": True}, "`rotary_dim` is True"),
    ({"rotary_dim": 64.0}, r"`rotary_dim` is 64\.0"),
    ({"theta": 0}, "`theta` is 0"),
    ({"theta": math.nan}, "`theta` is nan"),
    ({"theta": "1e4"}, "`theta` is '1e4'"),
    ({"scale": -1.0}, r"`scale` is -1\.0"),
    ({"scaling": "linear"}, "`scaling` is a str"),
    ({"scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'; supported are 'default', 'linear'"),
    ({"scaling": {"rope_type": "linear"}}, "'linear' lacks factor"),
    ({"scaling": {"rope_type": "linear", "factor": 0.0}}, r"`factor` is 0\.0"),
    ({"scaling": {"rope_type": "default", "mrope_section": (16, 24, 24)}}, r"has mrope_section \(16, 24, 24\)"),
    ({"scaling": {**LLAMA3, "high_freq_factor": 1.0}}, r"`high_freq_factor` is 1\.0.*above low_freq_factor, 1\.0"),
    ({"scaling": {**LLAMA3, "original_max_position_embeddings": 0.5}}, r"embeddings` is 0\.5.*whole number"),
    ({"scaling": {**YARN, "beta_fast": -1}}, "`beta_fast` is -1"),
    ({"scaling": YARN, "theta": 1.0}, r"`theta` is 1\.0.*yarn.*above 1"),
    ({"scaling": {"rope_type": "yarn", "original_max_position_embeddings": 9}}, "'yarn' lacks factor; give it, or max"),
    ({"scaling": {**LLAMA3, "rope_theta": 5e5}}, r"rope_theta 500000\.0, `theta` is 10000\.0"),
    ({"scaling": LONGROPE}, "`short_factor` has 48 entries.*= 64 factors"),
    ({"scaling": {**LONGROPE, "short_factor": 2.0}}, "`short_factor` is a float"),
    ({"scaling": {**LONGROPE, "short_factor": [1.0] * 63 + [0.0]}}, r"`short_factor\[63\]` is 0\.0"),
]


@pytest.mark.parametrize(("changes", "words"), WRONG, ids=[row[1] for row in WRONG])
def test_refusals_name_the_value(changes, words):
    with pytest.raises(errors.ArgumentError, match=words):
        RopeConfig(**{"rotary_dim": 128, **changes})


def test_from_dict_names_its_keys():
    with pytest.raises(errors.ArgumentError, match=r"keys \['base', 'rotary_dim'\].*'theta'"):
        RopeConfig.from_dict({"rotary_dim": 64, "base": 1})
    with pytest.raises(errors.ArgumentError, match="must be rotary_dim and any of"):
        RopeConfig.from_dict({"theta": 1e4})


def test_import_is_light():
    code = "import sys, tvm_infer.rope; print([m for m in ('tvm', 'tvm_ffi', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
