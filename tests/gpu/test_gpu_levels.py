"""Shared prefixes: plans by hand and as the cache finds them, against float64; free slots and workspaces hold NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import tvm_infer
from tvm_infer import variant
from tvm_infer.errors import PlanMismatchError
from tvm_infer.testing import make_paged_batch, relative_error
from tvm_infer.testing.plan_checks import check_levels, check_plan

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {"bfloat16": 4e-3, "float16": 6e-4}
# The kernel's two classes at costs by the key alone, beside which merges are nothing: whatever can be shared is, and cut.
EAGER = (16, 128, 0, 0, 10**9, 128, 128, 0, 0, 11 * 10**8, 0, 0, 1000)

CHATS = [[(range(40), 1040)], [(range(0, 20), 1500), (range(20, 38), 1311)]]
BATCHES = {
    "one prompt": ([1] * 40, [1500 + 7 * r for r in range(40)], [[(range(40), 1488)]]),
    "an odd number of keys": ([1] * 7, [700 + r for r in range(7)], [[(range(7), 333)]]),
    "chats of a prompt": ([1] * 40, [1600 + 9 * r for r in range(40)], CHATS),
    "appends": ([3, 1, 20, 1, 9, 1, 1, 30, 1, 1], [900] * 10, [[(range(10), 800)]]),
    "a deep chain": ([1] * 20, [96 * (r + 1) + 40 for r in range(20)], [[(range(r, 20), 96 * (r + 1))] for r in range(19)]),
    "strangers between": ([1, 2, 1, 0, 1, 33, 1], [800, 30, 900, 100, 999, 400, 1], [[((0, 4, 2), 512)], [((2, 4), 777)]]),
    "prefills behind a prompt": ([300, 5, 200, 1], [1300, 1005, 1200, 1001], [[(range(4), 1000)]]),
}  # fmt: skip


def to_torch(x: np.ndarray, device: str) -> torch.Tensor:
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(x).to(device)


class Batch:
    """A batch of BATCHES on a device."""

    def __init__(self, name, device, *, heads=(8, 2), head_dim=128, page_size=16, dtype="bfloat16"):
        qo_lens, kv_lens, self.levels = BATCHES[name]
        self.host = make_paged_batch(
            qo_lens, kv_lens, levels=self.levels, num_qo_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim,
            page_size=page_size, dtype=dtype,
        )  # fmt: skip
        self.device, self.dtype = device, dtype
        self.q, self.cache = to_torch(self.host.q, device), to_torch(self.host.kv_cache, device)
        self.tables = {name: to_torch(x, device) for name, x in self.host.tables.items()}

    def plan(self, **changes):
        settings = dict(
            num_qo_heads=self.q.shape[1], num_kv_heads=self.cache.shape[2], head_dim=self.q.shape[2], dtype=self.dtype,
            levels=self.levels, tile_table=EAGER, num_ctas=20, device=self.device,
        )  # fmt: skip
        plan = tvm_infer.plan(self.host.qo_indptr, self.host.kv_len, **(settings | changes))
        check_plan(plan)
        check_levels(plan, self.levels)
        return plan

    def attend(self, plan, **kwargs):
        """(o, lse), into poison."""
        out = torch.full_like(self.q, math.nan)
        lse = torch.full(self.q.shape[:2], math.nan, device=self.device)
        floats = plan.num_partial_rows * (self.q.shape[2] + 1)
        workspace = torch.full((floats,), math.nan, device=self.device)
        tvm_infer.attention(self.q, self.cache, plan, out=out, lse=lse, workspace=workspace, **self.tables, **kwargs)
        return out, lse

    def check(self, out, lse, **mask):
        expected, expected_lse = self.host.reference(**mask)
        assert relative_error(out.cpu().double().numpy(), expected) < TOLERANCE[self.dtype]
        lse = lse.cpu().numpy()
        seen = np.isfinite(expected_lse)
        assert np.abs(lse - expected_lse)[seen].max() < 2e-3 and np.isneginf(lse[~seen]).all()


MATRIX = [
    *((name, (8, 2), 128, 16, "bfloat16") for name in BATCHES),
    *((name, (32, 8), 128, 1, "bfloat16") for name in ("chats of a prompt", "appends")),
    *((name, (8, 8), 64, 8, "float16") for name in ("one prompt", "a deep chain")),
    *((name, (16, 2), 64, 1, "float16") for name in ("strangers between", "one prompt")),
    *((name, (14, 2), 128, 64, "float16") for name in ("appends", "one prompt")),
    *((name, (30, 1), 128, 32, "bfloat16") for name in ("an odd number of keys", "strangers between")),
    *((name, (9, 3), 64, 4, "bfloat16") for name in ("chats of a prompt", "appends")),
]  # fmt: skip
SMALL = {"an odd number of keys", "strangers between"}


@pytest.mark.family("attention_sm90")
@pytest.mark.parametrize(
    ("name", "heads", "head_dim", "page_size", "dtype"),
    [
        pytest.param(
            *row,
            marks=[
                *([pytest.mark.subset] if row[0] in SMALL and row[1][1] < 3 else []),
                *([pytest.mark.sanitize] if row[0] in SMALL | {"one prompt"} else []),
            ],
        )
        for row in MATRIX
    ],
)
def test_levels(name, heads, head_dim, page_size, dtype, device):
    """Against float64, twice with one plan (its tickets are as they were), and the same bits: who comes last decides nothing."""
    batch = Batch(name, device, heads=heads, head_dim=head_dim, page_size=page_size, dtype=dtype)
    plan = batch.plan()
    assert plan.num_shared_works > 0
    out, lse = batch.attend(plan)
    batch.check(out, lse)
    for _ in range(5):
        again, lse_again = batch.attend(plan)
        assert torch.equal(out, again) and torch.equal(lse, lse_again)
    flat, flat_lse = batch.attend(batch.plan(levels=()))
    batch.check(flat, flat_lse)
    if device != "cpu":
        assert tvm_infer.plan_status(plan) == "accepted"


@pytest.mark.family("attention_sm90")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_devices_own_costs(dtype, device):
    """64 requests of one prompt, as the measured tile table plans it; also not causal."""
    BATCHES["a real one"] = ([1] * 64, [2048 + 3 * r for r in range(1, 65)], [[(range(64), 2048)]])
    batch = Batch("a real one", device, heads=(16, 4), dtype=dtype)
    for causal in (True, False):
        plan = batch.plan(tile_table=None, causal=causal, num_ctas=None if device == "cuda" else 20)
        assert plan.num_shared_works > 0
        batch.check(*batch.attend(plan), causal=causal)


@pytest.mark.family("attention_sm90")
def test_a_graph_is_replayed_with_other_trees(cuda):
    """One graph, one buffer: levels, none, other levels, other lengths. The capture key does not say levels."""
    batch = Batch("chats of a prompt", cuda)
    limits = dict(
        num_qo_heads=8, num_kv_heads=2, head_dim=128, dtype="bfloat16", device=cuda, tile_table=EAGER, num_ctas=20
    )
    size = tvm_infer.workspace_size(max_requests=40, max_tokens=40, max_levels=2, **limits)
    device_plan = torch.empty(size.plan_bytes // 4, dtype=torch.int32, device=cuda)
    host = np.empty(size.plan_bytes // 4, np.int32)
    workspace = torch.full((size.workspace_floats(128),), math.nan, device=cuda)
    out = torch.full_like(batch.q, math.nan)
    room = dict(out=host, device_out=device_plan, max_partial_rows=size.partial_rows)
    plan = batch.plan(**room)
    run = lambda: tvm_infer.attention(batch.q, batch.cache, plan, out=out, workspace=workspace, **batch.tables)  # noqa: E731
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    keys = set()
    for levels in ((), CHATS, CHATS[:1], [[(range(20), 1500)]], [[(range(3, 30), 1000)]], (), CHATS):
        next_plan = batch.plan(levels=levels, **room)
        assert (next_plan.num_shared_works > 0) == (len(levels) > 0)
        keys.add(next_plan.capture_key)
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert tvm_infer.plan_status(next_plan) == "accepted"
        expected, _ = batch.host.reference()
        assert relative_error(out.cpu().double().numpy(), expected) < TOLERANCE["bfloat16"]
    assert len(keys) == 1


def variants_of(device, heads):
    """name -> (variant, its logits in float64, its output in float64); None: as they are."""
    slopes, sink = (torch.linspace(*ends, heads, device=device) for ends in ((0.01, 0.2), (-1, 3)))
    bias = torch.sin(torch.arange(2048, device=device, dtype=torch.float32))
    slope, logit, shift = (x.cpu().double().numpy() for x in (slopes, sink, bias))
    by_key = variant.Variant(
        "by_key", logits=lambda value, kv_pos, bias: value + bias[kv_pos], mask=lambda q_pos, kv_pos: kv_pos <= q_pos,
        bias=variant.tensor(1),
    )  # fmt: skip
    return {
        "soft_cap": (variant.soft_cap.bind(cap=1.5), lambda s, h, i, j: 1.5 * np.tanh(s / 1.5), None),
        "alibi": (variant.alibi.bind(slopes=slopes), lambda s, h, i, j: s + slope[h] * (j - i), None),
        "sink": (variant.attention_sink.bind(sink=sink), None, lambda o, lse: o / (1 + np.exp(logit - lse))[..., None]),
        "by key": (by_key.bind(bias=bias), lambda s, h, i, j: s + shift[j], None),
    }


@pytest.mark.family("attention_sm90")
@pytest.mark.parametrize("which", ["soft_cap", "alibi", "sink", "by key"])
@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size", "dtype"),
    [((8, 2), 128, 16, "bfloat16"), ((8, 2), 64, 1, "float16"), ((30, 1), 128, 32, "bfloat16")],
)
def test_levels_with_a_variant(which, heads, head_dim, page_size, dtype, device):
    """Rows of a shared work have their own positions; merges of few and many partials. The same bits each time."""
    bound, logits, output = variants_of(device, heads[0])[which]
    for name in ("chats of a prompt", "appends", "a deep chain", "strangers between"):
        batch = Batch(name, device, heads=heads, head_dim=head_dim, page_size=page_size, dtype=dtype)
        plan = batch.plan(variant=bound)
        assert plan.num_shared_works > 0
        out, lse = batch.attend(plan, variant=bound)
        expected, expected_lse = batch.host.reference(logits=logits)
        if output is not None:
            expected = output(expected, expected_lse)
        assert relative_error(out.cpu().double().numpy(), expected) < 1.5 * TOLERANCE[dtype]
        seen = np.isfinite(expected_lse)
        assert np.abs(lse.cpu().numpy() - expected_lse)[seen].max() < 4e-3
        assert np.isneginf(lse.cpu().numpy()[~seen]).all()
        again, lse_again = batch.attend(plan, variant=bound)
        assert torch.equal(out, again) and torch.equal(lse, lse_again)


@pytest.mark.family("attention_sm90")
def test_keys_that_a_variant_changes_are_shared(device):
    """Queries and keys over their root mean square, in decode and in prefill tiles."""
    weight = torch.linspace(1.5, 0.5, 128, device=device)
    bound = variant.qk_norm.bind(q_weight=weight, k_weight=weight, eps=1e-6)
    scale = weight.cpu().double().numpy()
    normed = lambda x: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale  # noqa: E731
    for name in ("one prompt", "appends", "prefills behind a prompt"):
        batch = Batch(name, device)
        plan = batch.plan(variant=bound)
        assert plan.num_shared_works > 0
        outs = [batch.attend(p, variant=bound)[0] for p in (plan, batch.plan(levels=(), variant=bound))]
        host = batch.host
        host.q, host.keys = normed(host.q.astype(np.float64)), [normed(k.astype(np.float64)) for k in host.keys]
        expected = host.reference()[0]
        shared, flat = (relative_error(out.cpu().double().numpy(), expected) for out in outs)
        assert flat < 1e-2 and shared < 1.2 * flat + 1e-3


@pytest.mark.family("attention_sm90")
def test_variants_that_see_the_request_are_refused(cuda):
    """By the host, and by the kernel, to which a graph may bring any plan."""
    batch = Batch("one prompt", cuda)
    turned = variant.rope.bind(inv_freq=torch.ones(64, device=cuda), magnitude=1.0)
    shared, flat = batch.plan(), batch.plan(levels=())
    with pytest.raises(PlanMismatchError, match=r"works with rows of several requests.*without levels"):
        batch.attend(shared, variant=turned)
    words = max(len(shared.buffer), len(flat.buffer))
    buffer = torch.zeros(words, dtype=torch.int32, device=cuda)
    buffer[: len(flat.buffer)].copy_(torch.from_numpy(flat.buffer))
    moved = tvm_infer.Plan(flat.buffer, buffer)
    out = torch.full_like(batch.q, math.nan)
    rows = max(shared.num_partial_rows, flat.num_partial_rows)
    workspace = torch.full((rows * 129,), math.nan, device=cuda)
    run = lambda: tvm_infer.attention(  # noqa: E731
        batch.q, batch.cache, moved, out=out, workspace=workspace, variant=turned, **batch.tables
    )
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    buffer[: len(shared.buffer)].copy_(torch.from_numpy(shared.buffer))
    out.fill_(-7.0)
    graph.replay()
    torch.cuda.synchronize()
    assert (out == -7.0).all()
    with pytest.raises(PlanMismatchError, match=r"status 8.*without levels"):
        tvm_infer.plan_status(buffer)


@pytest.mark.family("kv_cache")
def test_a_captured_step_with_changing_forks(cuda):
    """One graph of 24 rows: answers of one prompt, of two, strangers, some gone; beside a cache that shares nothing."""
    torch.manual_seed(0)
    settings = dict(
        num_layers=2, num_qo_heads=8, num_kv_heads=2, head_dim=128, dtype="bfloat16", max_batch=24, max_tokens=8200,
        num_pages=3000, device=cuda,
    )  # fmt: skip
    caches = [tvm_infer.PagedKVCache(shared_prefix=flag, **settings) for flag in (True, False)]
    prompt = [torch.randn(8200, h, 128, device=cuda, dtype=torch.bfloat16) for h in (8, 2, 2)]
    q, k, v = (torch.randn(24, h, 128, device=cuda, dtype=torch.bfloat16) for h in (8, 2, 2))
    outs = [torch.empty_like(q) for _ in caches]
    for cache in caches:
        for layer in range(2):
            cache.pages(layer).fill_(math.nan)
        for seq, length in ((0, 8111), (100, 8200), (200, 30), (201, 400)):
            cache.add_sequence(seq)
            with cache.forward([seq], [length]) as step:
                for layer in range(2):
                    step.attention(layer, *(x[:length] for x in prompt))
        for child in range(1, 16):
            cache.fork_sequence(0, child)
        for child in range(101, 108):
            cache.fork_sequence(100, child, 8003 + child)

    def layers(cache, out):
        for layer in range(2):
            cache.attention(layer, q, k, v, out=out)

    graph, shared = None, []
    for ids in (
        [*range(16), 200, 201], [*range(16), *range(100, 108)], [200, 201], [5, 101, 6, 102, 7, 103, 200], list(range(16)),
    ):  # fmt: skip
        q.normal_(), k.normal_(), v.normal_()
        for cache in caches:
            cache.begin_step(ids, [1] * len(ids), num_rows=24)
        check_plan(caches[0].plan)
        shared.append(caches[0].plan.num_shared_works > 0)
        assert caches[1].plan.num_shared_works == 0
        if graph is None:
            layers(caches[0], outs[0])
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                layers(caches[0], outs[0])
        for out in outs:
            out.fill_(math.nan)
        graph.replay()
        layers(caches[1], outs[1])
        torch.cuda.synchronize()
        ours, flat = (out[: len(ids)].double() for out in outs)
        assert ((ours - flat).norm() / flat.norm()).item() < TOLERANCE["bfloat16"]
        assert not outs[0][len(ids) :].any()
        for cache in caches:
            cache.end_forward()
    assert shared[0] and shared[1] and not shared[2]
