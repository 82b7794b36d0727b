"""A rewritten model on the PagedKVCache itself: pages, plans and the CPU executor, against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
import tvm
from tvm import relax

from tvm_infer.relax import RewritePagedAttention, export_hf
from tvm_infer.runtime import PagedKVCache


@pytest.mark.parametrize("heads, kv_heads", [(9, 3), (4, 1)], ids=["gqa", "mqa"])
def test_llama_on_the_paged_cache_equals_transformers(heads, kv_heads):
    """Prefill, a mixture of decode and prefill, a fork and decode of both branches, on pages of 4 tokens."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=heads * 16,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        vocab_size=97,
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    imported = export_hf(model, max_tokens=64)
    rewrite = RewritePagedAttention()
    mod = rewrite(imported.mod)
    cache = PagedKVCache.for_spec(
        rewrite.report.specs()[0],
        len(rewrite.report.matched),
        page_size=4,
        num_pages=32,
        max_batch=4,
        max_tokens=64,
    )
    # after the cache: it loads the library, whose functions the VM looks up when it is made
    vm = relax.VirtualMachine(tvm.compile(mod, target="llvm"), tvm.cpu())
    weights = [tvm.runtime.tensor(weight.numpy()) for weight in imported.weights.values()]
    rng = np.random.default_rng(1)
    tokens: dict[int, list[int]] = {}

    def step(counts: dict[int, int]) -> None:
        for seq, count in counts.items():
            tokens.setdefault(seq, []).extend(rng.integers(0, 97, count).tolist())
        ids = [token for seq, count in counts.items() for token in tokens[seq][-count:]]
        with cache.forward(list(counts), list(counts.values())) as run:
            logits = vm["main"](
                tvm.runtime.tensor(np.array([ids])),
                tvm.runtime.tensor(np.ascontiguousarray(run.query_positions)[None]),
                tvm.runtime.tensor(run.last_rows),
                cache,
                *weights,
            )[0].numpy()[0]
        for row, seq in zip(logits, counts, strict=True):
            with torch.no_grad():
                wanted = model(torch.tensor([tokens[seq]])).logits[0, -1].numpy()
            assert np.linalg.norm(row - wanted) / np.linalg.norm(wanted) <= 1e-5, seq

    cache.add_sequence(1)
    cache.add_sequence(2)
    step({1: 6, 2: 3})
    cache.add_sequence(3)
    step({2: 1, 3: 9, 1: 1})
    cache.fork_sequence(3, 4)
    tokens[4] = list(tokens[3])
    step({4: 1, 3: 1})  # both branches write into the shared last page
    cache.remove_sequence(2)
    step({1: 1, 4: 2, 3: 1})
    step({4: 1})
