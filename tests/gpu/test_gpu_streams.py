"""Calls run on the caller's current stream, in order; threads do not disturb each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from gpu_batches import Batch, Case, same_bits

import tvm_infer

pytestmark = pytest.mark.family("attention_sm90")

SLEEP = 40_000_000  # clock cycles, about 20 ms: what does not wait for it has long run


@pytest.mark.parametrize("page_size", [16, 1, 0])
def test_attention_follows_what_the_stream_holds(page_size, cuda):
    """Queries that arrive late on a side stream are the ones attended, by the plan uploaded there, and read there afterwards."""
    batch = Batch(Case("stream", lengths=((1, 70, 1), (999, 70, 64)), page_size=page_size), cuda)
    expected, expected_lse = batch.attend()
    late = batch.q.clone()
    batch.q.fill_(torch.nan)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP)
        batch.q.copy_(late)
        o, lse = batch.attend(batch.plan())
        kept, kept_lse = o.clone(), lse.clone()
    side.synchronize()
    assert same_bits(kept, expected) and same_bits(kept_lse, expected_lse)


@pytest.mark.family("append", "attention_sm90")
def test_append_and_attention_follow_each_other_on_a_side_stream(cuda):
    case = Case("stream", lengths=((1, 70, 1), (999, 70, 64)), group=1)
    expected, _ = Batch(case, cuda).attend()
    batch = Batch(case, cuda, appended=False)
    k = batch.k_new.clone()
    batch.k_new.fill_(torch.nan)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP)
        batch.k_new.copy_(k)
        plan = batch.plan()
        out, lse = batch.outputs()
        tvm_infer.append_attention(
            batch.q,
            batch.k_new,
            batch.v_new,
            batch.cache,
            plan,
            **batch.tables,
            out=out,
            lse=lse,
            workspace=batch.workspace(plan),
        )
    side.synchronize()
    assert same_bits(out, expected)


@pytest.mark.family("merge_states")
def test_merge_follows_what_the_stream_holds(cuda):
    o = torch.randn((100, 8, 128), device=cuda, dtype=torch.bfloat16)
    lse = torch.randn((100, 8), device=cuda)
    expected, _ = tvm_infer.merge(o, lse, o.flip(0), lse.flip(0))
    target, other = torch.full_like(o, torch.nan), o.flip(0)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP)
        target.copy_(o)
        merged, _ = tvm_infer.merge(target, lse, other, lse.flip(0))
    side.synchronize()
    assert same_bits(merged, expected)


def test_plans_made_ahead_are_not_overwritten_in_flight(cuda):
    """Twenty steps are planned while the stream still sleeps: each copy must bring its own plan, whatever the staging buffers."""
    batches = [
        Batch(Case("ahead", lengths=((1,) * 4, (50 + i, 300 - i, 17, 64 * i + 1))), cuda, seed=i) for i in range(20)
    ]
    expected = [b.attend()[0] for b in batches]
    plans = [b.plan() for b in batches]
    words = max(p.bytes_used for p in plans) // 4
    rows = max(p.num_partial_rows for p in plans)
    host = np.zeros(words, np.int32)  # one host buffer and one device buffer for all
    device = torch.zeros(words, dtype=torch.int32, device=cuda)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    results = []
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP)
        for b in batches:
            plan = b.plan(out=host, device_out=device, max_partial_rows=rows)
            results.append(b.attend(plan)[0])
    side.synchronize()
    for o, e in zip(results, expected, strict=True):
        assert same_bits(o, e)


@pytest.mark.subset
def test_threads_with_plans_of_their_own(device):
    """Two threads, each with its stream, plan and workspace, get what one thread gets."""
    batches = [
        Batch(
            Case("threads", split="cut96", lengths=((1, 20, 1), (700 + i, 90, 64)), dtype=("bf16", "fp16")[i]), device
        )
        for i in range(2)
    ]
    expected = [b.attend()[0] for b in batches]

    def work(batch: Batch) -> list[torch.Tensor]:
        if device == "cpu":
            return [batch.attend()[0] for _ in range(5)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            results = [batch.attend()[0].clone() for _ in range(20)]
        stream.synchronize()
        return results

    if device == "cuda":
        torch.cuda.synchronize()
    with ThreadPoolExecutor(2) as pool:
        for results, e in zip(pool.map(work, batches), expected, strict=True):
            assert all(same_bits(o, e) for o in results)


@pytest.mark.subset
@pytest.mark.sanitize
def test_launches_back_to_back(device):
    """With programmatic dependent launch a call's prologue overlaps the call before it: a chain of them must still be a chain."""
    batch = Batch(Case("chain", split="cut64", lengths=((1, 1), (300, 129))), device)
    plan = batch.plan()
    workspace = batch.workspace(plan)
    q, chained = batch.q.clone(), []
    for _ in range(5):  # each call's query is the last one's output
        out = torch.full_like(q, torch.nan)
        tvm_infer.attention(q, batch.cache, plan, **batch.tables, out=out, workspace=workspace)
        chained.append(out)
        q = out
    q = batch.q.clone()
    for o in chained:
        step = tvm_infer.attention(q, batch.cache, plan, **batch.tables)
        if device == "cuda":
            torch.cuda.synchronize()
        assert same_bits(step, o)
        q = step
