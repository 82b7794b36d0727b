"""PagedKVCache whose layers select pages: attention over the chosen pages alone, bounds that follow, a graph for all steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import tvm_infer
from tvm_infer import PageBudget, PagedKVCache

pytestmark = pytest.mark.family("page_selection")

TOLERANCE = {"bfloat16": 4e-3, "float16": 6e-4, "float8_e4m3fn": 0.05}  # of 8 bits: weights are so on cuda
HQ, HKV = 8, 2


def made(device, budget, **changes):
    sizes = dict(num_layers=3, num_qo_heads=HQ, num_kv_heads=HKV, head_dim=128, dtype="bfloat16", num_pages=300)
    sizes |= dict(max_batch=4, max_tokens=256, device=device)
    return PagedKVCache(**(sizes | changes), page_budget=budget)


def memory(cache, name, layer):
    """A tensor of the cache's, in its memory."""
    return torch.from_dlpack(cache._call(name, layer))


def random(cache, n):
    heads = (HQ, HKV, HKV)
    return [torch.randn(n, h, cache.head_dim).to(getattr(torch, cache.dtype)).to(cache.device) for h in heads]


def run(cache, ids, lengths, **settings):
    with cache.forward(ids, lengths, **settings) as step:
        rows = settings.get("num_rows") or sum(lengths)
        return [step.attention(layer, *random(cache, rows)) for layer in range(cache.num_layers)]


def prefill(cache, lengths):
    for seq, length in enumerate(lengths):
        cache.add_sequence(seq)
        for begin in range(0, length, 256):
            run(cache, [seq], [min(256, length - begin)])


def keys_of(cache, seq, layer):
    """Keys and values, float32 [2, tokens, KV heads, head_dim], without scales."""
    pages = memory(cache, "pages", layer)
    taken = pages.view(torch.uint8)[list(cache.page_table(seq))].permute(1, 0, 3, 2, 4).contiguous().view(pages.dtype)
    return taken.to(torch.float32).view(2, -1, HKV, cache.head_dim)[:, : cache.seq_len(seq)]


