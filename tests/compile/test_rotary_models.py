"""Models of transformers with rotary embedding of every kind: the attention call turns q and k, and the logits are the model's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from llamas import hf_logits

import tvm_infer

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 32}


def llama(rope):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rope_parameters=rope))


def qwen3():
    """Norms of q and k come before."""
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES))


def phi():
    """Half of a head turns; projections have biases."""
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"} | {"hidden_size": 64}
    return transformers.PhiForCausalLM(transformers.PhiConfig(**sizes, rope_parameters=rope))


def glm():
    """Neighbours are pairs, in half of a head."""
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    return transformers.GlmForCausalLM(transformers.GlmConfig(**SIZES, pad_token_id=0, rope_parameters=rope))


def gemma3():
    """Local layers turn at other frequencies than global ones."""
    layers = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(**SIZES, sliding_window=6, layer_types=layers, query_pre_attn_scalar=16)
    return transformers.Gemma3ForCausalLM(config)


MODELS = {
    "default": (
        lambda: llama({"rope_type": "default", "rope_theta": 500.0}),
        "half-split pairs of the first 16 elements",
    ),
    "llama3": (lambda: llama(LLAMA3), "half-split pairs of the first 16 elements"),
    "yarn": (lambda: llama(YARN), "half-split pairs of the first 16 elements"),
    "qwen3": (qwen3, "half-split pairs of the first 16 elements"),
    "phi": (phi, "half-split pairs of the first 8 elements"),
    "glm": (glm, "interleaved pairs of the first 8 elements"),
    "gemma3": (gemma3, "half-split pairs of the first 16 elements"),
}


def make(name):
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(8)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_prefill_decode_and_forks(name):
    """Prompts beyond the old context of llama3 and yarn, in chunks; then a fork, decoded on both sides."""
    model = make(name)
    executable = tvm_infer.compile(model, max_tokens=48)
    report = executable.report
    assert f"lifted: {MODELS[name][1]}" in report and "left in the model" not in report
    assert "fused_cos" not in report
    rng = np.random.default_rng(8)
    texts = {seq: rng.integers(0, 61, n).tolist() for seq, n in ((0, 70), (1, 3))}
    cache = executable.new_cache(num_pages=64, page_size=4)
    cache.add_sequence(0), cache.add_sequence(1)
    done = {0: 0, 1: 0}

    def step(**counts):
        counts = {int(seq[1:]): n for seq, n in counts.items()}
        logits = executable.step(cache, [(seq, texts[seq][done[seq] : done[seq] + n]) for seq, n in counts.items()])
        for row, (seq, n) in zip(logits, counts.items(), strict=True):
            done[seq] += n
            expected = hf_logits(model, texts[seq][: done[seq]])[-1]
            np.testing.assert_allclose(row, expected, atol=1e-4 * np.abs(expected).max())

    step(s0=41, s1=2)
    step(s0=27, s1=1)
    step(s0=1)
    cache.fork_sequence(0, 2)
    texts[2], done[2] = [*texts[0][:69], *rng.integers(0, 61, 4).tolist()], 69
    step(s2=3, s0=1)
    step(s2=1)


def test_frequencies_are_the_configuration_s():
    """What the pass reads out of the program's constants is what RopeConfig makes of the same parameters."""
    for rope in (LLAMA3, YARN):
        from tvm_infer.relax import RewritePagedAttention, export_hf
        from tvm_infer.relax.written import packed_arguments, packed_callee

        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        config = tvm_infer.RopeConfig(16, theta=500.0, scaling=scaling)
        mod = RewritePagedAttention()(export_hf(llama(rope)).mod)
        bindings = [binding for block in mod["main"].body.blocks for binding in block.bindings]
        calls = [b.value for b in bindings if packed_callee(b.value) == "tvm_infer.attention_with_kv_cache_rope"]
        assert len(calls) == 2
        arguments = packed_arguments(calls[0])
        np.testing.assert_allclose(arguments[5].value.numpy(), config.inv_freq(), rtol=2e-7)
        assert float(arguments[7].value) == pytest.approx(config.magnitude(), rel=1e-6)


def test_a_rewritten_module_compiles_as_it_is():
    """What the pass made, given to compile by its author."""
    from tvm_infer.relax import RewritePagedAttention, export_hf

    model = make("yarn")
    imported = export_hf(model)
    mod = RewritePagedAttention()(imported.mod)
    params = {name: weight.detach().numpy() for name, weight in imported.weights.items()}
    executable = tvm_infer.compile(mod, params=params, max_tokens=32)
    assert [spec.num_kv_heads for spec in executable.manifest.layers] == [2, 2]
    cache = executable.new_cache(num_pages=16, page_size=4)
    cache.add_sequence(0)
    tokens = [5, 9, 1, 33, 60, 2]
    expected = hf_logits(model, tokens)[-1]
    np.testing.assert_allclose(executable.step(cache, [(0, tokens)])[0], expected, atol=1e-4 * np.abs(expected).max())
