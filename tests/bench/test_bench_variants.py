"""The benchmark's variants and windows on the CPU executor: our results against plain torch's, and what is counted of a window."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from test_bench_cuda import CEILINGS, SMALL, HostDevice

from tvm_infer.bench import inputs, peers, reference, run_cuda, suites, variants
from tvm_infer.bench.peers import Skipped
from tvm_infer.bench.workloads import Workload

DRAFTS = Workload("drafts", (7, 7), (30, 30), **SMALL)  # FlexAttention is given batches of equal lengths


class Device(HostDevice):
    def plan(self, workload):
        return super(HostDevice, self).plan(workload)


BANDS = {"sinks": {"window": 5, "num_sink": 3}, "chunks": {"chunk": 4}, "": {"window": 5}}


@pytest.mark.parametrize("name", [*variants.NAMES, ""])
def test_ours_is_what_the_reference_says_and_plain_attention_is_not(name):
    workload = dataclasses.replace(DRAFTS, variant=name, **BANDS.get(name, {}))
    batch = inputs.device_batch(workload, "cpu")
    if name == "soft cap":
        batch.q.mul_(16)  # logits that a cap of 30 bends
    device = Device()
    plan = device.plan(workload)
    workspace = torch.full((plan.num_partial_rows * (workload.head_dim + 1) + 1,), torch.nan)
    device.launcher(batch, plan, workspace)()
    expected = reference.reference(batch)
    assert expected.error(batch.out) <= reference.TOLERANCE["bfloat16"]
    assert expected.lse_error(batch.lse) <= reference.lse_tolerance(workload)
    plain = dataclasses.replace(batch, workload=DRAFTS, variant=None)
    device.launcher(plain, device.plan(DRAFTS), workspace)()
    assert expected.error(plain.out) > 10 * reference.TOLERANCE["bfloat16"]


@pytest.mark.parametrize("name", ["soft cap", "ALiBi", "tree mask"])
def test_flex_attention_is_given_the_same(name):
    """score_mod and mask, evaluated on a grid, are the reference's logits and mask."""
    batch = inputs.device_batch(dataclasses.replace(DRAFTS, variant=name), "cpu")
    mods, effect = variants.flex(batch), variants.effect(batch, 0)
    n, m = DRAFTS.qo_lens[0], DRAFTS.kv_lens[0]
    heads = torch.arange(DRAFTS.num_qo_heads)[:, None, None]
    q, kv = torch.arange(n)[None, :, None], torch.arange(m)[None, None]
    scores = torch.linspace(-60, 60, DRAFTS.num_qo_heads * n * m, dtype=torch.float64).view(-1, n, m)
    expected = effect.logits(scores, heads, q + (m - n), kv)
    got = scores if mods.score is None else mods.score(scores, 0, heads, q, kv)
    torch.testing.assert_close(got, expected)
    seen = torch.ones((n, m), dtype=torch.bool) if mods.mask is None else mods.mask(q[0], kv[0])
    assert torch.equal(seen.expand(n, m), ~effect.hidden(torch.arange(n), torch.arange(m)))


def test_peers_that_have_no_variants_say_so():
    workload = dataclasses.replace(DRAFTS, variant="attention sink")
    row = run_cuda.measure_workload(Device(), workload, CEILINGS, ["torch"])
    assert row["variant"] == "attention sink" and row["window"] is None
    assert row["peers"]["torch"] == {"skipped": "measured on plain causal attention only"}
    with pytest.raises(Skipped, match="no hole for the output"):
        variants.flex(inputs.device_batch(workload, "cpu"))
    assert peers.peer("flex", "cuda").takes_variants


@pytest.mark.parametrize("band", [{}, {"num_sink": 2}, {"chunk": 4}, {"chunk": 4, "num_sink": 3}], ids=str)
@pytest.mark.parametrize(("n", "m", "window"), list(itertools.product((1, 5, 9), (9, 12, 30), (-1, 0, 3, 8, 40))))
def test_what_a_band_leaves(n, m, window, band):
    workload = Workload("w", (n,), (m,), window=window, **band)
    num_sink, chunk = workload.num_sink, workload.chunk

    def is_near(i, j):
        return (window < 0 or i - j <= window) and (not chunk or i // chunk == j // chunk)

    seen = [(i, j) for i in range(m - n, m) for j in range(i + 1) if is_near(i, j) or j < num_sink]
    assert workload.visible_pairs == len(seen)
    keys = len({j for _, j in seen})
    assert workload.kv_bytes == 2 * keys * workload.num_kv_heads * workload.head_dim * 4
    grid = workload.sees(torch.arange(m - n, m)[:, None], torch.arange(m)[None])
    assert torch.nonzero(grid).add(torch.tensor([m - n, 0])).tolist() == [list(pair) for pair in seen]


def test_the_suite_has_each_beside_the_same_without():
    rows = suites.suite("variants").workloads
    names = [w.name for w in rows]
    assert len(set(names)) == len(names)
    for w in rows:
        assert any(dataclasses.replace(w, name=p.name, variant="", window=-1, num_sink=0, chunk=0) == p for p in rows)
    assert {w.variant for w in rows} == {"", *variants.NAMES} and {w.window for w in rows} == {-1, 1024}
