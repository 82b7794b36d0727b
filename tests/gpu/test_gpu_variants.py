"""Attention variants on the device, through the public API, against float64: the standard library and some written here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from gpu_batches import VARIANT_BAND, Batch, Case, Errors, same_bits

import tvm_infer
from tvm_infer import errors, variant

pytestmark = pytest.mark.family("attention_sm90")

try:
    variant.Variant("probe", mask=lambda kv_pos: kv_pos >= 0)
except (errors.MissingDependencyError, ImportError) as error:
    pytest.skip(f"variants are traced by TVM's compiler: {error}", allow_module_level=True)


@dataclass(frozen=True)
class Where:
    """Of one request's scores [num_kv_heads, group, n, m]: batch, heads, positions, n and m as tensors that broadcast with them."""

    request: int
    head: torch.Tensor
    q_pos: torch.Tensor
    kv_pos: torch.Tensor
    n: int
    m: int


@dataclass(frozen=True)
class Row:
    """A variant, its parameters for a batch, and what it does in plain torch. `hidden`: besides the band."""

    variant: Any
    parameters: Callable[[Batch], dict[str, Any]] = lambda batch: {}
    logits: Callable[[torch.Tensor, Where, dict[str, Any]], torch.Tensor] = lambda s, at, p: s
    hidden: Callable[[Where, dict[str, Any]], torch.Tensor | None] = lambda at, p: None
    output: Callable[[torch.Tensor, torch.Tensor, Where, dict[str, Any]], torch.Tensor] = lambda o, lse, at, p: o
    masks: tuple[str, ...] = ("causal",)  # which of gpu_batches.MASKS its band is
    # of a request's queries and keys [tokens, heads, head_dim], their positions, and the request's length
    query: Callable[[torch.Tensor, torch.Tensor, int, dict[str, Any]], torch.Tensor] = lambda q, pos, m, p: q
    key: Callable[[torch.Tensor, torch.Tensor, int, dict[str, Any]], torch.Tensor] = lambda k, pos, m, p: k
    has_softmax: bool = True


def per_head(batch: Batch, low: float, high: float) -> torch.Tensor:
    return torch.linspace(low, high, batch.num_qo_heads, device=batch.device)


def random_bias(shape: tuple[int, ...], device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(3)
    return torch.randn(shape, generator=generator, device=device)


def packed(rows: list[np.ndarray], device: str) -> dict[str, torch.Tensor]:
    """Bits of every request one after the other, each from a byte of its own on; exactly as long as needed."""
    parts = [np.packbits(r.reshape(-1), bitorder="little") for r in rows]
    first = np.cumsum([0] + [8 * len(p) for p in parts])[:-1].astype(np.int32)
    return {
        "bits": torch.from_numpy(np.concatenate([*parts, np.zeros(0, np.uint8)])).to(device),
        "first_bit": torch.from_numpy(first).to(device),
    }


def random_bits(batch: Batch) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.random((n, m)) < 0.6 for n, m in zip(batch.qo, batch.kv, strict=True)]


def ancestors(batch: Batch) -> list[np.ndarray]:
    """A random tree of each request's queries."""
    rng = np.random.default_rng(8)
    trees = []
    for n in batch.qo:
        seen = np.eye(n, dtype=bool)
        for node in range(1, n):
            seen[node] |= seen[rng.integers(0, node)]
        trees.append(seen)
    return trees


def custom_hidden(at: Where, p: dict[str, Any]) -> torch.Tensor:
    return ~torch.from_numpy(p["rows"][at.request]).to(at.kv_pos.device)


def tree_hidden(at: Where, p: dict[str, Any]) -> torch.Tensor:
    seen = torch.ones((at.n, at.m), dtype=torch.bool)
    seen[:, at.m - at.n :] = torch.from_numpy(p["rows"][at.request])
    return ~seen.to(at.kv_pos.device)


