"""Block-sparse matrices, lists of keys for each KV head, and keys in one run, against float64; what nobody sees holds NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import tvm_infer
from tvm_infer import variant
from tvm_infer.errors import PlanMismatchError
from tvm_infer.testing.plan_checks import check_plan

pytestmark = pytest.mark.family("attention_sm90")

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {"bfloat16": 4e-3, "float16": 6e-4}


def normal(generator, shape, dtype, device):
    return torch.randn(shape, generator=generator).to(TORCH[dtype]).to(device)


def reference(q, k, v, seen):
    """float64 (o, lse) on the host; seen : bool [num_kv_heads or 1, n, m]. Keys that nobody sees may be NaN."""
    q, k, v = (x.cpu().double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    used = seen.any(1).expand(k.shape[1], -1).T[:, :, None]
    k, v = (torch.where(used, x, 0.0).repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k) / q.shape[2] ** 0.5
    seen = seen.expand(k.shape[1] // group, -1, -1).repeat_interleave(group, 0)
    scores = torch.where(seen, scores, -math.inf)
    lse = torch.logsumexp(scores, 2)
    weights = torch.where(seen, torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)[..., None]), 0.0)
    return torch.einsum("hnm,mhd->nhd", weights, v), lse.T


def check(out, lse, expected, expected_lse, dtype):
    out, lse = out.cpu().double(), lse.cpu().double()
    assert torch.isfinite(out).all()
    assert (out - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    empty = expected_lse.isinf()
    assert torch.equal(lse.isinf(), empty) and not out[empty].any()
    assert ((lse - expected_lse)[~empty].abs() <= 2e-3).all()


def run(function, q, plan, *args, **kwargs):
    """(o, lse) of a call, into poison."""
    rows = getattr(plan, "plan", plan).num_partial_rows
    out = torch.full_like(q, math.nan)
    lse = torch.full(q.shape[:2], math.nan, device=q.device)
    workspace = torch.full((rows * (q.shape[2] + 1),), math.nan, device=q.device)
    function(q, *args, plan, out=out, lse=lse, workspace=workspace, **kwargs)
    return out, lse


def settings(device, **changes):
    made = {"num_ctas": 20} if device == "cpu" else {"device": device}
    return made | changes


# block, page on cuda; query tokens and keys are no multiples of the block where they need not be
BLOCKS = [
    ((64, 64), 64, 300, 640, "bfloat16", (32, 8), 128),
    ((128, 48), 16, 500, 1200, "float16", (8, 2), 64),
    ((7, 24), 8, 100, 2000, "bfloat16", (6, 6), 128),
    ((33, 20), 4, 200, 1004, "float16", (8, 2), 128),
    ((128, 1), 1, 300, 777, "bfloat16", (8, 2), 128),
    ((1, 2), 2, 40, 500, "float16", (14, 2), 64),
    ((16, 96), 32, 90, 8 * 96 + 32, "bfloat16", (8, 8), 128),
]


@pytest.mark.parametrize(
    ("block", "page", "num_qo", "num_kv", "dtype", "heads", "dim"),
    [pytest.param(*row, marks=[pytest.mark.subset] if row[2] <= 100 else []) for row in BLOCKS],
)
@pytest.mark.parametrize("split", [0, -1, 96])
def test_block_sparse(block, page, num_qo, num_kv, dtype, heads, dim, split, device):
    rng, generator = np.random.default_rng(num_kv), torch.Generator().manual_seed(num_kv)
    num_rows, num_columns = -(-num_qo // block[0]), -(-num_kv // block[1])
    chosen = rng.random((num_rows, num_columns)) < 0.35
    chosen[num_rows // 2] = False  # sees nothing
    chosen[:, num_columns // 3] = False  # seen by nobody
    chosen[-1, -1] = True
    indices = [rng.permutation(np.flatnonzero(row)) for row in chosen]
    indptr = np.cumsum([0, *map(len, indices)])
    plan = tvm_infer.plan_block_sparse(
        indptr, np.concatenate(indices), block, num_qo_tokens=num_qo, num_kv_tokens=num_kv, dtype=dtype,
        num_qo_heads=heads[0], num_kv_heads=heads[1], head_dim=dim, **settings(device, fixed_split_size=split),
    )  # fmt: skip
    check_plan(plan.plan)
    assert device == "cpu" or plan.page_size == page
    seen = torch.from_numpy(np.kron(chosen, np.ones(block, bool))[:num_qo, :num_kv])
    q = normal(generator, (num_qo, heads[0], dim), dtype, device)
    k, v = (normal(generator, (num_kv, heads[1], dim), dtype, device) for _ in "kv")
    k[~seen.any(0).to(device)] = v[~seen.any(0).to(device)] = math.nan
    out, lse = run(lambda q, plan, **kw: tvm_infer.block_sparse_attention(q, k, v, plan, **kw), q, plan)
    check(out, lse, *reference(q, k, v, seen[None]), dtype)
    assert device == "cpu" or tvm_infer.plan_status(plan.plan) == "accepted"


class HeadLists:
    """Requests whose KV heads have lists of their own, in pages that hold keys of one head; the others' are NaN."""

    def __init__(self, device, qo_lens, kv_lens, *, page, dtype="bfloat16", group=4, dim=128, seed=0):
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        self.device, self.dtype, self.kv_lens = device, dtype, np.array(kv_lens, np.int32)
        self.qo_lens, self.indptr = qo_lens, np.cumsum([0, *qo_lens]).astype(np.int32)
        num_kv_heads = self.kv_lens.shape[1]
        counts = -(-self.kv_lens.ravel() // page)
        order = rng.permutation(int(counts.sum()) + 3)
        cache = torch.full((len(order), 2, num_kv_heads, page, dim), math.nan, dtype=TORCH[dtype])
        self.q = normal(generator, (sum(qo_lens), group * num_kv_heads, dim), dtype, device)
        indices, page_indptr, self.keys, taken = [], [0], [], 0
        for i, length in enumerate(self.kv_lens.ravel().tolist()):
            pages = torch.from_numpy(order[taken : taken + counts[i]])
            taken += counts[i]
            keys = normal(generator, (2, length, dim), dtype, "cpu")
            slots = torch.arange(length)
            cache[:, :, i % num_kv_heads].permute(0, 2, 1, 3)[pages[slots // page], slots % page] = keys.transpose(0, 1)
            self.keys.append(keys)
            indices += [*pages.tolist(), -1_234_567_890]
            page_indptr.append(len(indices))
        self.cache = cache.to(device)
        index = {"dtype": torch.int32, "device": device}
        self.tables = {
            "kv_page_indptr": torch.tensor(page_indptr, **index),
            "kv_page_indices": torch.tensor(indices, **index),
        }

    def plan(self, **changes):
        heads = dict(num_qo_heads=self.q.shape[1], num_kv_heads=self.kv_lens.shape[1], head_dim=self.q.shape[2])
        plan = tvm_infer.plan(self.indptr, self.kv_lens, dtype=self.dtype, **heads, **settings(self.device, **changes))
        check_plan(plan)
        return plan

    def reference(self, causal):
        num_kv_heads = self.kv_lens.shape[1]
        group = self.q.shape[1] // num_kv_heads
        o, lse = torch.zeros(self.q.shape, dtype=torch.float64), torch.zeros(self.q.shape[:2], dtype=torch.float64)
        for i, (k, v) in enumerate(self.keys):
            r, h = divmod(i, num_kv_heads)
            n, m = self.qo_lens[r], len(k)
            position = torch.arange(n)[:, None] + m - n
            seen = torch.arange(m)[None] <= position if causal else torch.ones(n, m, dtype=torch.bool)
            rows, heads = slice(*self.indptr[r : r + 2].tolist()), slice(h * group, (h + 1) * group)
            o[rows, heads], lse[rows, heads] = reference(self.q[rows, heads], k[:, None], v[:, None], seen[None])
        return o, lse

    def run(self, plan, **kwargs):
        return run(tvm_infer.attention, self.q, plan, self.cache, **self.tables, **kwargs)


LISTS = {
    "decode": ([1] * 9, lambda rng, n, h: rng.integers(1, 2000, (n, h))),
    "streaming": ([1] * 4, lambda rng, n, h: np.where(np.arange(h) % 2, 3000, 1088)[None] + np.zeros((n, 1), int)),
    "append": ([5, 1, 130, 33, 0], lambda rng, n, h: 130 + rng.integers(0, 900, (n, h))),
    "empty lists": ([1, 7, 40], lambda rng, n, h: rng.integers(0, 2, (n, h)) * rng.integers(1, 500, (n, h))),
}


@pytest.mark.parametrize("page", [16, 64, 1])
@pytest.mark.parametrize("split", [0, 100])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.subset] if n == "empty lists" else []) for n in LISTS]
)
def test_head_lists(name, split, page, device):
    qo_lens, lengths = LISTS[name]
    num_kv_heads = 8 if name == "streaming" else 3
    kv_lens = lengths(np.random.default_rng(page), len(qo_lens), num_kv_heads)
    dtype = "float16" if page == 64 else "bfloat16"
    lists = HeadLists(device, qo_lens, kv_lens, page=page, dtype=dtype, dim=64 if page == 64 else 128)
    for causal in (False,) if name == "empty lists" else (True, False):
        plan = lists.plan(causal=causal, fixed_split_size=split)
        out, lse = lists.run(plan)
        check(out, lse, *lists.reference(causal), dtype)
        again, lse_again = lists.run(plan)
        assert torch.equal(out, again) and torch.equal(lse, lse_again)


