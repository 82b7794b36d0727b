"""Keys and values of 8 bits on a device: attention against float64 of what the cache holds, and the bytes that appends store.

Scales have three bits of mantissa, so that every value (element * scale) is one of bfloat16 and float16 too: what plain torch loses in
these types is the measure here as elsewhere.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from gpu_batches import DTYPES, HEADS, SHAPES, Batch, Case, Request, make_requests, same_bits

import tvm_infer

FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
NAMES = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
NAN = 0x7F


@dataclasses.dataclass(frozen=True)
class Float8Case(Case):
    float8: str = "e4m3"
    by_head: bool = True  # scales of each KV head, or of all

    @property
    def name(self) -> str:
        return f"{self.float8}-{super().name}-{'heads' if self.by_head else 'one'}"

    @property
    def kernel(self) -> str:
        return f"attention_{self.dtype}_{self.float8}_h{self.head_dim}_p{self.page_size}"


class Float8Batch(Batch):
    """A batch whose keys and values are elements times scales, and whose cache holds the elements. NaN wherever nothing may be read."""

    def __init__(
        self, case: Float8Case, device: str, seed: int = 0, requests: list[Request] | None = None, appended: bool = True
    ) -> None:
        heads = case.heads[1]
        steps = torch.arange(heads) % 4 if case.by_head else torch.ones(heads)
        self.k_scales, self.v_scales = ((2.0**e * (1 + steps / 4)).to(device, torch.float32) for e in (-5, -6))
        self.float8 = FLOAT8[case.float8]
        kept = [
            Request(r.q, self._values(r.k, self.k_scales), self._values(r.v, self.v_scales))
            for r in requests or make_requests(case, device, seed)
        ]
        super().__init__(case, device, seed, kept, appended)
        self.values = self.cache
        self._quantise_cache()

    def _values(self, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return ((x.float() / scales[:, None]).to(self.float8).float() * scales[:, None]).to(x.dtype)

    def _quantise_cache(self) -> None:
        """Elements in place of values, at the same strides in elements: with views a row and 16 bytes ahead."""
        nhd = self.case.layout.startswith("NHD")
        parts = self.values if isinstance(self.values, tuple) else (self.values,)
        stored, self.bases = [], []
        for i, values in enumerate(parts):
            shape = tuple(values.shape)
            ahead = 0 if self.case.views == "plain" else 1
            base = torch.full(
                [n + 2 * ahead if axis == 0 else n for axis, n in enumerate(shape[:-1])] + [shape[-1] + 16 * ahead],
                NAN, dtype=torch.uint8, device=self.device,
            )  # fmt: skip
            view = base[ahead : ahead + shape[0], ..., 16 * ahead :].view(self.float8)
            scales = (
                (self.k_scales, self.v_scales)[i] if len(parts) == 2 else torch.stack([self.k_scales, self.v_scales])
            )
            scales = scales[..., None, :, None] if nhd else scales[..., :, None, None]
            view.copy_((values.float() / scales).to(self.float8))
            stored.append(view), self.bases.append(base)
        self.cache = tuple(stored) if len(parts) == 2 else stored[0]

    def poison(self, seen) -> int:
        hidden = super().poison(seen)
        self._quantise_cache()
        return hidden

    @property
    def scales(self) -> dict:
        if self.case.by_head:
            return {"k_scale": self.k_scales, "v_scale": self.v_scales}
        return {"k_scale": float(self.k_scales[0]), "v_scale": float(self.v_scales[0])}

    def attend(self, plan=None, **changes):
        plan = self.plan(kv_dtype=NAMES[self.case.float8]) if plan is None else plan
        return super().attend(plan, **self.scales, **changes)


def same_elements(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Byte for byte; a NaN is a NaN of either sign."""
    x, y = (t.view(torch.uint8) for t in (a, b))
    return bool(((x == y) | ((x | 0x80) == 0xFF) & ((y | 0x80) == 0xFF)).all())


