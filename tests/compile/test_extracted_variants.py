"""Models whose attention is no plain one, compiled as they are: the pass extracts it, the cache gets it, the logits are the model's."""

from __future__ import annotations

import numpy as np
import pytest
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
