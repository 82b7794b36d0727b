"""Models whose attention the pass extracts, on the GPU, beside torch: decoders in plain torch (tests/compile/variant_models.py), and of
transformers Gemma 2, GPT-OSS (its experts left out) and Mistral, where that is installed.

Needs TVM with its compiler. The models are small and random.
"""

from __future__ import annotations

import copy
import importlib.util
import pathlib
import sys

import numpy as np
import pytest
import torch

import tvm_infer

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "compile"))
import variant_models

if importlib.util.find_spec("transformers") is not None:
    import transformers

pytestmark = pytest.mark.family("compiled_model")

WIDTH, WINDOW = 256, 24  # a window of transformers: keys that a query sees, its own among them
SIZES = {
    "vocab_size": 512,
    "hidden_size": WIDTH,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "sliding_window": WINDOW,
    "attn_implementation": "eager",
}


class Dense(torch.nn.Module):
    """In place of GPT-OSS's experts, which torch does not export."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.tanh(self.linear(x)), None


def gemma2(head_dim):
    config = transformers.Gemma2Config(
        **SIZES, head_dim=head_dim, attn_logit_softcapping=5.0, query_pre_attn_scalar=head_dim
    )
    return transformers.Gemma2ForCausalLM(config)


def gpt_oss(head_dim):
    layers = ["sliding_attention", "full_attention"] * 2
    config = transformers.GptOssConfig(**SIZES, head_dim=head_dim, layer_types=layers, num_local_experts=2)
    model = transformers.GptOssForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp = Dense()
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def mistral(head_dim):
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, head_dim=head_dim))


def rounded(model):
    """Weights of 16 bits that tell tokens apart; buffers stay as they are: rounded frequencies would turn late positions by degrees."""
    for p in model.parameters():
        p.data = (p.data * 4 if p.ndim == 2 else p.data).to(torch.bfloat16)
    return model.eval()


def hf_logits(model, text):
    with torch.inference_mode():
        return model(torch.tensor([text], device="cuda")).logits[0].double().cpu()


def plain_logits(model, text):
    with torch.inference_mode(), torch.device("cuda"):
        return model(torch.tensor([text]), torch.arange(len(text))[None])[0].double().cpu()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("make", [gemma2, gpt_oss, mistral])
def test_models_of_transformers(cuda, make, head_dim):
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    torch.manual_seed(0)
    low = rounded(make(head_dim))
    check(low, low, copy.deepcopy(low).float(), hf_logits, 512)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("attention", variant_models.MODELS, ids=lambda attention: attention.__name__)
def test_plain_decoders(cuda, attention, head_dim, monkeypatch):
    for name, value in (("WIDTH", WIDTH), ("DIM", head_dim), ("WINDOW", WINDOW)):
        monkeypatch.setattr(variant_models, name, value)
    frequencies = torch.tensor([2.0 ** -(k % 12) for k in range(head_dim // 2)])
    monkeypatch.setattr(variant_models, "INV_FREQ", frequencies)
    high = variant_models.decoder(attention)
    for p in high.parameters():
        p.data = p.data.bfloat16().float()
    low = copy.deepcopy(high).bfloat16()
    program = variant_models.exported(low)
    monkeypatch.setattr(variant_models, "INV_FREQ", frequencies.cuda())
    check(program, low, high, plain_logits, variant_models.VOCABULARY)


def check(source, low, high, logits_of, vocabulary):
    """‖ours - float32‖ is at most twice what torch's bfloat16 loses: prompts in pieces, then decode steps by graphs."""
    executable = tvm_infer.compile(source, target="cuda", max_tokens=128, max_batch=4)
    assert any(spec.variant is not None for spec in executable.manifest.layers)
    low, high = low.cuda(), high.cuda()
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, vocabulary, n).tolist() for n in (101, 37, 3)]
    cache = executable.new_cache(num_pages=32)
    for seq in range(len(texts)):
        cache.add_sequence(seq)
    ours: list[list[torch.Tensor]] = [[], [], []]

    def step(batch):
        counts = [len(tokens) for _, tokens in batch]
        logits = torch.tensor(executable.step(cache, batch, rows=range(sum(counts)))).double()
        for (seq, _), rows in zip(batch, logits.split(counts), strict=True):
            ours[seq].append(rows)

    step([(0, texts[0][:61]), (1, texts[1][:1])])
    step([(0, texts[0][61:89]), (1, texts[1][1:25]), (2, texts[2][:1])])
    for i in range(12):
        batch = [(0, texts[0][89 + i : 90 + i]), (1, texts[1][25 + i : 26 + i])]
        step(batch)
    step([(2, texts[2][1:])])
    for seq, text in enumerate(texts):
        got, reference, torch16 = torch.cat(ours[seq]), logits_of(high, text), logits_of(low, text)
        assert (got - reference).norm() <= 2 * (torch16 - reference).norm()