def cases() -> list[Float8Case]:
    """Every kernel twice at least, other settings in turn."""
    kernels = list(itertools.product((64, 80, 96, 128, 192, 256), (16, 32, 64), DTYPES, FLOAT8))
    masks, groups = ("causal", "w15", "w100", "full", "causal"), list(HEADS)
    made = [
        Float8Case(
            shape=[s for s in SHAPES if s != "no-keys"][i % 7],
            mask=masks[i % 5],
            split=("auto", "cut96", "whole", "auto")[(i + turn) % 4],
            dtype=dtype,
            head_dim=head_dim,
            page_size=page_size,
            layout=("HND", "NHD", "HND2", "NHD2")[(i + i // 4) % 4],
            group=groups[(5 * i + 3) % len(groups)],
            views=("plain", "strided")[(i // 2 + turn) % 2],
            scale=("", "", "sharp")[(i + turn) % 3],
            float8=kv,
            by_head=i % 3 != 1,
        )
        for turn in range(2)
        for i, (head_dim, page_size, dtype, kv) in enumerate(kernels, turn * len(kernels))
    ]
    longs = ((1, 2, 400), (40000, 9000, 12345))
    made += [
        Float8Case("long", lengths=longs, group=8),
        Float8Case("long", lengths=longs, group=4, page_size=64, float8="e5m2", dtype="fp16", mask="w333"),
        Float8Case("alike", lengths=((1,) * 133, (300,) * 133), page_size=32, split="whole"),
        Float8Case("one-key", lengths=((1,), (1,))),
        Float8Case("one-prompt", lengths=((1025,), (3073,)), group=5, page_size=32, layout="NHD", head_dim=256),
        Float8Case("no-keys", mask="full", group=3, float8="e5m2"),
        *(Float8Case("long", lengths=longs, group=8, head_dim=head_dim) for head_dim in (64, 96, 192)),
        *(Float8Case("alike", lengths=((1,) * 133, (300,) * 133), head_dim=head_dim) for head_dim in (64, 80, 192)),
    ]
    return list({c.name + str(c.lengths): c for c in made}.values())


CASES = cases()
SMALL = ("decode", "idle", "no-keys", "one-key")


def params(made: list[Float8Case]) -> list:
    return [pytest.param(c, id=c.name, marks=[pytest.mark.subset] if c.shape in SMALL else []) for c in made]


@pytest.mark.subset
def test_cases_meet_every_kernel():
    assert len({c.kernel for c in CASES}) == 72 and len({c.name + str(c.lengths) for c in CASES}) == len(CASES) >= 150


@pytest.mark.family("attention_sm90")
@pytest.mark.parametrize("case", params(CASES))
def test_matrix(case, device, note):
    batch = Float8Batch(case, device)
    o, lse = batch.attend()
    errors = batch.errors(o, lse)
    errors.assert_small()
    batch.assert_margins()
    note(errors)


def appending() -> list[Float8Case]:
    lengths = ((2, 17, 40, 100, 0, 129), (17, 33, 512, 1111, 5, 200))
    return [
        Float8Case("crossing", lengths=lengths, dtype=d, float8=kv, page_size=p, layout=layout, group=g, views=v, head_dim=h, by_head=b)
        for d, kv, p, layout, g, v, h, b in (
            ("bf16", "e4m3", 16, "HND", 4, "plain", 128, True),
            ("fp16", "e4m3", 32, "NHD2", 1, "strided", 256, False),
            ("bf16", "e5m2", 64, "NHD", 71, "strided", 128, True),
            ("fp16", "e5m2", 16, "HND2", 8, "plain", 128, True),
            ("bf16", "e4m3", 16, "NHD", 7, "strided", 64, True),
            ("fp16", "e4m3", 64, "HND", 4, "plain", 80, False),
            ("bf16", "e5m2", 32, "NHD2", 3, "strided", 192, True),
        )
    ]  # fmt: skip


@pytest.mark.subset
@pytest.mark.family("append")
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in appending()])
def test_append_writes_its_slots_alone(case, device):
    """All memory of the cache, what lies between its strides included."""
    batch, full = Float8Batch(case, device, appended=False), Float8Batch(case, device)
    lengths = {"qo_indptr": batch.device_qo_indptr, "kv_len": batch.device_kv_len}
    tvm_infer.append(batch.k_new, batch.v_new, batch.cache, **lengths, **batch.tables, **batch.scales)
    for got, expected in zip(batch.bases, full.bases, strict=True):
        assert same_elements(got, expected)


@pytest.mark.subset
@pytest.mark.family("append", "attention_sm90")
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in appending()])
def test_append_attention_is_append_then_attention(case, device, note):
    one, full = Float8Batch(case, device, appended=False), Float8Batch(case, device)
    plan = one.plan(kv_dtype=NAMES[case.float8])
    o, lse = full.attend(full.plan(kv_dtype=NAMES[case.float8]))
    out, one_lse = one.outputs()
    tvm_infer.append_attention(
        one.q, one.k_new, one.v_new, one.cache, plan, **one.tables, **one.scales, out=out, lse=one_lse,
        workspace=one.workspace(plan),
    )  # fmt: skip
    assert same_bits(o, out) and same_bits(lse, one_lse)
    for got, expected in zip(one.bases, full.bases, strict=True):
        assert same_elements(got, expected)
    errors = one.errors(out, one_lse)
    errors.assert_small()
    note(errors)


