"""Compile a PyTorch model of your own: attention in plain torch goes in, an executable over a paged KV cache comes out.

    python examples/02_compile_torch_model.py

The model is written for one row of tokens. After compiling, a step takes tokens of many sequences at once.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import tvm_infer

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 300, 128, 4, 2, 32


class Block(nn.Module):
    """Attention with grouped heads and a position term, then a small MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, HIDDEN)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).view(1, -1, HEADS + 2 * KV_HEADS, HEAD_DIM).transpose(1, 2)
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        o = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(o.transpose(1, 2).reshape(1, -1, HEADS * HEAD_DIM))
        return x + self.mlp(x)


class Model(nn.Module):
    """input_ids [1, n], position_ids [1, n] -> logits [1, n, VOCAB]."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(512, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids) + self.positions(position_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    model = Model().eval()

    # 1. Export with a symbolic number of tokens, and compile.
    n = torch.export.Dim("n", min=2, max=512)
    ids = torch.zeros(1, 7, dtype=torch.int64)
    program = torch.export.export(model, (ids, ids.clone()), dynamic_shapes=({1: n}, {1: n}))
    executable = tvm_infer.compile(program)
    print(executable.explain())

    # 2. Two sequences in one cache: one step prefills both, the next decodes both.
    cache = executable.new_cache(num_pages=64)
    prompts = {10: [1, 2, 3, 4, 5], 11: [7, 8, 9]}
    for seq_id in prompts:
        cache.add_sequence(seq_id)
    logits = executable.step(cache, list(prompts.items()))
    chosen = logits.argmax(axis=-1)
    logits = executable.step(cache, [(seq_id, [int(t)]) for seq_id, t in zip(prompts, chosen, strict=True)])

    # 3. The same from torch, one sequence at a time, everything recomputed.
    for row, (prompt, token) in enumerate(zip(prompts.values(), chosen, strict=True)):
        text = torch.tensor([[*prompt, int(token)]])
        with torch.no_grad():
            expected = model(text, torch.arange(text.shape[1])[None])[0, -1].numpy()
        difference = np.abs(logits[row] - expected).max()
        print(f"sequence {row}: largest difference from torch {difference:.1e}")
        assert difference < 1e-4


if __name__ == "__main__":
    main()
