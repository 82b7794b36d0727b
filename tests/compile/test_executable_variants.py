"""A compiled model on a cache whose layers have variants: a causal Llama becomes a Mistral, whose window its export did not have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from llamas import hf_logits, prompts_of
from transformers import MistralConfig, MistralForCausalLM

from tvm_infer import errors, variant
from tvm_infer.runtime import Engine

WINDOW = 6  # of transformers: keys that a query sees, its own among them


def mistral(llama) -> MistralForCausalLM:
    """The same weights with a sliding window."""
    taken = {
        name: getattr(llama.config, name)
        for name in (
            "hidden_size intermediate_size vocab_size num_hidden_layers num_attention_heads num_key_value_heads head_dim rms_norm_eps "
            "max_position_embeddings tie_word_embeddings rope_parameters"
        ).split()
    }
    model = MistralForCausalLM(MistralConfig(**taken, sliding_window=WINDOW, attn_implementation="eager")).eval()
    model.load_state_dict(llama.state_dict())
    return model


def test_a_llama_with_a_window_is_a_mistral(llama, executable):
    expected_model = mistral(llama)
    cache = executable.new_cache(num_pages=64, page_size=4)
    cache.set_variant(variant.sliding_window.bind(window=WINDOW - 1))
    a, b = ((prompt * 20)[:25] for prompt in prompts_of(2, seed=4))
    for seq_id in (0, 1):
        cache.add_sequence(seq_id)
    logits = executable.step(cache, [(0, a), (1, b[:2])], rows=range(len(a)))
    expected = hf_logits(expected_model, a)
    np.testing.assert_allclose(logits, expected, atol=2e-4)
    assert np.abs(hf_logits(llama, a)[-1] - expected[-1]).max() > 1e-2  # the window shows
    mixed = executable.step(cache, [(1, b[2:]), (0, [9])])
    np.testing.assert_allclose(mixed[0], hf_logits(expected_model, b)[-1], atol=2e-4)
    np.testing.assert_allclose(mixed[1], hf_logits(expected_model, [*a, 9])[-1], atol=2e-4)


def test_layers_apart(executable):
    """A soft cap in one layer alone changes the logits; without it they are what they were."""
    prompt = prompts_of(1, seed=5)[0] + [1, 2]
    results = []
    for layers in ((), (0,), (0, 1)):
        cache = executable.new_cache(num_pages=16, page_size=4)
        if layers:
            cache.set_variant(variant.soft_cap.bind(cap=0.05), layers=layers)
        cache.add_sequence(0)
        results.append(torch.as_tensor(executable.step(cache, [(0, prompt)])[0]))
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(results) for b in results[:i])


def test_an_engine_runs_texts_longer_than_the_pool_of_a_windowed_cache(executable):
    """Five requests whose texts would need more pages than there are, and their samples: what a pool of any size gives."""

    def texts(num_pages):
        cache = executable.new_cache(num_pages=num_pages, page_size=4, max_tokens=16)
        cache.set_variant(variant.sliding_window.bind(window=WINDOW - 1))
        engine = Engine(executable, cache)
        prompts = [(prompt * 30)[:60] for prompt in prompts_of(5, seed=6)]
        generations = [engine.submit(prompt, max_new_tokens=20, n=1 + i % 2) for i, prompt in enumerate(prompts)]
        engine.run()
        assert cache.num_used_pages == 0
        return [[sample.tokens for sample in samples] for samples in generations]

    assert texts(16) == texts(400)
    cache = executable.new_cache(num_pages=16, page_size=4, max_tokens=16)
    with pytest.raises(errors.OutOfPagesError, match="need 20 pages"):
        Engine(executable, cache).submit([1] * 60, max_new_tokens=20)
