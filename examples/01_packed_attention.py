"""Attention over a paged KV cache by packed functions, step by step, and the same numbers from torch.

    python examples/01_packed_attention.py [--plot plan.png]

Six requests of different lengths decode one token each, and one request brings a prompt of 100 tokens: one batch, one plan, one call.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

import tvm_infer
from tvm_infer.runtime import PagedKVCache

NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", metavar="FILE.png", help="draw the load of each CTA (needs tvm_infer[plot])")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)

    # 1. A cache: pages of 16 tokens, shared by all sequences.
    cache = PagedKVCache(
        num_layers=1,
        num_qo_heads=NUM_QO_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        page_size=16,
        num_pages=256,
        max_batch=8,
        max_tokens=2048,
    )
    history = {0: 5, 1: 700, 2: 64, 3: 1500, 4: 333, 5: 16, 6: 0}
    dense = {}
    for seq_id, length in history.items():
        cache.add_sequence(seq_id)
        dense[seq_id] = [rng.standard_normal((length, NUM_KV_HEADS, HEAD_DIM), dtype=np.float32) for _ in "kv"]
        if length:
            with cache.forward([seq_id], [length]):
                q = np.zeros((length, NUM_QO_HEADS, HEAD_DIM), np.float32)
                cache.attention(0, q, *dense[seq_id])
    print(cache)

    # 2. One step for everybody: six decode, one prefills. Lengths become a plan, once for all layers.
    append_lengths = [1, 1, 1, 1, 1, 1, 100]
    num_tokens = sum(append_lengths)
    q = rng.standard_normal((num_tokens, NUM_QO_HEADS, HEAD_DIM), dtype=np.float32)
    k, v = (rng.standard_normal((num_tokens, NUM_KV_HEADS, HEAD_DIM), dtype=np.float32) for _ in "kv")
    with cache.forward(list(history), append_lengths):
        o = cache.attention(0, q, k, v)
    print("one step,", num_tokens, "tokens of", len(history), "requests ->", o.shape)

    # 3. The same batch planned by hand for eight CTAs: who computes what, and what is split and merged.
    qo_indptr = np.concatenate([[0], np.cumsum(append_lengths)]).astype(np.int32)
    kv_len = np.asarray([h + n for h, n in zip(history.values(), append_lengths, strict=True)], np.int32)
    plan = tvm_infer.plan(
        qo_indptr, kv_len, num_qo_heads=NUM_QO_HEADS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, num_ctas=8
    )
    print(plan)
    if arguments.plot:
        plan.plot(arguments.plot)
        print("wrote", arguments.plot)

    # 4. torch, one request at a time, on dense keys.
    worst = 0.0
    for r, seq_id in enumerate(history):
        rows = slice(qo_indptr[r], qo_indptr[r + 1])
        keys, values = (
            torch.from_numpy(np.concatenate([old, new[rows]])) for old, new in zip(dense[seq_id], (k, v), strict=True)
        )
        n, length = append_lengths[r], int(kv_len[r])
        mask = torch.ones(n, length, dtype=torch.bool).tril(length - n)
        expected = torch.nn.functional.scaled_dot_product_attention(
            torch.from_numpy(q[rows]).transpose(0, 1),
            keys.transpose(0, 1),
            values.transpose(0, 1),
            attn_mask=mask,
            enable_gqa=True,
        ).transpose(0, 1)
        worst = max(worst, float((torch.from_numpy(o[rows]) - expected).abs().max()))
    print(f"largest difference from torch: {worst:.1e}")
    assert worst < 1e-5


if __name__ == "__main__":
    main()