def turned(x: torch.Tensor, pos: torch.Tensor, inv_freq: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """x [tokens, heads, head_dim], the first 2 * len(inv_freq) channels turned; angles in float64, products in x's type."""
    angle = pos.double()[:, None, None] * inv_freq.double()
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    n = 2 * inv_freq.shape[-1]
    a, b = (x[..., 0:n:2], x[..., 1:n:2]) if interleaved else (x[..., : n // 2], x[..., n // 2 : n])
    pair = (a * cos - b * sin, b * cos + a * sin)
    first = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([first, x[..., n:]], -1)


def frequencies(batch: Batch, n: int = 0, theta: float = 10000.0) -> torch.Tensor:
    config = tvm_infer.rope.RopeConfig(n or batch.case.head_dim, theta)
    return torch.from_numpy(config.inv_freq()).to(batch.device)


def weights(batch: Batch, low: float, high: float) -> torch.Tensor:
    return torch.linspace(low, high, batch.case.head_dim, device=batch.device)


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.to(x.dtype)


def places(pos: torch.Tensor, m: int) -> torch.Tensor:
    """Of `streaming` with 4 sinks and a window of 50."""
    return torch.where(pos < 4, pos, pos - max(m - 1 - 50 - 4, 0))


# Written here: what the library does not have.
decay = variant.Variant(
    "decay",
    logits=lambda value, q_pos, kv_pos, rate: value - rate * variant.sqrt(variant.to_float(abs(q_pos - kv_pos))),
    rate=variant.per_request(),
)
thirds = variant.Variant("thirds", mask=lambda kv_pos, qo_head, batch: (kv_pos + qo_head + batch) % 3 != 0)
gated = variant.Variant(
    "gated",
    logits=lambda value, kv_pos, qo_head, bias: value + bias[qo_head, kv_pos % 16],
    mask=lambda q_pos, kv_pos: kv_pos <= q_pos,
    output=lambda value, lse, q_pos, gate: value * variant.tanh(lse * 0.1 + gate)
    + variant.where(q_pos % 2 == 0, 0.25, 0.0),
    bias=variant.tensor(2, "bfloat16"),
    gate=variant.per_head("float16"),
)

# Channels are cut in keys and scaled in queries by head; pairs of the first 32 turn by positions that are halved.
odd_parts = variant.Variant(
    "odd_parts",
    query=lambda value, channel, qo_head, q_pos: value
    * variant.where(channel % 2 == 0, 1 + qo_head * 0.1, 1 - q_pos * 1e-4),
    key=lambda value, channel, kv_pos, kv_head: variant.maximum(value, -1.0 - kv_head)
    + variant.where(channel == kv_pos % 64, 0.5, 0),
    rope_rate=lambda pair, base, kv_len: variant.exp(pair * base) * variant.where(kv_len > 100, 0.5, 1.0),
    rope_position=lambda pos: pos // 2,
    rotary_dim=32,
    interleaved=True,
    base=variant.scalar(),
)


def odd_query(q: torch.Tensor, pos: torch.Tensor, m: int, p: dict[str, Any]) -> torch.Tensor:
    head, channel = (torch.arange(q.shape[i], device=q.device) for i in (1, 2))
    scaled = torch.where(channel % 2 == 0, 1 + head[:, None] * 0.1, 1 - pos[:, None, None] * 1e-4)
    return odd_turn(q * scaled.to(q.dtype), pos, m, p)


def odd_key(k: torch.Tensor, pos: torch.Tensor, m: int, p: dict[str, Any]) -> torch.Tensor:
    head, channel = (torch.arange(k.shape[i], device=k.device) for i in (1, 2))
    more = torch.where(channel == pos[:, None, None] % 64, 0.5, 0.0).to(k.dtype)
    return odd_turn(torch.maximum(k, (-1.0 - head[:, None]).to(k.dtype)) + more, pos, m, p)


def odd_turn(x: torch.Tensor, pos: torch.Tensor, m: int, p: dict[str, Any]) -> torch.Tensor:
    rate = torch.exp(torch.arange(16, device=x.device).double() * p["base"]) * (0.5 if m > 100 else 1.0)
    return turned(x, pos // 2, rate, interleaved=True)


ROWS = {
    "soft_cap": Row(
        variant.soft_cap,
        lambda batch: {"cap": 5.0},
        logits=lambda s, at, p: p["cap"] * torch.tanh(s / p["cap"]),
    ),
    "sliding_window": Row(variant.sliding_window, lambda batch: {"window": 100}, masks=("w100",)),
    "two_sided_window": Row(
        variant.two_sided_window,
        lambda batch: {"left": 40, "right": 5},
        hidden=lambda at, p: at.kv_pos - at.q_pos > 5,
        masks=("fullw40",),
    ),
    "logit_bias": Row(
        variant.logit_bias,
        # exactly as large as the batch needs: what lies behind belongs to somebody else
        lambda batch: {"bias": random_bias((batch.num_qo_heads, max(batch.qo), max(batch.kv)), batch.device)},
        logits=lambda s, at, p: s + p["bias"].to(s.dtype)[at.head, at.q_pos - (at.m - at.n), at.kv_pos],
    ),
    "chunked_local": Row(
        variant.chunked_local,
        lambda batch: {"chunk": 101},
        hidden=lambda at, p: torch.div(at.q_pos, 101, rounding_mode="floor")
        != torch.div(at.kv_pos, 101, rounding_mode="floor"),
        masks=("w100",),
    ),
    "alibi": Row(
        variant.alibi,
        lambda batch: {"slopes": per_head(batch, 0.001, 0.5)},
        logits=lambda s, at, p: s + p["slopes"].to(s.dtype)[at.head] * (at.kv_pos - at.q_pos).to(s.dtype),
    ),
    "attention_sink": Row(
        variant.attention_sink,
        lambda batch: {"sink": per_head(batch, -2.0, 9.0)},
        output=lambda o, lse, at, p: o * torch.sigmoid(lse - p["sink"].to(o.dtype)[at.head[..., 0]])[..., None],
    ),
    "sink_window": Row(
        variant.sink_window,
        lambda batch: {"sink": 4, "window": 50},
        hidden=lambda at, p: (at.kv_pos >= 4) & (at.q_pos - at.kv_pos > 50),
    ),
    "custom_mask": Row(
        variant.custom_mask,
        lambda batch: {"rows": random_bits(batch), **packed(random_bits(batch), batch.device)},
        hidden=custom_hidden,
        masks=("full",),
    ),
    "tree_mask": Row(
        variant.tree_mask,
        lambda batch: {"rows": ancestors(batch), **packed(ancestors(batch), batch.device)},
        hidden=tree_hidden,
        masks=("full",),
    ),
    "sigmoid_attention": Row(
        variant.sigmoid_attention,
        lambda batch: {"bias": -1.5},
        logits=lambda s, at, p: torch.sigmoid(s + p["bias"]),
        has_softmax=False,
    ),
    "qk_norm": Row(
        variant.qk_norm,
        lambda batch: {"q_weight": weights(batch, 0.2, 1.7), "k_weight": weights(batch, 1.4, -0.6), "eps": 1e-6},
        query=lambda q, pos, m, p: normed(q, p["q_weight"]),
        key=lambda k, pos, m, p: normed(k, p["k_weight"]),
    ),
    "rope": Row(
        variant.rope,
        lambda batch: {"inv_freq": frequencies(batch), "magnitude": 1.1},
        query=lambda q, pos, m, p: turned(q, pos, p["inv_freq"]) * 1.21,
        key=lambda k, pos, m, p: turned(k, pos, p["inv_freq"]),
    ),
    "rope_interleaved": Row(
        variant.rope_interleaved,
        lambda batch: {"inv_freq": frequencies(batch), "magnitude": 1.0},
        query=lambda q, pos, m, p: turned(q, pos, p["inv_freq"], True),
        key=lambda k, pos, m, p: turned(k, pos, p["inv_freq"], True),
    ),
    "rope_by_length": Row(
        variant.rope_by_length,
        lambda batch: {
            "short": frequencies(batch),
            "long": frequencies(batch, theta=1e6),
            "limit": 150,
            "magnitude": 1.0,
        },
        query=lambda q, pos, m, p: turned(q, pos, p["long" if m > 150 else "short"]),
        key=lambda k, pos, m, p: turned(k, pos, p["long" if m > 150 else "short"]),
    ),
    "streaming": Row(
        variant.streaming,
        lambda batch: {"sink": 4, "window": 50, "inv_freq": frequencies(batch)},
        query=lambda q, pos, m, p: turned(q, places(pos, m), p["inv_freq"]),
        key=lambda k, pos, m, p: turned(k, places(pos, m), p["inv_freq"]),
        hidden=lambda at, p: (at.kv_pos >= 4) & (at.q_pos - at.kv_pos > 50),
    ),
    "norm_and_partial_rope": Row(
        variant.qk_norm & variant.rotary(32),
        lambda batch: {
            "q_weight": weights(batch, 0.2, 1.7),
            "k_weight": weights(batch, 1.4, -0.6),
            "eps": 1e-6,
            "inv_freq": frequencies(batch, 32),
            "magnitude": 1.0,
        },
        query=lambda q, pos, m, p: turned(normed(q, p["q_weight"]), pos, p["inv_freq"]),
        key=lambda k, pos, m, p: turned(normed(k, p["k_weight"]), pos, p["inv_freq"]),
    ),
    "odd_parts": Row(odd_parts, lambda batch: {"base": -0.2}, query=odd_query, key=odd_key, masks=("full",)),
    "decay": Row(
        decay,
        lambda batch: {"rate": torch.linspace(0.01, 0.3, len(batch.qo), device=batch.device)},
        logits=lambda s, at, p: s - p["rate"][at.request].to(s.dtype) * (at.q_pos - at.kv_pos).abs().to(s.dtype).sqrt(),
        masks=("full",),
    ),
    "thirds": Row(thirds, hidden=lambda at, p: (at.kv_pos + at.head + at.request) % 3 == 0, masks=("full",)),
    "gated": Row(
        gated,
        lambda batch: {
            "bias": torch.linspace(-2, 2, batch.num_qo_heads * 16, device=batch.device).bfloat16().view(-1, 16),
            "gate": per_head(batch, -0.3, 0.4).half(),
        },
        logits=lambda s, at, p: s + p["bias"].to(s.dtype)[at.head, at.kv_pos % 16],
        output=lambda o, lse, at, p: (
            o * torch.tanh(lse * 0.1 + p["gate"].to(o.dtype)[at.head[..., 0]])[..., None]
            + torch.where(at.q_pos % 2 == 0, 0.25, 0.0).to(o.dtype)
        ),
    ),
}


def reference(
    row: Row, p: dict[str, Any], batch: Batch, r: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) of request r as one writes it in torch, in `dtype`."""
    request = batch.requests[r]
    q, k, v = (x.to(dtype) for x in (request.q, request.k, request.v))
    n, m, heads, kv_heads = len(q), len(k), batch.num_qo_heads, batch.num_kv_heads
    head = torch.arange(heads, device=q.device).view(kv_heads, -1, 1, 1)
    at = Where(
        r,
        head,
        torch.arange(n, device=q.device)[:, None] + (m - n),
        torch.arange(m, device=q.device)[None, :],
        n,
        m,
    )
    q, k = row.query(q, at.q_pos[:, 0], m, p), row.key(k, at.kv_pos[0], m, p)
    s = torch.einsum("nkgd,mkd->kgnm", q.view(n, kv_heads, -1, q.shape[-1]), k) * batch.sm_scale
    s = row.logits(s, at, p)
    hidden = torch.zeros((n, m), dtype=torch.bool, device=q.device)
    if batch.causal:
        hidden |= at.kv_pos > at.q_pos
    if batch.window >= 0:
        hidden |= at.kv_pos < at.q_pos - batch.window
    own = row.hidden(at, p)
    hidden = hidden if own is None else hidden | own
    s = s.masked_fill(hidden, -math.inf)
    lse = torch.logsumexp(s, -1)
    empty = torch.isneginf(lse)
    if row.has_softmax:
        shares = torch.softmax(s, -1).masked_fill(empty[..., None], 0.0)
    else:
        shares, lse = s.masked_fill(hidden, 0.0), lse.masked_fill(~empty, 0.0)
    o = torch.einsum("kgnm,mkd->kgnd", shares, v)
    o = row.output(o, lse, at, p).masked_fill(empty[..., None], 0.0)
    return o.permute(2, 0, 1, 3).reshape(n, heads, -1), lse.permute(2, 0, 1).reshape(n, heads)


def seen_in(band: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Whether a band shows the key at j to the query at p."""

    def seen(p: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        inside = (j >= p - band.window_left) | (band.window_left < 0)
        if band.chunk:
            inside &= torch.div(p, band.chunk, rounding_mode="floor") == torch.div(j, band.chunk, rounding_mode="floor")
        inside |= j < band.num_sink
        return inside & ((j <= p + band.window_right) | (band.window_right < 0))

    return seen


@dataclass
class VariantBatch:
    row: Row
    batch: Batch
    parameters: dict[str, Any] = field(init=False)
    bound: Any = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = self.row.parameters(self.batch)
        self.bound = self.row.variant.bind(**{k: v for k, v in self.parameters.items() if k != "rows"})

    def plan(self) -> Any:
        return self.batch.plan(**VARIANT_BAND | {"variant": self.bound})

    def attend(self, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.batch.attend(self.plan(), variant=self.bound, **changes)

    def errors(self, o: torch.Tensor, lse: torch.Tensor) -> Errors:
        total, rows = Errors(), []
        for r in range(len(self.batch.requests)):
            if not self.batch.qo[r]:
                continue
            at = slice(self.batch.qo_indptr[r], self.batch.qo_indptr[r + 1])
            ref, ref_lse = reference(self.row, self.parameters, self.batch, r, torch.float64)
            plain, _ = reference(self.row, self.parameters, self.batch, r, self.batch.dtype)
            seen = torch.isfinite(ref_lse)
            ok = torch.isfinite(o[at]).all() and bool((torch.isneginf(lse[at]) == ~seen).all())
            squares = [float((x.double() - ref).square().sum()) for x in (o[at], plain, ref.to(self.batch.dtype))]
            norm = float(ref.norm()) or 1e-300
            lse_error = float((lse[at].double() - ref_lse)[seen].abs().max()) if bool(seen.any()) else 0.0
            rows.append([*(x**0.5 / norm for x in squares), lse_error, float(ok), *squares, norm**2])
        total.set(rows)
        return total


SHAPES = ("decode", "append", "mixed", "verify")
STORES = (
    (16, 128, "bf16", 4, "auto"),
    (1, 128, "fp16", 7, "cut64"),
    (0, 64, "bf16", 16, "cut128"),
    (8, 64, "fp16", 1, "auto"),
)


def cases() -> list[Any]:
    made = []
    for i, (name, row) in enumerate(ROWS.items()):
        for j, shape in enumerate(SHAPES):
            for k, (page_size, head_dim, dtype, group, split) in enumerate(STORES):
                case = Case(
                    shape=shape,
                    mask=row.masks[0],
                    split=split,
                    dtype=dtype,
                    head_dim=head_dim,
                    page_size=page_size,
                    group=group,
                    views=("plain", "offset", "strided")[(i + j + k) % 3],
                )
                marks = [pytest.mark.subset] if (i + j) % 4 == 0 and k == 0 and shape == "verify" else []
                made.append(pytest.param(name, case, id=f"{name}-{case.name}", marks=marks))
    return made


# What the hardware's tanh loses in a logit, times the cap, and sqrt's in `decay`; LSE of float32 otherwise.
LSE_TOLERANCE = {"soft_cap": 5e-3, "gated": 2e-4, "decay": 2e-4}
# Queries and keys that a variant changed are rounded to their type again, as they are where other kernels change them.
CHANGED_LSE_TOLERANCE = {"bf16": 2e-2, "fp16": 2e-3}


def lse_tolerance(name: str, dtype: str) -> float:
    changes = {"query", "key", "rope_rate"} & ROWS[name].variant.holes.keys()
    return CHANGED_LSE_TOLERANCE[dtype] if changes else LSE_TOLERANCE.get(name, 1e-4)


def assert_is_right(batch: VariantBatch, name: str, dtype: str, note) -> None:
    """A poisoned batch of variant `name` against float64; nothing around its outputs is written."""
    o, lse = batch.attend()
    errors = batch.errors(o, lse)
    note(errors)
    batch.batch.assert_margins()
    assert errors.ok
    assert errors.ratio <= 2.0, errors
    assert errors.lse <= lse_tolerance(name, dtype), errors


@pytest.mark.parametrize(("name", "case"), cases())
def test_variant(name, case, device, note):
    """Every variant on decode, append, mixed and short-prompt batches, cut and whole, paged, gathered, ragged; NaN outside its band."""
    batch = VariantBatch(ROWS[name], Batch(case, device))
    hidden = batch.batch.poison(seen_in(batch.bound.band))
    assert hidden > 0 or batch.bound.band.window_left < 0
    assert_is_right(batch, name, case.dtype, note)


@pytest.mark.subset
@pytest.mark.parametrize("name", ["soft_cap", "alibi", "attention_sink", "custom_mask"])
def test_another_variant_is_seen(name, device):
    """What `errors` is there for: the same batch without its variant is no result of it."""
    row = ROWS[name]
    batch = VariantBatch(row, Batch(Case("verify", mask=row.masks[0]), device))
    o, lse = batch.batch.attend()
    errors = batch.errors(o, lse)
    assert not (errors.ok and errors.ratio <= 2.0 and errors.lse <= 1e-2)


@pytest.mark.parametrize("name", ["soft_cap", "alibi", "gated"])
def test_a_row_does_not_depend_on_its_batch(name, device):
    """With fixed_split_size the bits of a request are those that it has alone."""
    row = ROWS[name]
    case = Case("mixed", split="cut96", mask=row.masks[0])
    whole = VariantBatch(row, Batch(case, device))
    o, lse = whole.attend()
    for r in (1, 3):
        alone = Batch(
            Case("alone", split="cut96", mask=row.masks[0], lengths=((case.qo[r],), (case.kv[r],))),
            device,
            requests=[whole.batch.requests[r]],
        )
        own, own_lse = alone.attend(alone.plan(**VARIANT_BAND | {"variant": whole.bound}), variant=whole.bound)
        at = slice(whole.batch.qo_indptr[r], whole.batch.qo_indptr[r + 1])
        assert same_bits(own, o[at]) and same_bits(own_lse, lse[at])


@pytest.mark.parametrize("page_size", [16, 1])
def test_scalars_change_without_compiling(page_size, cuda):
    """One kernel, other scalars: results follow; a second call of the first gives its bits again."""
    row = ROWS["soft_cap"]
    batch = VariantBatch(row, Batch(Case("verify", page_size=page_size), cuda))
    first, _ = batch.attend()
    first = first.clone()
    other = row.variant.bind(cap=1.0)
    second, _ = batch.batch.attend(variant=other)
    assert not same_bits(first, second)
    again, _ = batch.attend()
    assert same_bits(first, again)


def test_in_a_graph_tables_are_read_at_each_replay(cuda):
    row = ROWS["alibi"]
    batch = VariantBatch(row, Batch(Case("decode"), cuda))
    plan = batch.batch.plan()
    out, lse = batch.batch.outputs()
    workspace = batch.batch.workspace(plan)
    call = lambda: tvm_infer.attention(  # noqa: E731
        batch.batch.q,
        batch.batch.cache,
        plan,
        **batch.batch.tables,
        out=out,
        lse=lse,
        workspace=workspace,
        variant=batch.bound,
    )
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    batch.parameters["slopes"].mul_(0.5)
    out.fill_(math.nan)
    graph.replay()
    errors = batch.errors(out, lse)
    assert errors.ok and errors.ratio <= 2.0


def test_append_attention_takes_a_variant(device):
    row = ROWS["soft_cap"]
    batch = VariantBatch(row, Batch(Case("append"), device, appended=False))
    plan = batch.batch.plan()
    out, lse = batch.batch.outputs()
    tvm_infer.append_attention(
        batch.batch.q,
        batch.batch.k_new,
        batch.batch.v_new,
        batch.batch.cache,
        plan,
        **batch.batch.tables,
        out=out,
        lse=lse,
        workspace=batch.batch.workspace(plan),
        variant=batch.bound,
    )
    errors = batch.errors(out, lse)
    assert errors.ok and errors.ratio <= 2.0


CACHE_LAYERS = ("plain", "window", "soft_cap", "sink", "far")


def cache_variant(name: str, heads: int, device: str) -> Any:
    sink = torch.linspace(-2.0, 6.0, heads, device=device)
    return {
        "plain": None,
        "window": variant.sliding_window.bind(window=33),
        "soft_cap": (variant.soft_cap & variant.sliding_window).bind(cap=4.0, window=100),
        "sink": variant.attention_sink.bind(sink=sink),
        "far": variant.sink_window.bind(sink=4, window=20),
    }[name]


def cache_reference(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """float64 [n, heads, head_dim] of the last n tokens of a sequence."""
    (n, heads, head_dim), m = q.shape, len(k)
    k, v = (x.double().repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
    s = torch.einsum("nhd,mhd->hnm", q.double(), k) / math.sqrt(head_dim)
    i, j = torch.arange(m - n, m, device=q.device)[:, None], torch.arange(m, device=q.device)[None]
    hidden = j > i
    if name in ("window", "soft_cap"):
        hidden = hidden | (j < i - (33 if name == "window" else 100))
    if name == "far":
        hidden = hidden | ((j >= 4) & (j < i - 20))
    if name == "soft_cap":
        s = 4.0 * torch.tanh(s / 4.0)
    s = s.masked_fill(hidden, -math.inf)
    o = torch.einsum("hnm,mhd->nhd", torch.softmax(s, -1), v)
    if name != "sink":
        return o
    sink = torch.linspace(-2.0, 6.0, heads, device=q.device).double()
    return o * torch.sigmoid(torch.logsumexp(s, -1) - sink[:, None]).T[..., None]


@pytest.mark.family("kv_cache", "attention_sm90")
@pytest.mark.parametrize(("page_size", "is_graph"), [(16, False), (1, False), (16, True)])
def test_layers_of_a_cache(page_size, is_graph, cuda):
    """Four bands and five variants in one cache: prompts, then decodes, eagerly and by one captured graph."""
    heads, kv_heads, head_dim, prompts = 8, 2, 128, (150, 40, 1)
    cache = tvm_infer.PagedKVCache(
        num_layers=len(CACHE_LAYERS), num_qo_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, dtype="bfloat16",
        page_size=page_size, num_pages=512 // page_size, max_batch=4, max_tokens=256, device=cuda,
    )  # fmt: skip
    for layer, name in enumerate(CACHE_LAYERS):
        cache.pages(layer).fill_(math.nan)
        if name != "plain":
            cache.set_variant(cache_variant(name, heads, cuda), layers=[layer])
    generator = torch.Generator(cuda).manual_seed(1)
    history: list[list[list[torch.Tensor]]] = [[[], [], []] for _ in prompts for _ in CACHE_LAYERS]
    rows = sum(prompts)
    qkv = torch.empty((len(CACHE_LAYERS), rows, heads + 2 * kv_heads, head_dim), device=cuda, dtype=torch.bfloat16)
    out = torch.empty((len(CACHE_LAYERS), rows, heads, head_dim), device=cuda, dtype=torch.bfloat16)

    def layers(n: int) -> None:
        for layer in range(len(CACHE_LAYERS)):
            q, k, v = qkv[layer, :n].split((heads, kv_heads, kv_heads), 1)
            cache.attention(layer, q, k, v, out=out[layer, :n])

    def step(lengths: tuple[int, ...], run: Callable[[], None]) -> None:
        n = sum(lengths)
        qkv[:, :n].normal_(generator=generator)
        out.fill_(math.nan)
        cache.begin_forward(list(range(len(prompts))), list(lengths))
        run()
        cache.end_forward()
        at = 0
        for r, length in enumerate(lengths):
            for layer, name in enumerate(CACHE_LAYERS):
                own = history[r * len(CACHE_LAYERS) + layer]
                for part, x in zip(
                    own, qkv[layer, at : at + length].split((heads, kv_heads, kv_heads), 1), strict=True
                ):
                    part.append(x.clone())
                expected = cache_reference(name, own[0][-1], torch.cat(own[1]), torch.cat(own[2]))
                error = float((out[layer, at : at + length].double() - expected).norm() / expected.norm())
                assert error <= 5e-3, (name, r, error)
            at += length

    for r in range(len(prompts)):
        cache.add_sequence(r)
    step(prompts, lambda: layers(rows))
    ones = (1,) * len(prompts)
    step(ones, lambda: layers(len(prompts)))
    run: Callable[[], None] = lambda: layers(len(prompts))  # noqa: E731
    if is_graph:
        cache.begin_forward(list(range(len(prompts))), list(ones))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layers(len(prompts))
        cache.cancel_forward()
        run = graph.replay
    for _ in range(3):
        step(ones, run)
