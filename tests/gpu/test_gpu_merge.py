"""merge of two attention states against float64."""

from __future__ import annotations

import math

import pytest
import torch
from gpu_batches import embedded, same_bits

import tvm_infer

pytestmark = pytest.mark.family("merge_states")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# half a unit in the last place of the result, norm-wise at most; float32: rounding of three products and two exponentials
TOLERANCE = {"bf16": 2**-8, "fp16": 2**-11, "fp32": 1e-6}


def states(shape, dtype, device, views="plain", seed=0):
    """Two (o, lse); every sixth row has -inf on the left, on the right, on both sides."""
    generator = torch.Generator(device).manual_seed(seed)
    result = []
    for side in range(2):
        o, _ = embedded(shape, dtype, device, views)
        lse, _ = embedded(shape[:2], torch.float32, device, "plain" if views == "plain" else "offset")
        o.copy_(torch.randn(shape, device=device, generator=generator))
        lse.copy_(torch.randn(shape[:2], device=device, generator=generator) * 5)
        flat = torch.arange(shape[0], device=device)
        empty = ((flat % 6 == side) | (flat % 6 == 2))[:, None].expand(shape[:2])
        lse[empty] = -math.inf
        o[empty] = 0
        result.append((o, lse))
    return result


def reference(o_a, lse_a, o_b, lse_b):
    o_a, lse_a, o_b, lse_b = (x.double() for x in (o_a, lse_a, o_b, lse_b))
    lse = torch.logaddexp(lse_a, lse_b)
    lse = torch.where(torch.isneginf(lse_a) & torch.isneginf(lse_b), -math.inf, lse)
    weights = [torch.where(torch.isneginf(x), 0.0, torch.exp(x - lse)) for x in (lse_a, lse_b)]
    return o_a * weights[0][..., None] + o_b * weights[1][..., None], lse


def assert_merged(o, lse, expected, expected_lse, dtype):
    assert bool(torch.isfinite(o).all())
    if o.numel():
        assert float((o.double() - expected).norm() / expected.norm()) <= TOLERANCE[dtype]
    seen = torch.isfinite(expected_lse)
    assert torch.equal(torch.isneginf(lse), ~seen)
    assert bool(((lse.double() - expected_lse)[seen].abs() <= 1e-5).all())
    assert bool((o[~seen] == 0).all())


SHAPES = [(1, 1, 8), (12, 9, 64), (130, 32, 128), (37, 71, 128), (1025, 8, 64), (13, 3, 256), (7, 5, 24)]


@pytest.mark.subset
@pytest.mark.parametrize("views", ["plain", "offset", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [pytest.param(s, id="x".join(map(str, s)), marks=[pytest.mark.sanitize] if s[0] == 37 else []) for s in SHAPES],
)
def test_merge(shape, dtype, views, device):
    (o_a, lse_a), (o_b, lse_b) = states(shape, DTYPES[dtype], device, views)
    out, base = embedded(shape, DTYPES[dtype], device, views)
    lse, _ = embedded(shape[:2], torch.float32, device, "plain")
    expected = reference(o_a, lse_a, o_b, lse_b)
    got = tvm_infer.merge(o_a, lse_a, o_b, lse_b, out=out, lse=lse)
    assert got[0] is out and got[1] is lse
    assert_merged(out, lse, *expected, dtype)
    assert int(torch.isnan(base).sum()) == base.numel() - out.numel()


@pytest.mark.subset
@pytest.mark.parametrize("into", ["a", "b", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_may_be_inputs(into, dtype, device):
    (o_a, lse_a), (o_b, lse_b) = states((130, 8, 128), DTYPES[dtype], device, seed=1)
    expected = reference(o_a, lse_a, o_b, lse_b)
    fresh = tvm_infer.merge(o_a, lse_a, o_b, lse_b)
    outputs = {"a": {"out": o_a, "lse": lse_a}, "b": {"out": o_b, "lse": lse_b}, "none": {}}[into]
    o, lse = tvm_infer.merge(o_a, lse_a, o_b, lse_b, **outputs)
    assert_merged(o, lse, *expected, dtype)
    assert same_bits(o, fresh[0]) and same_bits(lse, fresh[1])


@pytest.mark.subset
@pytest.mark.parametrize("dtype", DTYPES)
def test_identity(dtype, device):
    """-inf on one side gives the other side to the last bit; garbage there is not looked at."""
    (o_a, lse_a), (o_b, lse_b) = states((24, 8, 64), DTYPES[dtype], device, seed=2)
    o_a.normal_()
    lse_a.normal_()
    lse_b.fill_(-math.inf)
    o_b.fill_(math.nan)
    for arguments in ((o_a, lse_a, o_b, lse_b), (o_b, lse_b, o_a, lse_a)):
        o, lse = tvm_infer.merge(*arguments)
        assert same_bits(o, o_a) and same_bits(lse, lse_a)


@pytest.mark.subset
def test_large_lse_does_not_overflow(device):
    (o_a, lse_a), (o_b, lse_b) = states((12, 4, 64), torch.float32, device, seed=3)
    for shift in (800.0, -800.0):
        expected = reference(o_a, lse_a + shift, o_b, lse_b + shift)
        o, lse = tvm_infer.merge(o_a, lse_a + shift, o_b, lse_b + shift)
        assert bool(torch.isfinite(o).all())
        assert float((o.double() - expected[0]).norm() / expected[0].norm()) <= 1e-4  # 800 + x keeps 5e-5 of x
        seen = torch.isfinite(expected[1])
        assert float((lse.double() - expected[1])[seen].abs().max()) <= 2e-4


@pytest.mark.subset
@pytest.mark.parametrize("shape", [(0, 4, 64), (5, 0, 64)])
def test_nothing_to_merge(shape, device):
    (o_a, lse_a), (o_b, lse_b) = states(shape, torch.bfloat16, device)
    o, lse = tvm_infer.merge(o_a, lse_a, o_b, lse_b)
    assert o.shape == shape and lse.shape == shape[:2]


@pytest.mark.subset
@pytest.mark.family("merge_states", "attention_sm90")
def test_merging_two_halves_is_attention_over_both(device):
    """Keys cut at 700 of 1300, the halves attended apart and merged."""
    from gpu_batches import Batch, Case, Request, plain_attention

    whole = Batch(Case("halves", mask="full", lengths=((20, 1), (1300, 1300))), device)
    halves = []
    for cut in (slice(0, 700), slice(700, None)):
        parts = [Request(r.q, r.k[cut], r.v[cut]) for r in whole.requests]
        halves += Batch(whole.case, device, requests=parts).attend()
    o, lse = tvm_infer.merge(*halves)
    expected = [
        plain_attention(*(x.double() for x in (r.q, r.k, r.v)), sm_scale=whole.sm_scale, causal=False, window=-1)
        for r in whole.requests
    ]
    ref, ref_lse = (torch.cat([e[i] for e in expected]) for i in range(2))
    assert float((o.double() - ref).norm() / ref.norm()) <= 6e-3
    assert float((lse.double() - ref_lse).abs().max()) <= 1e-4
