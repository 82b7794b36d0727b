"""PagedKVCache on a CUDA device: against float64 over histories that the test keeps, captured graphs, forks, padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tvm_infer
from tvm_infer import _ffi, variant

pytestmark = pytest.mark.family("kv_cache")


class Model:
    """Every sequence's keys and values, as they were given."""

    def __init__(self, num_layers):
        self.num_layers = num_layers
        self.history = {}

    def append(self, seq, layer, k, v):
        keys, values = self.history.setdefault(seq, [([], []) for _ in range(self.num_layers)])[layer]
        keys.append(k), values.append(v)

    def of(self, seq, layer):
        keys, values = self.history[seq][layer]
        return torch.cat(keys), torch.cat(values)

    def fork(self, parent, child, length):
        self.history[child] = [
            ([k[:length]], [v[:length]]) for k, v in (self.of(parent, x) for x in range(self.num_layers))
        ]


def reference(q, keys, values, position, scale):
    """float64 [heads, head_dim] of one query at `position`, which sees the keys up to itself."""
    group = q.shape[0] // keys.shape[1]
    k = keys[: position + 1].double().repeat_interleave(group, 1)
    v = values[: position + 1].double().repeat_interleave(group, 1)
    weights = torch.einsum("hd,khd->hk", q.double(), k).mul(scale).softmax(-1)
    return torch.einsum("hk,khd->hd", weights, v)


@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim", "page_size"),
    [
        ("bfloat16", (9, 3), 64, 16),
        ("float16", (8, 1), 128, 8),
        ("bfloat16", (32, 8), 128, 1),
        ("float16", (4, 4), 64, 64),
    ],
)
def test_steps_against_float64(cuda, dtype, heads, head_dim, page_size):
    """Prefill, decode, mixtures, forks at any position, removal; padding rows; pages that are free hold NaN."""
    rng = np.random.default_rng(page_size)
    torch.manual_seed(page_size)
    torch_dtype = getattr(torch, dtype)
    layers, (hq, hkv) = 3, heads
    cache = tvm_infer.PagedKVCache(
        num_layers=layers, num_qo_heads=hq, num_kv_heads=hkv, head_dim=head_dim, dtype=dtype, page_size=page_size,
        num_pages=4096 // page_size, max_batch=8, max_tokens=600, device="cuda",
    )  # fmt: skip
    for layer in range(layers):
        cache.pages(layer).fill_(float("nan"))
    model, live, next_id = Model(layers), [], 0
    worst = 0.0
    for step_number in range(14):
        if step_number % 3 == 0 or not live:
            cache.add_sequence(next_id), live.append(next_id)
            next_id += 1
        if step_number in (4, 5, 8, 11):
            parent = int(rng.choice([s for s in live if s in model.history]))
            length = int(rng.integers(1, cache.seq_len(parent) + 1))
            cache.fork_sequence(parent, next_id, length)
            model.fork(parent, next_id, length)
            live.append(next_id)
            next_id += 1
        if step_number == 9:
            gone = live.pop(0)
            cache.remove_sequence(gone), model.history.pop(gone)
        ids = list(rng.permutation(live))
        lengths = [1 if s in model.history and rng.random() < 0.6 else int(rng.integers(1, 90)) for s in ids]
        tokens, padding = sum(lengths), int(rng.integers(0, 9))
        with cache.forward(ids, lengths, num_rows=tokens + padding):
            positions = cache.query_positions.copy()
            assert np.array_equal(torch.from_dlpack(cache.position_ids)[0, :tokens].cpu(), positions)
            for layer in range(layers):
                qkv = torch.randn(tokens + padding, hq + 2 * hkv, head_dim, device="cuda", dtype=torch_dtype)
                qkv[tokens:] = float("nan")
                q, k, v = qkv.split([hq, hkv, hkv], dim=1)  # strided: parts of one projection
                out = torch.full((tokens + padding, hq, head_dim), float("nan"), device="cuda", dtype=torch_dtype)
                cache.attention(layer, q, k, v, out=out)
                assert not out[tokens:].any()
                row = 0
                for seq, length in zip(ids, lengths, strict=True):
                    model.append(seq, layer, k[row : row + length].clone(), v[row : row + length].clone())
                    row += length
                ends = np.cumsum(lengths)
                for t in rng.choice(tokens, min(tokens, 6), replace=False):
                    seq = ids[int(np.searchsorted(ends, t, side="right"))]
                    expected = reference(q[t], *model.of(seq, layer), int(positions[t]), head_dim**-0.5)
                    worst = max(worst, ((out[t].double() - expected).norm() / expected.norm()).item())
    assert worst < (4e-3 if dtype == "bfloat16" else 6e-4), worst
    for seq in live:
        for layer in range(layers):
            for mine, kept in zip(cache.gather(seq, layer), model.of(seq, layer), strict=True):
                assert torch.equal(mine, kept)


