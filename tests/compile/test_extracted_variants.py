"""Models whose attention is no plain one, compiled as they are: the pass extracts it, the cache gets it, the logits are the model's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from llamas import hf_logits
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from variant_models import MODELS, VOCABULARY, decoder, exported, logits64

import tvm_infer

LENGTHS = (23, 1, 9)


def check(model, executable, *, tolerance=1e-4, page_size=4):
    """Prompts in pieces, a mixture of prefill and decode, then decodes: every row against the model in float64, alone."""
    rng = np.random.default_rng(5)
    texts = [rng.integers(0, VOCABULARY, n + 8).tolist() for n in LENGTHS]
    expected = [logits64(model, text) for text in texts]
    scale = max(np.abs(x).max() for x in expected)
    cache = executable.new_cache(num_pages=40, page_size=page_size)
    for seq in range(len(texts)):
        cache.add_sequence(seq)
    done = [0, 0, 0]

    def step(*counts):
        batch = [(seq, texts[seq][done[seq] : done[seq] + n]) for seq, n in enumerate(counts) if n]
        logits = executable.step(cache, batch, rows=range(sum(counts)))
        rows = [expected[seq][done[seq] : done[seq] + n] for seq, n in enumerate(counts)]
        np.testing.assert_allclose(logits / scale, np.concatenate(rows) / scale, atol=tolerance)
        for seq, n in enumerate(counts):
            done[seq] += n

    step(13, 1, 0)
    step(10, 1, 9)
    for _ in range(5):
        step(1, 1, 1)
    step(1, 0, 2)
    return cache


@pytest.mark.parametrize("attention", MODELS, ids=lambda attention: attention.__name__)
def test_the_logits_are_the_models(attention):
    model = decoder(attention)
    executable = tvm_infer.compile(exported(model), max_tokens=64)
    assert any(spec.variant is not None for spec in executable.manifest.layers)
    check(model, executable)


def hf_check(model, executable):
    rng = np.random.default_rng(6)
    a, b = (rng.integers(0, model.config.vocab_size, n).tolist() for n in (21, 5))
    cache = executable.new_cache(num_pages=32, page_size=4)
    cache.add_sequence(0), cache.add_sequence(1)
    logits = executable.step(cache, [(0, a[:14]), (1, b[:2])], rows=range(16))
    expected = [hf_logits(model, a), hf_logits(model, b)]
    np.testing.assert_allclose(logits, np.concatenate([expected[0][:14], expected[1][:2]]), atol=3e-4)
    mixed = executable.step(cache, [(1, b[2:3]), (0, a[14:])], rows=range(8))
    np.testing.assert_allclose(mixed, np.concatenate([expected[1][2:3], expected[0][14:]]), atol=3e-4)
    np.testing.assert_allclose(executable.step(cache, [(1, b[3:])])[0], expected[1][4], atol=3e-4)


SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    attn_implementation="eager",
)


class Dense(torch.nn.Module):
    """In place of GPT-OSS's experts, which torch does not export."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(32, 32)

    def forward(self, x):
        return torch.tanh(self.linear(x)), None


def gemma2():
    return Gemma2ForCausalLM(
        Gemma2Config(**SIZES, sliding_window=6, attn_logit_softcapping=3.0, query_pre_attn_scalar=24)
    )


def gpt_oss():
    layers = ["sliding_attention", "full_attention"]
    model = GptOssForCausalLM(
        GptOssConfig(**SIZES, sliding_window=6, layer_types=layers, num_local_experts=2, num_experts_per_tok=1)
    )
    for layer in model.model.layers:
        layer.mlp = Dense()
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def mistral():
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6))


@pytest.mark.parametrize("make, windows", [(gemma2, [5, -1]), (gpt_oss, [5, -1]), (mistral, [5, 5])])
def test_models_of_transformers(make, windows):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(8)
    executable = tvm_infer.compile(model, max_tokens=32)
    assert [-1 if s.variant is None else s.variant.band.window_left for s in executable.manifest.layers] == windows
    hf_check(model, executable)


@pytest.mark.parametrize("make", [mistral, gpt_oss])
def test_16_bit_models(make):
    """Sinks of 16 bits are read as they are. The error is at most twice what torch loses in the same type."""
    torch.manual_seed(0)
    model = make().eval()
    for p in model.parameters():  # weights alone: rounded frequencies would turn positions by degrees
        p.data = (p.data * 8 if p.ndim == 2 else p.data).to(torch.float16)
    executable = tvm_infer.compile(model, max_tokens=32)
    assert {spec.dtype for spec in executable.manifest.layers} == {"float16"}
    tokens = np.random.default_rng(7).integers(0, model.config.vocab_size, 29).tolist()
    cache = executable.new_cache(num_pages=16, page_size=4)
    cache.add_sequence(0)
    parts = [
        executable.step(cache, [(0, part)], rows=range(len(part))) for part in (tokens[:17], tokens[17:28], tokens[28:])
    ]
    with torch.inference_mode():
        low = model(torch.tensor([tokens])).logits[0].float().numpy()
    high = hf_logits(model.float(), tokens)
    assert np.linalg.norm(np.concatenate(parts) - high) <= 2 * np.linalg.norm(low - high)
