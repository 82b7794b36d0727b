"""Small random Llamas, and transformers' answers for them."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(
    *, num_qo_heads=6, num_kv_heads=2, tied=True, layers=2, seed=0, vocab_size=131, head_dim=16, hidden_size=48
):
    """Hidden is not heads * head_dim, so that a mix-up of the two shows."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=num_qo_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # initial weights are so small that every token is nearly equally likely
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(8)
    return model


def hf_logits(model, tokens):
    """[len(tokens), vocab_size]."""
    with torch.inference_mode():
        return model(torch.tensor([list(tokens)])).logits[0].numpy()


def hf_greedy(model, prompt, max_new_tokens, stop_tokens=()):
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        tokens.append(int(hf_logits(model, tokens)[-1].argmax()))
        if tokens[-1] in stop_tokens:
            break
    return tokens[len(prompt) :]


def prompts_of(count, vocab_size=131, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, size).tolist() for size in rng.integers(1, 40, count)]