@pytest.mark.parametrize(("page_size", "window"), [(16, 70), (1, 33), (8, 200), (64, 10)])
def test_windows_give_back_pages_that_no_kernel_reads(cuda, page_size, window):
    """Texts of four times the pool, in chunks and one by one; what is free holds NaN before each layer."""
    torch.manual_seed(page_size)
    layers, hq, hkv, head_dim = 2, 8, 2, 64
    cache = tvm_infer.PagedKVCache(
        num_layers=layers, num_qo_heads=hq, num_kv_heads=hkv, head_dim=head_dim, dtype="bfloat16", page_size=page_size,
        num_pages=1024 // page_size, max_batch=2, max_tokens=200, device="cuda",
    )  # fmt: skip
    cache.set_variant(variant.sliding_window.bind(window=window))
    model, worst, position = Model(layers), 0.0, {0: 0, 1: 0}
    for seq in position:
        cache.add_sequence(seq)
    for lengths in [[100, 100], [1, 199], *([[1, 1]] * 40), *([[150, 50], [1, 1]] * 18), *([[1, 1]] * 90)]:
        n = sum(lengths)
        with cache.forward([0, 1], lengths):
            state = np.asarray(cache._call("debug_state"))
            free = torch.as_tensor(state[5 : 5 + state[4]], device="cuda")
            for layer in range(layers):
                cache.pages(layer)[free] = float("nan")
                q, k, v = (torch.randn(n, h, head_dim, device="cuda", dtype=torch.bfloat16) for h in (hq, hkv, hkv))
                out = cache.attention(layer, q, k, v)
                assert torch.isfinite(out).all()
                for seq, rows in ((0, slice(0, lengths[0])), (1, slice(lengths[0], n))):
                    model.append(seq, layer, k[rows], v[rows])
                for row, seq, place in ((0, 0, position[0]), (n - 1, 1, position[1] + lengths[1] - 1)):
                    keys, values = (x[max(0, place - window) :] for x in model.of(seq, layer))
                    expected = reference(q[row], keys, values, min(place, window), head_dim**-0.5)
                    worst = max(worst, ((out[row].double() - expected).norm() / expected.norm()).item())
        for seq, length in enumerate(lengths):
            position[seq] += length
    assert worst < 4e-3, worst
    assert cache.seq_len(0) + cache.seq_len(1) > 3600
    assert cache.num_used_pages <= 2 * ((window + 1 + page_size - 2) // page_size + 1)


def test_tokens_move_in_order(cuda):
    cache = tvm_infer.PagedKVCache(
        num_layers=3, num_qo_heads=8, num_kv_heads=4, head_dim=128, dtype="float16", num_pages=64, max_batch=1, max_tokens=400,
        device="cuda",
    )  # fmt: skip
    cache.add_sequence(0)
    with cache.forward([0], [400]) as step:
        for layer in range(3):
            step.attention(layer, *(torch.randn(400, h, 128, device="cuda", dtype=torch.float16) for h in (8, 4, 4)))
    before = [[x.clone() for x in cache.gather(0, layer)] for layer in range(3)]
    rng = np.random.default_rng(0)
    src, dst = rng.integers(0, 400, (2, 300))  # three launches; some tokens are moved on
    _ffi.func("kv_cache_move_tokens")(cache, [0] * 300, src.tolist(), dst.tolist())
    for layer, kept in enumerate(before):
        for mine, x in zip(cache.gather(0, layer), kept, strict=True):
            for a, b in zip(src, dst, strict=True):
                x[b] = x[a]
            assert torch.equal(mine, x)


def test_a_captured_step_is_replayed_with_the_next(cuda):
    """One graph of 8 rows serves steps of 3 to 8 sequences: begin_step brings plan, tables and positions to where it reads them."""
    torch.manual_seed(0)
    settings = dict(
        num_layers=2, num_qo_heads=8, num_kv_heads=2, head_dim=128, dtype="bfloat16", max_batch=8, max_tokens=256
    )
    graphed, eager = (tvm_infer.PagedKVCache(num_pages=200, device="cuda", **settings) for _ in range(2))
    q, k, v = (torch.randn(8, h, 128, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2))
    out, expected = torch.empty_like(q), torch.empty_like(q)
    prompt = [torch.randn(200, h, 128, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2)]
    for cache in (graphed, eager):
        for seq in range(8):
            cache.add_sequence(seq)
            with cache.forward([seq], [20 * seq + 7]) as step:
                for layer in range(2):
                    step.attention(layer, *(x[: 20 * seq + 7] for x in prompt))

    def layers(cache, o):
        for layer in range(2):
            cache.attention(layer, q, k, v, out=o)

    graph = None
    for count in (8, 3, 5, 8, 1):
        ids = list(range(count))
        q.normal_(), k.normal_(), v.normal_()
        out.fill_(float("nan")), expected.fill_(float("nan"))
        graphed.begin_step(ids, [1] * count, num_rows=8)
        eager.begin_step(ids, [1] * count, num_rows=8)
        if graph is None:
            layers(graphed, out)  # loads the kernels
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                layers(graphed, out)
            out.fill_(float("nan"))
        graph.replay()
        layers(eager, expected)
        torch.cuda.synchronize()
        assert torch.equal(out, expected) and not out[count:].any() and out[:count].any()
        graphed.end_forward(), eager.end_forward()


def test_memory_of_a_cache_is_given_back(cuda):
    settings = dict(
        num_layers=4, num_qo_heads=8, num_kv_heads=8, head_dim=128, dtype="float16", max_batch=4, max_tokens=64
    )
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    cache = tvm_infer.PagedKVCache(num_pages=4096, device="cuda", **settings)
    used = before - torch.cuda.mem_get_info()[0]
    assert 2**30 <= used < 2**30 + 2**26  # 4 layers x 4096 pages x 64 KiB
    del cache
    assert before - torch.cuda.mem_get_info()[0] < 2**24


def test_steps_of_the_host_ahead_of_the_device(cuda):
    """Plans pass through pinned buffers that events guard: 40 steps queued behind a slow kernel come out as one by one."""
    torch.manual_seed(1)
    settings = dict(
        num_layers=1, num_qo_heads=4, num_kv_heads=4, head_dim=64, dtype="float16", max_batch=2, max_tokens=8
    )
    results = []
    for ahead in (True, False):
        torch.manual_seed(2)
        cache = tvm_infer.PagedKVCache(num_pages=64, page_size=8, device="cuda", **settings)
        cache.add_sequence(0), cache.add_sequence(1)
        outs = []
        rows = [torch.randn(2, 12, 64, device="cuda", dtype=torch.float16) for _ in range(40)]
        if ahead:
            torch.cuda._sleep(40_000_000)  # about 20 ms
        for row in rows:
            with cache.forward([0, 1], [1, 1]) as step:
                outs.append(step.attention(0, *row.split(4, dim=1)))
            if not ahead:
                torch.cuda.synchronize()
        results.append(torch.stack(outs).cpu())
    assert torch.equal(*results)