def test_a_graph_is_replayed_with_other_lists(cuda):
    """One graph, one buffer, one key: lists of heads of other lengths, within the same page table."""
    lists = HeadLists(cuda, [1] * 6, np.full((6, 4), 2000), page=16)
    limits = dict(num_qo_heads=16, num_kv_heads=4, head_dim=128, dtype="bfloat16", device=cuda)
    size = tvm_infer.workspace_size(max_requests=6, max_tokens=6, head_lists=True, **limits)
    device_plan = torch.empty(size.plan_bytes // 4, dtype=torch.int32, device=cuda)
    room = dict(
        out=np.empty(size.plan_bytes // 4, np.int32), device_out=device_plan, max_partial_rows=size.partial_rows
    )
    workspace = torch.full((size.workspace_floats(128),), math.nan, device=cuda)
    out = torch.full_like(lists.q, math.nan)
    plan = lists.plan(**room)
    attend = lambda: tvm_infer.attention(lists.q, lists.cache, plan, out=out, workspace=workspace, **lists.tables)  # noqa: E731
    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    whole, rng = lists.keys, np.random.default_rng(3)
    for _ in range(5):
        lists.kv_lens = rng.integers(1, 2001, (6, 4)).astype(np.int32)
        lists.keys = [keys[:, :n] for keys, n in zip(whole, lists.kv_lens.ravel().tolist(), strict=True)]
        next_plan = lists.plan(**room)
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert tvm_infer.plan_status(next_plan) == "accepted"
        expected, _ = lists.reference(True)
        assert (out.cpu().double() - expected).norm() <= TOLERANCE["bfloat16"] * expected.norm()


def test_plans_of_other_launches_are_refused(cuda):
    """Bare buffers, which no host code looks at: of lists of KV heads appends and variants know no positions; sinks take a variant."""
    lists = HeadLists(cuda, [1, 3], np.full((2, 2), 40), page=16)
    cache = lists.cache.clone()
    new = [torch.zeros((4, 2, 128), dtype=torch.bfloat16, device=cuda) for _ in "kv"]
    out, workspace = torch.full_like(lists.q, -7.0), torch.zeros(10**6, device=cuda)
    into = dict(out=out, workspace=workspace, **lists.tables)
    heads = dict(num_qo_heads=8, num_kv_heads=2, head_dim=128, dtype="bfloat16", device=cuda)
    with_sinks = tvm_infer.plan(lists.indptr, [40, 40], window_left=8, num_sink=4, **heads)
    cap = variant.soft_cap.bind(cap=30.0)
    launches = [
        (9, lists.plan(), lambda plan: tvm_infer.append_attention(lists.q, *new, lists.cache, plan, **into)),
        (9, lists.plan(), lambda plan: tvm_infer.attention(lists.q, lists.cache, plan, variant=cap, **into)),
        (10, with_sinks, lambda plan: tvm_infer.attention(lists.q, lists.cache, plan, **into)),
    ]
    for status, plan, launch in launches:
        launch(plan.device_buffer)
        with pytest.raises(PlanMismatchError, match=rf"refused the plan \(status {status}\) and wrote nothing"):
            tvm_infer.plan_status(plan)
        assert (out == -7.0).all()
    assert torch.equal(lists.cache.view(torch.int16), cache.view(torch.int16))


RUNS = [
    ([1] * 8, "bfloat16", (32, 8), 128),
    ([1, 40, 1, 300, 7], "float16", (8, 2), 64),
    ([200, 1, 1], "bfloat16", (6, 2), 256),
]


@pytest.mark.parametrize(
    ("qo_lens", "dtype", "heads", "dim"),
    [pytest.param(*row, marks=[pytest.mark.subset] if len(row[0]) == 3 else []) for row in RUNS],
)
@pytest.mark.parametrize("form", ["rows", "BSHD", "BHSD"])
def test_contiguous(form, qo_lens, dtype, heads, dim, device):
    """Rows in any order with NaN between the requests; buffers, of which a request has a part."""
    generator, rng = torch.Generator().manual_seed(len(qo_lens)), np.random.default_rng(1)
    kv_lens = [n + int(m) for n, m in zip(qo_lens, rng.integers(0, 900, len(qo_lens)), strict=True)]
    num = len(qo_lens)
    shape = {"BSHD": (num, 1300, heads[1], dim), "BHSD": (num, heads[1], 1300, dim)}.get(form)
    before = rng.integers(0, 60, num)
    if shape is None:
        order = rng.permutation(num)
        begins = dict(zip(order, np.cumsum([0] + [kv_lens[r] + before[r] for r in order[:-1]]), strict=True))
        begins = [int(begins[r] + before[r]) for r in range(num)]
        shape = (sum(kv_lens) + int(before.sum()) + 5, heads[1], dim)
    k, v = (torch.full(shape, math.nan, dtype=TORCH[dtype], device=device) for _ in "kv")
    if form == "BHSD":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    rows = [x if form == "rows" else x[r, before[r] :] for r in range(num) for x in (k, v)]
    for r in range(num):
        for x in rows[2 * r : 2 * r + 2]:
            begin = begins[r] if form == "rows" else 0
            x[begin : begin + kv_lens[r]] = normal(generator, (kv_lens[r], heads[1], dim), dtype, device)
    if form == "rows":
        start = torch.tensor(begins, dtype=torch.int32, device=device)
    else:
        start = torch.as_tensor(tvm_infer.contiguous_start(k, v)) + torch.tensor(
            before, dtype=torch.int32, device=device
        )
    q = normal(generator, (sum(qo_lens), heads[0], dim), dtype, device)
    indptr = np.cumsum([0, *qo_lens])
    plan = tvm_infer.plan(
        indptr.astype(np.int32), kv_lens, num_qo_heads=heads[0], num_kv_heads=heads[1], head_dim=dim, dtype=dtype,
        **settings(device),
    )  # fmt: skip
    out, lse = run(lambda q, plan, **kw: tvm_infer.contiguous_attention(q, k, v, plan, kv_start=start, **kw), q, plan)
    expected = torch.zeros(q.shape, dtype=torch.float64), torch.zeros(q.shape[:2], dtype=torch.float64)
    for r, (n, m) in enumerate(zip(qo_lens, kv_lens, strict=True)):
        begin = begins[r] if form == "rows" else 0
        keys = [x[begin : begin + m] for x in rows[2 * r : 2 * r + 2]]
        seen = torch.arange(m)[None] <= torch.arange(n)[:, None] + m - n
        part = slice(indptr[r], indptr[r + 1])
        expected[0][part], expected[1][part] = reference(q[part], *keys, seen[None])
    check(out, lse, *expected, dtype)