def scores_of(cache, layer, ids, q):
    """The library's own, of pages that are full."""
    tables = [cache.page_table(seq) for seq in ids]

    def index(values):
        return torch.tensor(values, dtype=torch.int32, device=cache.device)

    return tvm_infer.page_scores(
        q, memory(cache, "page_bounds", layer), kv_len=index([cache.seq_len(seq) // 16 * 16 for seq in ids]),
        kv_page_indptr=index(np.cumsum([0, *map(len, tables)])), kv_page_indices=index(np.concatenate(tables)),
        page_size=16, max_pages=max(map(len, tables)), group_reduce=cache.page_budget.group_reduce,
    )  # fmt: skip


def chosen_by(budget, scores, count):
    if count <= budget.num_pages:
        return list(range(count))
    sink, recent = budget.num_sink_pages, budget.num_recent_pages
    between = np.arange(sink, count - recent)
    best = between[np.lexsort((between, -scores[between]))][: budget.num_pages - sink - recent]
    return sorted([*range(sink), *best.tolist(), *range(count - recent, count)])


def check_step(cache, ids, num_rows):
    """A decode step while all that no list has is NaN."""
    budget, selected = cache.page_budget, 0
    with cache.forward(ids, [1] * len(ids), num_rows=num_rows) as step:
        assert cache.selects_pages
        for layer in range(cache.num_layers):
            q, k, v = random(cache, num_rows)
            raw = memory(cache, "pages", layer).view(torch.uint8)  # bytes 0xFF are NaN in every type
            hidden = torch.ones(raw.shape[0], HKV, dtype=torch.bool)
            dense, lists = layer in budget.dense_layers, {}
            if not dense:
                scores = torch.as_tensor(scores_of(cache, layer, ids, q[: len(ids)])).cpu().double().numpy()
            for r, seq in enumerate(ids):
                table = cache.page_table(seq)
                for h in range(HKV):
                    lists[r, h] = list(range(len(table))) if dense else chosen_by(budget, scores[r, h], len(table))
                    hidden[[table[i] for i in lists[r, h]], h] = False
                    selected += len(lists[r, h]) < len(table)
            mask, kept = hidden.to(cache.device)[:, None, :, None, None], raw.clone()
            raw.masked_fill_(mask, 0xFF)
            o = torch.as_tensor(step.attention(layer, q, k, v)).double()
            raw.copy_(torch.where(mask, kept, raw))
            assert not o[len(ids) :].any()
            for (r, h), numbers in lists.items():
                length = cache.seq_len(ids[r])
                at = torch.arange(length)
                at = at[torch.isin(at // 16, torch.tensor(numbers))].to(cache.device)
                scale = 1.0 if cache.kv_dtype == cache.dtype else 0.01
                keys, values = (x[at, h].double() * scale for x in keys_of(cache, ids[r], layer))
                heads = slice(h * HQ // HKV, (h + 1) * HQ // HKV)
                expected = torch.softmax(q[r, heads].double() @ keys.T / cache.head_dim**0.5, 1) @ values
                assert (o[r, heads] - expected).norm() <= TOLERANCE[cache.kv_dtype] * expected.norm()
    return selected


@pytest.mark.parametrize(
    ("settings", "budget"),
    [
        pytest.param({}, PageBudget(num_pages=6, num_recent_pages=2, dense_layers=1), marks=pytest.mark.subset),
        ({"dtype": "float16", "head_dim": 80}, PageBudget(num_tokens=90, group_reduce="sum", dense_layers=[1])),
        ({"kv_dtype": "float8_e4m3fn", "k_scale": 0.01, "v_scale": 0.01}, PageBudget(num_pages=5, dense_layers=[0, 2])),
    ],
    ids=["bfloat16", "float16", "8 bits"],
)
def test_decode_steps_attend_to_the_chosen_pages(settings, budget, device):
    torch.manual_seed(0)
    cache = made(device, budget, **settings)
    prefill(cache, [700, 40, 900])
    for ids, num_rows in (([2, 0, 1], 3), ([0, 1, 2], 4), ([1, 2], 9)):
        assert check_step(cache, ids, num_rows) == sum(i != 1 for i in ids) * HKV * (
            3 - len(cache.page_budget.dense_layers)
        )


def test_bounds_follow_the_pages(device):
    """Forks that copy a page, pops, moves, swaps: those of full pages, and of pages that grew last, are their keys'."""
    torch.manual_seed(1)
    cache = made(device, PageBudget(num_pages=4, dense_layers=1))
    prefill(cache, [200, 90])

    def check(*ids):
        for seq in ids:
            for layer in (1, 2):
                bounds = memory(cache, "page_bounds", layer)[list(cache.page_table(seq))].double()
                of = keys_of(cache, seq, layer)[0].double().split(16)
                expected = torch.stack([torch.stack([k.amin(0), k.amax(0)]) for k in of])
                assert torch.equal(bounds, expected), (seq, layer)

    check(0, 1)
    cache.fork_sequence(0, 2, 150)
    run(cache, [0, 1, 2], [1, 1, 1], num_rows=4)
    check(0, 1, 2)
    cache.pop(0, 20)
    run(cache, [0], [3])
    check(0, 1, 2)
    cache._call("move_tokens", (1, 1, 1), (80, 81, 85), (70, 3, 69))
    check(0, 1, 2)
    cache.swap_out(1)
    run(cache, [2], [30])
    cache.swap_in(1)
    check(0, 1, 2)
    cache.import_sequence(3, cache.export_sequence(0))
    check(0, 1, 2, 3)


def test_a_graph_serves_steps_that_select_and_steps_that_do_not(cuda):
    """Captured in a step that selects nothing; replayed as sequences outgrow the budget, come and go, and get two tokens at once."""
    torch.manual_seed(2)
    budget = PageBudget(num_pages=5, dense_layers=1)
    graphed, eager = made(cuda, budget), made(cuda, budget)
    q, k, v = random(graphed, 4)
    outs = [[torch.empty_like(q) for _ in range(3)] for _ in range(2)]
    for cache in (graphed, eager):
        torch.manual_seed(3)
        prefill(cache, [60, 75, 500, 30])

    def layers(cache, outs):
        for layer, out in enumerate(outs):
            cache.attention(layer, q, k, v, out=out)

    graph = None
    steps = [
        ([0, 1], [1, 1]),
        ([0, 1, 2, 3], [1, 1, 1, 1]),
        ([2], [1]),
        ([0, 2], [2, 2]),
        ([1, 2, 0], [1, 1, 1]),
        ([3], [3]),
    ]
    steps += [([2, 3], [1, 1])] * 20 + [([0, 1, 2, 3], [1, 1, 1, 1])] * 3
    selected = []
    for ids, lengths in steps:
        for x in (q, k, v):
            x.normal_()
        for of in outs:
            for out in of:
                out.fill_(math.nan)
        for cache in (graphed, eager):
            cache.begin_step(ids, lengths, num_rows=4)
        assert graphed.selects_pages == eager.selects_pages
        selected.append(graphed.selects_pages)
        if graph is None:
            layers(graphed, outs[0])  # loads the kernels
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                layers(graphed, outs[0])
            for out in outs[0]:
                out.fill_(math.nan)
        graph.replay()
        layers(eager, outs[1])
        torch.cuda.synchronize()
        for mine, other in zip(*outs, strict=True):
            assert torch.equal(mine, other) and not mine[sum(lengths) :].any() and mine[: sum(lengths)].any()
        graphed.end_forward(), eager.end_forward()
    assert selected[:6] == [False, True, True, False, True, False] and all(selected[6:])
    assert check_step(graphed, [2, 0], 4) > 0