def hard_values(dtype: torch.dtype, kv: str, scale: torch.Tensor) -> torch.Tensor:
    """[num_tokens, 2, 64]: every element, what lies half way between two, near it, beyond the largest, and what is no number."""
    codes = torch.arange(256, dtype=torch.uint8).view(FLOAT8[kv]).double()
    finite = codes[torch.isfinite(codes)].unique()
    halves = (finite[1:] + finite[:-1]) / 2
    some = torch.randn(3000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 50
    others = torch.tensor(
        [0.0, -0.0, 449.0, 464.0, 61440.0, 1e30, -1e30, math.inf, -math.inf, math.nan], dtype=torch.float64
    )
    x = torch.cat([codes, halves, halves * (1 + 2.0**-8), halves * (1 - 2.0**-8), finite * 1e-3, some, others])
    x = x[torch.arange(-(-x.numel() // 128) * 128) % x.numel()].view(-1, 2, 64)
    return (x * scale.double().cpu()[:, None]).to(dtype)


@pytest.mark.subset
@pytest.mark.family("append")
@pytest.mark.parametrize(("dtype", "kv"), list(itertools.product(DTYPES, FLOAT8)))
@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.37, 2.0**-6), (3.0, 1e-4)])
def test_rounding_is_that_of_the_host(dtype, kv, scale, device):
    """Byte for byte what the CPU executor stores, which is tested against ml_dtypes."""
    scales = torch.tensor(scale)
    x = hard_values(DTYPES[dtype], kv, scales)
    num_pages = -(-len(x) // 16)
    stored = []
    for where in ("cpu", device):
        cache = torch.full((num_pages, 2, 2, 16, 64), NAN, dtype=torch.uint8, device=where).view(FLOAT8[kv])
        tables = [
            torch.tensor(t, dtype=torch.int32, device=where)
            for t in ([0, len(x)], [len(x)], [0, num_pages], range(num_pages))
        ]
        names = ("qo_indptr", "kv_len", "kv_page_indptr", "kv_page_indices")
        new, by_head = x.to(where), scales.to(where)
        tvm_infer.append(new, new, cache, **dict(zip(names, tables, strict=True)), k_scale=by_head, v_scale=by_head)
        stored.append(cache.cpu())
    assert same_elements(*stored)


@pytest.mark.subset
@pytest.mark.family("attention_sm90")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scale", [1e-9, 1e-38])
def test_rows_of_zeros_see_all_keys_alike(scale, dtype, device):
    """A head that was pruned, with a scale that nearly is none: O is the mean of the values, LSE the logarithm of their number."""
    n, m = 40, 300
    cache = torch.randint(0, 100, (19, 2, 2, 16, 128), dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    plan = tvm_infer.plan(
        [0, n], [m], num_qo_heads=8, num_kv_heads=2, head_dim=128, dtype=dtype, kv_dtype="float8_e4m3fn", device=device,
        fixed_split_size=64,
    )  # fmt: skip
    q = torch.zeros((n, 8, 128), dtype=getattr(torch, dtype), device=device)
    tables = {
        "kv_page_indptr": torch.tensor([0, 19], dtype=torch.int32, device=device),
        "kv_page_indices": torch.arange(19, dtype=torch.int32, device=device),
    }
    o, lse = tvm_infer.attention(q, cache, plan, **tables, k_scale=scale, return_lse=True)
    values = cache[:, 1].float().transpose(1, 2).reshape(-1, 2, 128).double()
    seen = torch.arange(m - n + 1, m + 1, device=device)
    expected = (values.cumsum(0)[m - n : m] / seen[:, None, None]).repeat_interleave(4, 1)
    torch.testing.assert_close(o.double(), expected, rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(lse.double(), seen.double().log()[:, None].expand(-1, 8), rtol=0, atol=1e-3)


@pytest.mark.subset
@pytest.mark.family("rope_append")
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in appending()])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_append(case, interleaved, device):
    """Values byte for byte, keys the host's but for those beside a boundary (angles differ by 3e-7), queries as without 8 bits."""
    batch = Float8Batch(case, device, appended=False)
    rope = tvm_infer.RopeConfig(case.head_dim // 32 * 16, 10000.0, interleaved=interleaved)
    lengths = {"qo_indptr": batch.device_qo_indptr, "kv_len": batch.device_kv_len}
    arguments = [batch.q, batch.k_new, batch.v_new]
    out = tvm_infer.rope_append(*arguments, batch.cache, rope=rope, **lengths, **batch.tables, **batch.scales)
    plain = Batch(case, device, requests=batch.requests, appended=False)
    expected = tvm_infer.rope_append(*arguments, plain.cache, rope=rope, **lengths, **plain.tables)
    assert same_bits(out, expected)
    requests = [Request(r.q.cpu(), r.k.cpu(), r.v.cpu()) for r in batch.requests]
    there = Float8Batch(case, "cpu", requests=requests, appended=False)
    for name in ("q", "k_new", "v_new"):
        getattr(there, name).copy_(getattr(batch, name))
    host = {"qo_indptr": there.device_qo_indptr, "kv_len": there.device_kv_len}
    scales = {n: s.cpu() if torch.is_tensor(s) else s for n, s in batch.scales.items()}
    tvm_infer.rope_append(there.q, there.k_new, there.v_new, there.cache, rope=rope, **host, **there.tables, **scales)
    for got, base in zip(batch.bases, there.bases, strict=True):
        a, b = (x.cpu().to(torch.int16) for x in (got, base))
        assert (a != b).float().mean() < 1e-3
        assert ((a - b).abs() <= 1).logical_or((a | b) == 0x80).all()  # neighbours in the same sign; 0 and -0


@pytest.mark.family("kv_cache")
@pytest.mark.parametrize(
    ("kv", "dtype", "head_dim", "page_size"),
    [("e4m3", "bf16", 128, 16), ("e5m2", "fp16", 256, 64), ("e4m3", "bf16", 64, 16), ("e5m2", "bf16", 96, 32)],
)
def test_a_cache_is_that_of_the_host(cuda, kv, dtype, head_dim, page_size):
    """Prefill, decode, forks and copies: the same bytes in the pages, outputs as far apart as two kernels' may be."""
    made = {}
    for where in ("cpu", cuda):
        cache = tvm_infer.PagedKVCache(
            num_layers=2, num_qo_heads=8, num_kv_heads=2, head_dim=head_dim, dtype=DTYPES[dtype], kv_dtype=FLOAT8[kv],
            k_scale=[[0.02, 0.03], [0.01, 0.05]], v_scale=[0.02, 0.01], page_size=page_size, num_pages=40, max_batch=4,
            max_tokens=300, device=where,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        cache.add_sequence(0)
        outputs = []
        for ids, counts in (([0], [150]), ([0], [1]), ([0, 1], [1, 5]), ([1, 0], [1, 1])):
            if len(ids) == 2 and 1 not in cache:
                cache.fork_sequence(0, 1, 140)
            with cache.forward(ids, counts) as step:
                for layer in range(2):
                    new = [
                        torch.randn((sum(counts), h, head_dim), generator=generator).to(DTYPES[dtype])
                        for h in (8, 2, 2)
                    ]
                    outputs.append(step.attention(layer, *(x.to(where) for x in new)).cpu())
        made[where] = (outputs, [x for seq in (0, 1) for layer in range(2) for x in cache.gather(seq, layer)])
    for ours, theirs in zip(made[cuda][1], made["cpu"][1], strict=True):
        assert np.array_equal(ours.cpu().view(torch.uint8).numpy(), theirs.view(np.uint8))
    for ours, theirs in zip(made[cuda][0], made["cpu"][0], strict=True):
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < {"bf16": 8e-3, "fp16": 1e-3}[dtype]


@pytest.mark.family("kv_cache")
def test_a_graph_replays_with_other_scales_and_lengths(cuda):
    """Scales lie at fixed addresses: a graph sees those that were set after its capture."""
    settings = {
        "num_layers": 1, "num_qo_heads": 8, "num_kv_heads": 2, "head_dim": 128, "dtype": "bfloat16", "kv_dtype": "float8_e4m3fn",
        "num_pages": 32, "max_batch": 2, "max_tokens": 64, "device": cuda,
    }  # fmt: skip
    cache, eager = tvm_infer.PagedKVCache(**settings), tvm_infer.PagedKVCache(**settings)
    q, k, v = (torch.randn((1, h, 128), device=cuda, dtype=torch.bfloat16) for h in (8, 2, 2))
    out = torch.empty_like(q)
    cache.add_sequence(0)
    with cache.forward([0], [1]) as step:
        step.attention(0, q, k, v, out=out)
    cache.begin_forward([0], [1])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.attention(0, q, k, v, out=out)
    cache.end_forward()
    cache.clear()
    for c in (cache, eager):
        c.set_scales(0.02, 0.03)
        c.add_sequence(0)
    for _ in range(20):
        for x in (q, k, v):
            x.normal_()
        with cache.forward([0], [1]):
            graph.replay()
        with eager.forward([0], [1]) as step:
            expected = step.attention(0, q, k, v)
        assert same_bits(out, expected)
    torch.cuda.synchronize()
