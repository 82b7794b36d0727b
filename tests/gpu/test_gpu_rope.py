"""rope_append rotates queries and keys as float64 does, writes its slots and outputs, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gpu_batches import Batch, Case, bits, embedded, make_plan, plain_attention, same_bits

import tvm_infer
from tvm_infer import PagedKVCache, RopeConfig, _array, _ffi

pytestmark = pytest.mark.family("rope_append")

LENGTHS = {
    "decode": ((1,) * 9, (1, 15, 16, 17, 64, 65, 129, 1000, 8)),
    "prompts": ((1, 15, 16, 17, 130, 257), (1, 15, 16, 17, 130, 257)),
    "crossing": ((2, 17, 40, 100, 129), (17, 33, 512, 1111, 200)),
    "idle": ((0, 1, 0, 5, 0), (10, 100, 0, 80, 0)),
    "many": (tuple(i % 4 for i in range(150)), tuple(i % 4 + 7 * i % 90 for i in range(150))),
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
# half the distance between neighbours, relative to the value; and below fp16's smallest normal number
ROUNDING = {"bf16": (2.0**-8, 0.0), "fp16": (2.0**-11, 2.0**-25)}
FLOAT_ERROR = 4e-6  # of float32 arithmetic on elements of up to 5


@dataclasses.dataclass(frozen=True)
class Rope:
    case: Case
    config: RopeConfig
    by: str = "lengths"  # or "plan"
    padding: int = 0

    @property
    def name(self) -> str:
        c = self.config
        kind = "pairs" if c.interleaved else "halves"
        return f"{self.case.name}-{c.rope_type}-{kind}{c.rotary_dim}-{self.by}-pad{self.padding}"


def rope(shape, dtype, dim, page, layout, group, views, config, by="lengths", padding=0) -> Rope:
    case = Case(
        shape,
        lengths=LENGTHS[shape],
        dtype=dtype,
        head_dim=dim,
        page_size=page,
        layout=layout,
        group=group,
        views=views,
    )
    return Rope(case, config, by, padding)


MATRIX = [
    rope("decode", "bf16", 128, 16, "HND", 4, "plain", RopeConfig(128, 500000.0, scaling=LLAMA3), "plan"),
    rope("decode", "fp16", 64, 1, "NHD", 1, "offset", RopeConfig(64, interleaved=True), padding=7),
    rope("decode", "bf16", 64, 8, "HND2", 71, "strided", RopeConfig(32)),
    rope("decode", "bf16", 128, 64, "NHD2", 8, "strided", RopeConfig(128, scaling=YARN), "plan", 3),
    rope("prompts", "bf16", 128, 16, "NHD", 4, "strided", RopeConfig(128), "plan"),
    rope("prompts", "fp16", 64, 8, "HND", 3, "plain", RopeConfig(64), padding=64),
    rope("prompts", "bf16", 128, 1, "HND2", 5, "offset", RopeConfig(48, interleaved=True)),
    rope("prompts", "fp16", 128, 64, "NHD", 16, "offset", RopeConfig(128), "plan"),
    rope("crossing", "bf16", 128, 16, "HND2", 4, "offset", RopeConfig(128, 1e6), padding=1),
    rope("crossing", "fp16", 64, 32, "NHD2", 1, "strided", RopeConfig(16), "plan"),
    rope("crossing", "bf16", 128, 1, "NHD", 7, "plain", RopeConfig(0), padding=5),
    rope("crossing", "bf16", 64, 64, "HND", 64, "strided", RopeConfig(64, scale=0.25)),
    rope("crossing", "bf16", 80, 16, "HND", 4, "strided", RopeConfig(32), padding=2),
    rope("crossing", "fp16", 256, 16, "NHD", 3, "offset", RopeConfig(256, interleaved=True)),
    rope("crossing", "bf16", 16, 16, "HND", 8, "plain", RopeConfig(16)),
    rope("crossing", "fp16", 240, 8, "HND2", 1, "offset", RopeConfig(240)),
    rope("idle", "bf16", 128, 16, "HND", 4, "offset", RopeConfig(128), "plan"),
    rope("idle", "fp16", 64, 1, "NHD2", 3, "plain", RopeConfig(64), padding=9),
    rope("many", "bf16", 128, 16, "HND", 4, "plain", RopeConfig(128), "plan", 30),
    rope("many", "fp16", 64, 8, "NHD", 5, "strided", RopeConfig(64)),
]


def params(cases: list[Rope]) -> list:
    return [pytest.param(c, id=c.name, marks=[pytest.mark.sanitize] if i % 4 == 1 else []) for i, c in enumerate(cases)]


def rotated(x: torch.Tensor, positions: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    """float64, from the float32 frequencies that the op is given."""
    inv_freq = torch.from_numpy(config.inv_freq()).double().to(x.device)
    pairs = len(inv_freq)
    first = torch.arange(pairs, device=x.device) * (2 if config.interleaved else 1)
    second = first + (1 if config.interleaved else pairs)
    angles = positions.double()[:, None] * inv_freq
    cos, sin = config.magnitude() * angles.cos()[:, None], config.magnitude() * angles.sin()[:, None]
    out = x.double()
    a, b = out[..., first], out[..., second]
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out


def positions_of(batch: Batch) -> torch.Tensor:
    runs = [torch.arange(m - n, m) for n, m in zip(batch.qo, batch.kv, strict=True)]
    return torch.cat(runs).to(batch.device)


def assert_close(got: torch.Tensor, exact: torch.Tensor, dtype: str) -> None:
    relative, absolute = ROUNDING[dtype]
    excess = (got.double() - exact).abs() - (1.01 * relative * exact.abs() + absolute + FLOAT_ERROR)
    assert bool((excess <= 0).all()), float(excess.max())


def storages(batch: Batch) -> list[torch.Tensor]:
    """All memory of the cache, what surrounds its views included."""
    return [b for b in (batch.k_base, batch.v_base) if b is not None]


class Call:
    """q, k and v as slices of one projection with NaN in a head that nobody owns and in padding rows; an output inside poison."""

    def __init__(self, test: Rope, device: str, seed: int = 0) -> None:
        self.test = test
        self.batch = batch = Batch(test.case, device, seed=seed, appended=False)
        hq, hkv, dim = batch.num_qo_heads, batch.num_kv_heads, test.case.head_dim
        rows = batch.num_tokens + test.padding
        self.qkv, _ = embedded((rows, hq + 2 * hkv + 1, dim), batch.dtype, device, test.case.views)
        self.q, self.k, self.v = self.qkv[:, :hq], self.qkv[:, hq : hq + hkv], self.qkv[:, hq + hkv : hq + 2 * hkv]
        for mine, values in ((self.q, batch.q), (self.k, batch.k_new), (self.v, batch.v_new)):
            mine[: batch.num_tokens].copy_(values)
        self.out, self.out_base = embedded((rows, hq, dim), batch.dtype, device, test.case.views, fill=7.0)
        self.lengths = {"qo_indptr": batch.device_qo_indptr, "kv_len": batch.device_kv_len}
        if test.by == "plan":
            self.lengths = {"plan": batch.plan()}

    def run(self) -> torch.Tensor:
        return tvm_infer.rope_append(
            self.q,
            self.k,
            self.v,
            self.batch.cache,
            rope=self.test.config,
            out=self.out,
            **self.lengths,
            **self.batch.tables,
        )

    def new_slots(self, pages: torch.Tensor) -> torch.Tensor:
        """The new tokens' rows [num_tokens, num_kv_heads, head_dim] of a plane."""
        page_size, rows = self.test.case.page_size, []
        for r, (n, m) in enumerate(zip(self.batch.qo, self.batch.kv, strict=True)):
            slots = torch.arange(m - n, m, device=pages.device)
            rows.append(pages.permute(0, 2, 1, 3)[self.batch.pages[r][slots // page_size], slots % page_size])
        return torch.cat(rows)

    def check(self) -> None:
        """Q, K, V, padding, and every bit around them, against a cache that has the new tokens from the start."""
        test, batch, n = self.test, self.batch, self.batch.num_tokens
        positions = positions_of(batch)
        assert_close(self.out[:n], rotated(self.q[:n], positions, test.config), test.case.dtype)
        k = self.new_slots(batch.k_pages)
        assert_close(k, rotated(self.k[:n], positions, test.config), test.case.dtype)
        passing = test.config.rotary_dim
        assert same_bits(self.out[:n, :, passing:], self.q[:n, :, passing:])
        assert same_bits(k[..., passing:], self.k[:n, :, passing:])
        assert not bool(bits(self.out[n:]).any())
        self.out.fill_(7.0)
        assert bool((self.out_base == 7.0).all())
        full = Batch(test.case, batch.device)
        for pages, mine in ((full.k_pages, k),):  # the rotated keys, checked above
            start = 0
            for r, (count, m) in enumerate(zip(full.qo, full.kv, strict=True)):
                slots = torch.arange(m - count, m, device=pages.device)
                where = (full.pages[r][slots // test.case.page_size], slots % test.case.page_size)
                pages.permute(0, 2, 1, 3)[where] = mine[start : start + count]
                start += count
        for got, expected in zip(storages(batch), storages(full), strict=True):
            assert same_bits(got, expected)


@pytest.mark.subset
@pytest.mark.parametrize("test", params(MATRIX))
def test_against_float64(test, device):
    call = Call(test, device)
    assert call.run() is call.out
    call.check()


@pytest.mark.subset
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("position", [131_071, 1_000_003])
def test_angles_far_out(position, interleaved, device):
    """Where a float32 product would be off by 0.004 radians. Small elements, whose neighbours in float16 lie close."""
    config = RopeConfig(128, interleaved=interleaved)
    page, rows = 64, 5
    pages = -(-(position + rows) // page)
    used = position // page
    table = torch.zeros(pages, dtype=torch.int32)
    table[used:] = torch.arange(1, 1 + pages - used)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        (torch.randn((rows, h, 128), generator=generator) / 64).to(device=device, dtype=torch.float16)
        for h in (4, 1, 1)
    )
    cache = torch.full((1 + pages - used, 2, 1, page, 128), torch.nan, dtype=torch.float16, device=device)
    index = lambda values: torch.tensor(values, dtype=torch.int32, device=device)  # noqa: E731
    out = tvm_infer.rope_append(
        q,
        k,
        v,
        cache,
        rope=config,
        qo_indptr=index([0, rows]),
        kv_len=index([position + rows]),
        kv_page_indptr=index([0, pages]),
        kv_page_indices=table.to(device),
    )
    exact = rotated(q, torch.arange(position, position + rows, device=device), config)
    # rounding, and 3e-7 of angle and arithmetic on elements of at most 1/12
    assert bool(((out.double() - exact).abs() <= 2.0**-11 * exact.abs() + 2.0**-25 + 1e-7).all())
    assert bool(torch.isnan(cache[0]).all())


@pytest.mark.subset
def test_in_place(device):
    first, second = Call(MATRIX[5], device), Call(MATRIX[5], device)
    first.run()
    second.out = second.q
    second.run()
    assert same_bits(first.out, second.q)
    for a, b in zip(storages(first.batch), storages(second.batch), strict=True):
        assert same_bits(a, b)


@pytest.mark.subset
@pytest.mark.parametrize("padding", [0, 40])
@pytest.mark.parametrize("lengths", [((), ()), ((0, 0), (5, 0))], ids=["no-requests", "idle"])
def test_nothing_new(lengths, padding, device):
    case = Case("nothing", lengths=lengths)
    batch = Batch(case, device)
    before = bits(batch.k_base).clone()
    shape = (padding, batch.num_qo_heads, case.head_dim)
    q, out = (embedded(shape, batch.dtype, device, "plain", fill=3.0)[0] for _ in range(2))
    k, v = (embedded((padding, batch.num_kv_heads, case.head_dim), batch.dtype, device, "plain")[0] for _ in range(2))
    lengths_of = {"qo_indptr": batch.device_qo_indptr, "kv_len": batch.device_kv_len}
    tvm_infer.rope_append(q, k, v, batch.cache, rope=RopeConfig(128), out=out, **lengths_of, **batch.tables)
    assert not bool(out.any()) and torch.equal(before, bits(batch.k_base))


def test_a_graph_replays_with_other_lengths(cuda):
    """Lengths and tokens are read from the device at each replay; the launch before is a prior grid that it waits for."""
    test = dataclasses.replace(MATRIX[8], padding=0)
    call = Call(test, cuda)
    call.run()
    call.check()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.qkv.mul_(1.0)  # what the projection is in a model
        call.run()
    other = Call(dataclasses.replace(test, case=dataclasses.replace(test.case)), cuda, seed=3)
    for mine, theirs in ((call.qkv, other.qkv), *zip(storages(call.batch), storages(other.batch), strict=True)):
        mine.copy_(theirs)
    shorter = [m - 1 if n < m else m for n, m in zip(call.batch.qo, call.batch.kv, strict=True)]
    call.batch.device_kv_len.copy_(torch.tensor(shorter, dtype=torch.int32))
    other.batch.device_kv_len.copy_(torch.tensor(shorter, dtype=torch.int32))
    call.batch.kv_page_indptr.copy_(other.batch.kv_page_indptr)
    call.batch.kv_page_indices.copy_(other.batch.kv_page_indices)
    graph.replay()
    other.run()
    assert same_bits(call.out, other.out)
    for a, b in zip(storages(call.batch), storages(other.batch), strict=True):
        assert same_bits(a, b)


def test_a_refused_plan_makes_all_tokens_padding(cuda):
    """A plan of other heads reaches the kernel as bare memory only."""
    call = Call(MATRIX[0], cuda)
    before = [bits(b).clone() for b in storages(call.batch)]
    other = dataclasses.replace(MATRIX[0].case, group=8)
    plan = make_plan(call.batch.qo_indptr, call.batch.kv, other, cuda)
    call.lengths = {"plan": plan.device_buffer}
    call.run()
    assert not bool(call.out.any())
    for a, b in zip(before, storages(call.batch), strict=True):
        assert torch.equal(a, bits(b))


@pytest.mark.subset
@pytest.mark.family("rope_append", "attention_sm90")
def test_then_attention(device, note):
    """One plan for both: the rotated queries attend to the rotated keys, those from before and the new ones."""
    case = Case("crossing", lengths=LENGTHS["crossing"])
    config = RopeConfig(case.head_dim)
    batch = Batch(case, device, appended=False)
    plan = batch.plan()
    q = tvm_infer.rope_append(batch.q, batch.k_new, batch.v_new, batch.cache, rope=config, plan=plan, **batch.tables)
    assert_close(q, rotated(batch.q, positions_of(batch), config), case.dtype)
    batch.q = q
    for r, (n, m) in enumerate(zip(batch.qo, batch.kv, strict=True)):
        request, slots = batch.requests[r], torch.arange(m, device=device)
        where = (batch.pages[r][slots // case.page_size], slots % case.page_size)
        keys, positions = batch.k_pages.permute(0, 2, 1, 3), torch.arange(m, device=device)
        turned = rotated(request.k, positions, config)
        assert_close(keys[where][m - n :], turned[m - n :], case.dtype)
        keys[where[0][: m - n], where[1][: m - n]] = turned[: m - n].to(batch.dtype)
        # the reference sees what was rounded once, and not twice
        request.q, request.k = q[batch.qo_indptr[r] : batch.qo_indptr[r + 1]], keys[where]
    o, lse = batch.attend(plan)
    errors = batch.errors(o, lse)
    errors.assert_small()
    note(errors)


def make_cache(device: str, config: RopeConfig) -> PagedKVCache:
    cache = PagedKVCache(
        num_layers=2,
        num_qo_heads=8,
        num_kv_heads=2,
        head_dim=128,
        dtype="bfloat16",
        num_pages=64,
        max_batch=4,
        max_tokens=200,
        device=device,
    )
    cache.set_rope(config)
    for seq in range(3):
        cache.add_sequence(seq)
    return cache


def turned_by_the_call(cache, layer, qkv, config):
    """The same with the rotation among the arguments, q, k and v apart; rotated queries in memory of the caller's."""
    inv_freq = torch.from_numpy(config.inv_freq()).to(qkv.device)
    q, k, v = qkv.split([8, 2, 2], dim=1)
    rotated_q, out = (torch.full((len(q), 8, 128), torch.nan, device=q.device, dtype=q.dtype) for _ in range(2))
    q, k, v, inv_freq, rotated_q, o = (
        _array.as_tensor(x, "x", output=True) for x in (q, k, v, inv_freq, rotated_q, out)
    )
    call = _ffi.func("attention_with_kv_cache_rope")
    turn = (inv_freq, int(config.interleaved), config.magnitude())
    call(cache._handle, layer, q, k, v, *turn, 128**-0.5, 1, rotated_q, o)
    return out


@pytest.mark.subset
@pytest.mark.family("rope_append", "attention_sm90")
@pytest.mark.parametrize(
    "config", [RopeConfig(128, scaling=LLAMA3), RopeConfig(64, interleaved=True)], ids=["llama3", "pairs"]
)
def test_a_cache_takes_the_projection_as_it_is(config, device):
    """Steps of a cache, padding rows among them, against the rotation and the attention of everything in float64."""
    cache = make_cache(device, config)
    generator = torch.Generator().manual_seed(0)
    rows: list[list[torch.Tensor]] = [[], [], []]
    for lengths, padding in (([50, 1, 100], 0), ([1, 1, 1], 5), ([0, 70, 1], 1)):
        n = sum(lengths)
        qkv = torch.randn((n + padding, 12, 128), generator=generator).to(device=device, dtype=torch.bfloat16)
        qkv[n:] = torch.nan
        for seq, part in enumerate(qkv[:n].split(lengths)):
            rows[seq].append(part)
        cache.begin_step([0, 1, 2], lengths, num_rows=n + padding)
        first, second = (cache.attention_fused_qkv(layer, qkv) for layer in (0, 1))
        assert same_bits(first, second) and not bool(first[n:].any())
        assert same_bits(first, turned_by_the_call(cache, 0, qkv, config))
        cache.end_forward()
        for seq, got in enumerate(first[:n].split(lengths)):
            x = torch.cat(rows[seq]).double()
            positions = torch.arange(len(x), device=device)
            q, k = rotated(x[:, :8], positions, config), rotated(x[:, 8:10], positions, config)
            expected, _ = plain_attention(
                q[len(x) - len(got) :], k, x[:, 10:], sm_scale=128**-0.5, causal=True, window=-1
            )
            # q, k and o are rounded once each; plain torch, which rounds more, is at about 1e-2
            assert float((got.double() - expected).norm()) <= 8e-3 * float(expected.norm())


@pytest.mark.family("rope_append", "attention_sm90")
def test_a_graph_of_a_cache_step(cuda):
    """Captured once with four rows, replayed for steps of fewer tokens."""
    config = RopeConfig(128)
    one, other = make_cache(cuda, config), make_cache(cuda, config)
    qkv = torch.randn((150, 12, 128), device=cuda, dtype=torch.bfloat16)
    for cache in (one, other):
        with cache.forward([0, 1, 2], [50, 1, 99]) as step:
            for layer in (0, 1):
                step.attention_fused_qkv(layer, qkv)
    rows = torch.empty((4, 12, 128), device=cuda, dtype=torch.bfloat16)
    outs = [torch.empty((4, 8, 128), device=cuda, dtype=torch.bfloat16) for _ in range(2)]
    graph = torch.cuda.CUDAGraph()
    for i, lengths in enumerate(([1, 1, 1], [1, 0, 1], [2, 1, 1])):
        rows.copy_(torch.randn((4, 12, 128), device=cuda))
        one.begin_step([0, 1, 2], lengths, num_rows=4), other.begin_step([0, 1, 2], lengths, num_rows=4)
        if i == 0:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                for layer, out in enumerate(outs):
                    one.attention_fused_qkv(layer, rows, out=out)
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        for layer, out in enumerate(outs):
            assert same_bits(out, other.attention_fused_qkv(layer, rows))
        one.end_forward(), other.end_forward()
