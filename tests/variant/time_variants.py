"""Times of decode and prefill on this machine's processor, plain and with variants; run by hand."""

from __future__ import annotations

import time

import numpy as np

import tvm_infer
from tvm_infer import variant
from tvm_infer.testing import make_paged_batch

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
BATCHES = {"decode b8 kv2048": ([1] * 8, [2048] * 8), "prefill 1x512": ([512], [512])}
VARIANTS = {
    "plain": variant.causal,
    "soft_cap": variant.soft_cap.bind(cap=30.0),
    "alibi": variant.alibi.bind(slopes=(2.0 ** -np.arange(1, HEADS + 1)).astype(np.float32)),
    "attention_sink": variant.attention_sink.bind(sink=np.ones(HEADS, np.float32)),
}
ROUNDS = 15


def main() -> None:
    """The variants take turns, so that a machine that is busy for a while slows all of them; medians in ms."""
    print(tvm_infer._ffi.func("cpu_info")())
    for name, (qo_lens, kv_lens) in BATCHES.items():
        sizes = {"num_qo_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
        batch = make_paged_batch(qo_lens, kv_lens, page_size=16, dtype="bfloat16", **sizes)
        out = np.empty_like(batch.q)
        plans = {
            v: tvm_infer.plan(batch.qo_indptr, batch.kv_len, dtype="bfloat16", variant=bound, **sizes)
            for v, bound in VARIANTS.items()
        }
        times: dict[str, list[float]] = {v: [] for v in VARIANTS}
        for _ in range(ROUNDS):
            for v, bound in VARIANTS.items():
                start = time.perf_counter()
                tvm_infer.attention(batch.q, batch.kv_cache, plans[v], out=out, variant=bound, **batch.tables)
                times[v].append(time.perf_counter() - start)
        medians = {v: 1e3 * float(np.median(seconds)) for v, seconds in times.items()}
        print(name, ", ".join(f"{v} {ms:.2f} ms ({ms / medians['plain']:.2f} ×)" for v, ms in medians.items()))


if __name__ == "__main__":
    main()
