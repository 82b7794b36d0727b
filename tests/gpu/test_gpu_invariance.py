"""A row's bits depend on its own request alone; launches repeat to the last bit, in CUDA graphs with new plans, too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_batches import GARBAGE, MASKS, SPLITS, Batch, Case, bits, make_plan, make_requests, same_bits

import tvm_infer
from tvm_infer import _ffi, errors

pytestmark = pytest.mark.family("attention_sm90")

MIX = ((1, 1, 40, 1, 130, 3, 0, 1), (5000, 300, 512, 129, 130, 1000, 50, 64))
KERNELS = [("bf16", 128, 16, 4), ("fp16", 64, 1, 7), ("bf16", 128, 0, 8), ("fp16", 128, 64, 71), ("bf16", 64, 8, 3)]
OTHER_HEADS = 2  # PlanRefusal in schedule/plan.h


def kernel_ids(values) -> list[str]:
    return [f"{dtype}-d{dim}-{f'p{page}' if page else 'ragged'}-g{group}" for dtype, dim, page, group in values]


def case_of(kernel, **changes) -> Case:
    dtype, dim, page, group = kernel
    settings = {"shape": "mix", "lengths": MIX, "dtype": dtype, "head_dim": dim, "page_size": page, "group": group}
    return Case(**(settings | changes))


@pytest.mark.parametrize("kernel", KERNELS, ids=kernel_ids(KERNELS))
@pytest.mark.parametrize("split", [s for s in SPLITS if SPLITS[s] != 0])
@pytest.mark.parametrize("mask", ["causal", "w333"])
def test_rows_do_not_depend_on_the_batch(kernel, split, mask, device):
    """fixed_split_size: alone, in a mixture, at another position, with other pages: the same bits."""
    case = case_of(kernel, split=split, mask=mask)
    requests = make_requests(case, device)
    together = Batch(case, device, requests=requests)
    o, lse = together.attend()
    together.errors(o, lse).assert_small()
    start = together.qo_indptr

    order = [4, 6, 0, 7, 2, 5, 1, 3]
    moved = Batch(case, device, seed=99, requests=[requests[r] for r in order])
    moved_o, moved_lse = moved.attend()
    for i, r in enumerate(order):
        there = slice(moved.qo_indptr[i], moved.qo_indptr[i + 1])
        here = slice(start[r], start[r + 1])
        assert same_bits(o[here], moved_o[there]) and same_bits(lse[here], moved_lse[there]), f"request {r} moved"
    for r in (0, 2, 4, 5):
        alone = Batch(case, device, seed=7 + r, requests=[requests[r]])
        alone_o, alone_lse = alone.attend()
        here = slice(start[r], start[r + 1])
        assert same_bits(o[here], alone_o) and same_bits(lse[here], alone_lse), f"request {r} alone"


@pytest.mark.subset
@pytest.mark.parametrize("kernel", KERNELS[:3], ids=kernel_ids(KERNELS[:3]))
def test_rows_do_not_depend_on_the_batch_small(kernel, device):
    """The same on few rows, so that machines without a GPU hold it."""
    case = case_of(kernel, split="cut96", lengths=((1, 20, 1), (300, 70, 129)))
    requests = make_requests(case, device)
    o, lse = Batch(case, device, requests=requests).attend()
    other_o, other_lse = Batch(case, device, seed=3, requests=requests[::-1]).attend()
    alone_o, alone_lse = Batch(case, device, seed=4, requests=requests[:1]).attend()
    assert same_bits(o[:1], other_o[-1:]) and same_bits(lse[:1], other_lse[-1:])
    assert same_bits(o[-1:], other_o[:1]) and same_bits(o[1:21], other_o[1:21])
    assert same_bits(o[:1], alone_o) and same_bits(lse[:1], alone_lse)


@pytest.mark.subset
@pytest.mark.parametrize("kernel", KERNELS, ids=kernel_ids(KERNELS))
@pytest.mark.parametrize("split", ["auto", "cut64"])
@pytest.mark.parametrize("qo_len", [(1, 1, 30, 1), (1, 1, 0, 1)], ids=["mix", "decode"])
def test_launches_repeat(kernel, split, qo_len, device):
    """The same plan buffer again and again: tickets are left as they were found, and the order of arrival changes no bit."""
    lengths = (qo_len, (3000, 300, 200, 64))
    batch = Batch(case_of(kernel, split=split, lengths=lengths), device)
    plan = batch.plan()
    if device == "cuda":
        assert (plan.header["paced_ctas"] > 0) == (max(qo_len) * batch.case.group <= 16)
    if split == "cut64" or device == "cuda":
        assert plan.num_merges > 0
    before = None if device == "cpu" else plan.device_buffer.clone()
    o, lse = batch.attend(plan)
    batch.errors(o, lse).assert_small()
    for _ in range(3 if device == "cpu" else 20):
        again_o, again_lse = batch.attend(plan)
        assert same_bits(o, again_o) and same_bits(lse, again_lse)
    if before is not None:
        assert torch.equal(before, plan.device_buffer), "a launch left something in the plan"


# --- CUDA graphs --------------------------------------------------------------------------------------------------------------


class Replayed:
    """One captured launch of attention over fixed tensors; plans, tables and queries change between replays."""

    def __init__(self, case: Case, device: str, split_rows: int = 16384) -> None:
        self.case, self.device = case, device
        self.batch = Batch(case, device)
        first = self.batch.plan()
        self.rows = split_rows
        words = first.bytes_used // 4 + 65536
        self.host = np.zeros(words, np.int32)
        self.buffer = torch.full((words,), GARBAGE[0], dtype=torch.int32, device=device)
        self.workspace = torch.full((split_rows * (case.head_dim + 1),), torch.nan, device=device)
        self.out, self.lse = self.batch.outputs()
        self.plan = self.make(self.batch.kv)
        self.launch()  # kernels and tensor maps are resolved before capture
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.launch()

    def make(self, kv: list[int], case: Case | None = None, qo_indptr: list[int] | None = None) -> tvm_infer.Plan:
        return make_plan(
            self.batch.qo_indptr if qo_indptr is None else qo_indptr,
            kv,
            case or self.case,
            self.device,
            out=self.host,
            device_out=self.buffer,
            max_partial_rows=self.rows,
        )

    def launch(self) -> None:
        tvm_infer.attention(
            self.batch.q,
            self.batch.cache,
            self.plan,
            **self.batch.tables,
            out=self.out,
            lse=self.lse,
            workspace=self.workspace,
        )

    def replay(self) -> None:
        self.out.fill_(torch.nan)
        self.lse.fill_(torch.nan)
        self.graph.replay()


@pytest.mark.parametrize("page_size", [16, 1])
def test_a_graph_follows_a_new_plan(page_size, cuda):
    """Replayed with other lengths planned into the same buffer: the results are those of the new lengths."""
    case = Case("graph", lengths=((1,) * 8, (4000, 17, 300, 128, 1, 2000, 64, 999)), page_size=page_size)
    replayed = Replayed(case, cuda)
    replayed.replay()
    replayed.batch.errors(replayed.out, replayed.lse).assert_small()
    requests = replayed.batch.requests
    for lengths in ((1, 17, 30, 128, 1, 5, 64, 9), (2000, 16, 299, 3, 1, 1999, 1, 500), replayed.batch.kv):
        # the first keys of each request: decode then sees exactly those
        for request, full, m in zip(requests, make_requests(case, cuda), lengths, strict=True):
            request.k, request.v = full.k[:m], full.v[:m]
        replayed.plan = replayed.make(list(lengths))
        replayed.replay()
        replayed.batch.errors(replayed.out, replayed.lse).assert_small()
        from_graph = replayed.out.clone()
        replayed.launch()
        assert same_bits(from_graph, replayed.out)


def test_a_graph_refuses_a_plan_of_other_heads(cuda):
    """No host code sees a replayed plan: the kernel writes nothing, says why, and the next good plan works."""
    case = Case("graph", lengths=((1,) * 4, (300, 17, 64, 999)))
    replayed = Replayed(case, cuda)
    replayed.replay()
    good = replayed.out.clone()
    other = Case("graph", lengths=case.lengths, group=8)
    replayed.make(replayed.batch.kv, other)
    replayed.replay()
    assert bool(torch.isnan(replayed.out).all()) and bool(torch.isnan(replayed.lse).all())
    assert int(_ffi.func("plan_status")(replayed.buffer)) == OTHER_HEADS
    with pytest.raises(errors.PlanMismatchError, match="heads"):
        tvm_infer.plan_status(replayed.buffer)
    replayed.plan = replayed.make(replayed.batch.kv)
    replayed.replay()
    assert same_bits(replayed.out, good)
    assert tvm_infer.plan_status(replayed.buffer) == "accepted"


def test_a_graph_refuses_what_is_not_a_plan(cuda):
    case = Case("graph", lengths=((1,) * 4, (300, 17, 64, 999)))
    replayed = Replayed(case, cuda)
    replayed.replay()
    good, kept = replayed.out.clone(), replayed.buffer.clone()
    replayed.buffer[0] = 0  # the magic number
    replayed.replay()
    assert bool(torch.isnan(replayed.out).all())
    replayed.buffer.copy_(kept)
    replayed.replay()
    assert same_bits(replayed.out, good)


def test_a_graph_of_a_whole_step(cuda):
    """append_attention captured and replayed: new tokens are written and seen."""
    case = Case("graph", lengths=((1,) * 6, (300, 17, 64, 999, 1, 129)))
    batch = Batch(case, cuda, appended=False)
    plan = batch.plan()
    workspace = batch.workspace(plan)
    out, lse = batch.outputs()

    def launch() -> None:
        tvm_infer.append_attention(
            batch.q, batch.k_new, batch.v_new, batch.cache, plan, **batch.tables, out=out, lse=lse, workspace=workspace
        )

    launch()
    expected = out.clone()
    batch.errors(out, lse).assert_small()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for r, m in enumerate(batch.kv):  # take the new tokens out again
        page, slot = divmod(m - 1, case.page_size)
        batch.k_pages[batch.pages[r][page], :, slot] = torch.nan
        batch.v_pages[batch.pages[r][page], :, slot] = torch.nan
    out.fill_(torch.nan)
    graph.replay()
    assert same_bits(out, expected)


@pytest.mark.subset
def test_bits_tell_nan_and_zero_apart():
    """What this file compares with."""
    a = torch.tensor([0.0, torch.nan])
    assert same_bits(a, a.clone()) and not same_bits(a, torch.tensor([-0.0, torch.nan]))
    assert bits(a).dtype == torch.int32 and set(MASKS) >= {"causal", "w333"}
