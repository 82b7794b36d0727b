"""Batches on a device that punish a kernel for reading or writing what it must not, and their attention in float64.

Everything is torch, so the same batch is made on "cuda" (the kernels) and on "cpu" (the CPU executor: that holds the tests themselves).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

import tvm_infer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
GARBAGE = (-1_234_567_890, 2**31 - 1)  # table entries behind a request's pages
CPU_CTAS = 7  # so that plans split on a machine with few cores, too
LSE_TOLERANCE = 1e-4  # absolute, natural logarithm: scores of up to 100 in float32, exp2 within 2 ulp

# (query heads, KV heads) by group size
HEADS = {1: (4, 4), 3: (9, 3), 4: (32, 8), 5: (10, 2), 7: (14, 2), 8: (16, 2), 16: (32, 2), 64: (64, 1), 71: (71, 1)}

# (new tokens, keys) of each request
ODD = (1, 15, 16, 17, 31, 127, 128, 129, 300, 1000, 2049, 5000)
SHAPES = {
    "decode": ((1,) * len(ODD), ODD),
    "prefill": ((1, 7, 33, 130, 257), (1, 7, 33, 130, 257)),
    "append": ((1, 5, 40, 100, 129), (100, 77, 512, 1111, 129)),
    "mixed": ((300, 1, 1, 64, 1, 1, 2), (300, 999, 2048, 700, 1, 16, 50)),
    "skewed": ((1, 1, 1, 17, 1, 60), (12001, 5, 64, 17, 333, 129)),
    "verify": ((4, 2, 8, 3, 16), (1001, 2, 128, 517, 2049)),
    "idle": ((0, 1, 0, 5, 0, 1), (10, 100, 0, 80, 0, 1)),
    "no-keys": ((3, 1, 130, 0, 1, 7), (0, 0, 0, 50, 20, 5)),  # more queries than keys: without a causal mask only
}
# (causal, window_left)
MASKS = {
    "causal": (True, -1),
    "w0": (True, 0),
    "w1": (True, 1),
    "w15": (True, 15),
    "w100": (True, 100),
    "w333": (True, 333),
    "full": (False, -1),
    "fullw40": (False, 40),
}
# What plans of a variant are made with instead: its own band.
VARIANT_BAND: dict[str, Any] = {"causal": None, "window_left": None, "variant": None}
SPLITS = {"auto": 0, "cut64": 64, "cut96": 96, "cut128": 128, "cut192": 192, "whole": -1}
LAYOUTS = ("HND", "NHD", "HND2", "NHD2")  # 2: K and V in two tensors
PAGE_SIZES = (1, 8, 16, 32, 64, 0)  # 0: ragged, no pages
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
VIEWS = ("plain", "offset", "strided")
SCALES = {"": None, "sharp": 0.25}  # 0.25: scores of +-10, one key takes most


@dataclass(frozen=True)
class Case:
    """One batch and how it is stored. `name` says all of it."""

    shape: str = "decode"
    mask: str = "causal"
    split: str = "auto"
    dtype: str = "bf16"
    head_dim: int = 128
    page_size: int = 16
    layout: str = "HND"
    group: int = 4
    views: str = "plain"
    scale: str = ""
    lengths: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # instead of SHAPES[shape]
    head_dim_vo: int = 0  # of values and outputs; 0: head_dim. Else in a tensor of their own (layout HND2 or NHD2)

    @property
    def width_vo(self) -> int:
        return self.head_dim_vo or self.head_dim

    @property
    def name(self) -> str:
        store = f"p{self.page_size}-{self.layout}" if self.page_size else "ragged"
        parts = (
            self.dtype,
            f"d{self.head_dim}" + (f"v{self.head_dim_vo}" if self.head_dim_vo else ""),
            store,
            f"g{self.group}",
            self.shape,
            self.mask,
            self.split,
            self.views,
        )
        return "-".join(parts) + (f"-{self.scale}" if self.scale else "")

    @property
    def qo(self) -> tuple[int, ...]:
        return (self.lengths or SHAPES[self.shape])[0]

    @property
    def kv(self) -> tuple[int, ...]:
        return (self.lengths or SHAPES[self.shape])[1]

    @property
    def heads(self) -> tuple[int, int]:
        return HEADS[self.group]

    @property
    def kernel(self) -> str:
        """Name of the attention kernel that runs it."""
        heads = f"h{self.head_dim}" + (f"_v{self.head_dim_vo}" if self.head_dim_vo else "")
        return f"attention_{self.dtype}_{heads}_" + (f"p{self.page_size}" if self.page_size else "ragged")

    @property
    def sm_scale(self) -> float | None:
        return SCALES[self.scale]


def matrix_cases(head_dims: tuple[int, ...], per_kernel: int) -> list[Case]:
    """`per_kernel` cases of each kernel that together meet every pair of settings; the same list every time.

    Greedy: of 60 random candidates the one with most settings, pairs of settings, and settings with this kernel, not met before.
    """
    rng = random.Random(0)
    met: set[tuple[Any, ...]] = set()
    cases: list[Case] = []
    for page_size, head_dim, dtype in itertools.product(PAGE_SIZES, head_dims, DTYPES):
        for _ in range(per_kernel):
            candidates = [_candidate(rng, dtype, head_dim, page_size) for _ in range(60)]
            new = [_pairs(c) - met for c in candidates]
            best = max(range(60), key=lambda i: len(new[i]))
            met |= new[best]
            cases.append(candidates[best])
    return list({c.name: c for c in cases}.values())


def _candidate(rng: random.Random, dtype: str, head_dim: int, page_size: int) -> Case:
    shape, mask = rng.choice(list(SHAPES)), rng.choice(list(MASKS))
    if MASKS[mask][0] and shape == "no-keys":
        mask = rng.choice(("full", "fullw40"))
    return Case(
        shape=shape,
        mask=mask,
        split=rng.choice(list(SPLITS)),
        dtype=dtype,
        head_dim=head_dim,
        page_size=page_size,
        layout=rng.choice(LAYOUTS) if page_size else "HND",
        group=rng.choice(list(HEADS)),
        views=rng.choice(VIEWS),
        scale=rng.choice(("", "", "", "sharp")),
    )


def _pairs(case: Case) -> set[tuple[Any, ...]]:
    kernel = ("kernel", case.kernel)
    own = [(k, getattr(case, k)) for k in ("shape", "mask", "split", "layout", "group", "views", "scale", "page_size")]
    pairs = {(a, b) for i, a in enumerate(own) for b in own[i + 1 :]}
    return pairs | {(kernel, a) for a in own}


def special_cases() -> list[Case]:
    """Lengths that the matrix has not: very long, very many, all alike, one token."""
    many = tuple(37 * i % 900 + 1 for i in range(300))
    longs = ((1, 2, 400), (40000, 9000, 12345))
    return [
        Case("many", lengths=((1,) * 300, many)),
        Case("many", lengths=((1,) * 300, many), dtype="fp16", head_dim=64, page_size=1, split="cut192", group=7),
        Case("long", lengths=longs, group=8),
        Case("long", lengths=longs, group=16, page_size=1, layout="NHD", head_dim=64),
        Case("long", lengths=longs, group=4, page_size=0, dtype="fp16", mask="w333"),
        Case("alike", lengths=((1,) * 64, (512,) * 64)),
        Case("alike", lengths=((1,) * 133, (300,) * 133), page_size=64, layout="NHD2", split="whole"),
        Case("one-key", lengths=((1,), (1,))),
        Case("one-key", lengths=((1,), (1,)), page_size=0, group=71),
        Case("one-long", lengths=((1,), (32768,)), page_size=8, dtype="fp16"),
        Case("one-prompt", lengths=((1025,), (1025,)), group=3),
        Case("one-prompt", lengths=((1025,), (3073,)), group=5, page_size=32, layout="NHD", head_dim=64, split="cut96"),
        Case("pages", lengths=((1,) * 20, tuple(range(120, 140))), page_size=64, group=64),
        Case("pages", lengths=(tuple(range(1, 21)), tuple(range(120, 140))), page_size=1, group=71, dtype="fp16"),
        # small pages, gathered as those of one token are
        Case("decode", page_size=4, group=8),
        Case("mixed", page_size=2, dtype="fp16", head_dim=64, layout="NHD2", views="strided", split="cut96", group=5),
        Case("append", page_size=4, dtype="fp16", layout="NHD", mask="w15", views="offset", split="cut64", group=3),
        Case("skewed", page_size=2, mask="full", layout="HND2", group=7),
        Case("prefill", page_size=4, head_dim=64, mask="w100", group=16),
        Case("mixed", page_size=2, head_dim=80, layout="NHD", views="strided", group=5),
        Case("append", page_size=4, head_dim=192, dtype="fp16", mask="w15", split="cut64", group=3),
        Case("one-prompt", lengths=((1025,), (3073,)), head_dim=256, group=7, split="cut96"),
        Case("long", lengths=longs, group=8, head_dim=256),
        Case("many", lengths=((1,) * 300, many), head_dim=96, page_size=64),
    ]


def unequal_cases() -> list[Case]:
    """Keys wider than values, in every kind of kernel that has a name of its own."""
    cases = [
        replace(case, head_dim_vo=128, layout=case.layout[:3] + "2" if case.page_size else case.layout)
        for case in matrix_cases((192,), 8)
    ]
    small = [
        Case("decode", page_size=4, group=8),
        Case("mixed", page_size=2, dtype="fp16", views="strided", split="cut96", group=5),
        Case("one-prompt", lengths=((1025,), (3073,)), group=3),
        Case("many", lengths=((1,) * 300, tuple(37 * i % 900 + 1 for i in range(300))), group=16),
    ]
    cases += [replace(case, head_dim=192, head_dim_vo=128, layout="HND2") for case in small]
    return list({c.name + str(c.lengths or ""): c for c in cases}.values())


def attention_cases() -> list[Case]:
    # of head dims whose kernels differ in numbers alone, fewer
    return matrix_cases((128, 64), 12) + matrix_cases((80, 96, 192, 256), 4) + special_cases() + unequal_cases()


def embedded(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    views: str,
    fill: float = math.nan,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(view of `shape`, the tensor it lies in), all `fill`.

    "offset": one row ahead and one behind. "strided": every stride is larger than it must be and the offset is not a whole row; rows
    stay on 16-byte boundaries.
    """
    if views == "plain":
        base = torch.full(shape, fill, dtype=dtype, device=device)
        return base, base
    ahead = [1] + [0] * (len(shape) - 1)
    behind = list(ahead)
    if views == "strided":
        ahead = [1] * (len(shape) - 1) + [8]
        behind = [1] + [0] * (len(shape) - 1)
    base = torch.full(
        [a + n + b for a, n, b in zip(ahead, shape, behind, strict=True)], fill, dtype=dtype, device=device
    )
    return base[tuple(slice(a, a + n) for a, n in zip(ahead, shape, strict=True))], base


def index_view(values: Any, device: str, shift: int) -> torch.Tensor:
    """int32 tensor of `values`, `shift` entries into a larger one of garbage."""
    base = torch.full((len(values) + 2 * shift,), GARBAGE[0], dtype=torch.int32)
    base[shift : shift + len(values)] = torch.as_tensor(values, dtype=torch.int32)
    return base.to(device)[shift : shift + len(values)]


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, sm_scale: float, causal: bool, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) of one request as one writes it in torch, in the dtype of its inputs.

    q : [n, num_qo_heads, head_dim]. k, v : [m, num_kv_heads, head_dim], v and o perhaps narrower. A row that sees nothing has o = 0,
    lse = -inf.
    """
    n, num_qo_heads, head_dim = q.shape
    m, num_kv_heads, _ = k.shape
    group = num_qo_heads // num_kv_heads
    if m == 0:
        return q.new_zeros((n, num_qo_heads, v.shape[2])), torch.full(
            (n, num_qo_heads), -math.inf, dtype=q.dtype, device=q.device
        )
    rows = q.view(n, num_kv_heads, group, head_dim).permute(1, 2, 0, 3).reshape(num_kv_heads, group * n, head_dim)
    scores = (rows @ k.permute(1, 2, 0)) * sm_scale
    position = torch.arange(n, device=q.device)[:, None] + (m - n)
    key = torch.arange(m, device=q.device)[None, :]
    hidden = torch.zeros((n, m), dtype=torch.bool, device=q.device)
    if causal:
        hidden |= key > position
    if window >= 0:
        hidden |= key < position - window
    scores = scores.view(num_kv_heads, group, n, m).masked_fill_(hidden, -math.inf)
    lse = torch.logsumexp(scores, -1)
    p = torch.softmax(scores, -1).masked_fill_(hidden.all(-1)[:, None], 0.0)
    o = p.view(num_kv_heads, group * n, m) @ v.permute(1, 0, 2)
    o = o.view(num_kv_heads, group, n, v.shape[2]).permute(2, 0, 1, 3).reshape(n, num_qo_heads, v.shape[2])
    return o, lse.permute(2, 0, 1).reshape(n, num_qo_heads)


@dataclass
class Request:
    """q : [n, num_qo_heads, head_dim]; k, v : [m, num_kv_heads, head_dim], v perhaps narrower."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def make_requests(case: Case, device: str, seed: int = 0) -> list[Request]:
    generator = torch.Generator(device).manual_seed(seed)
    num_qo_heads, num_kv_heads = case.heads

    def normal(length: int, heads: int, width: int = case.head_dim) -> torch.Tensor:
        x = torch.randn((length, heads, width), device=device, generator=generator)
        return x.to(DTYPES[case.dtype])

    return [
        Request(normal(n, num_qo_heads), normal(m, num_kv_heads), normal(m, num_kv_heads, case.width_vo))
        for n, m in zip(case.qo, case.kv, strict=True)
    ]


class Batch:
    """Requests laid into pages (or ragged rows) and what the calls need around them; NaN wherever nothing may be read.

    With `appended=False` the new tokens' slots are NaN too: they are for append to fill (k_new, v_new).
    """

    def __init__(
        self, case: Case, device: str, seed: int = 0, requests: list[Request] | None = None, appended: bool = True
    ) -> None:
        self.case, self.device = case, device
        self.requests = make_requests(case, device, seed) if requests is None else requests
        self.qo = [len(r.q) for r in self.requests]
        self.kv = [len(r.k) for r in self.requests]
        self.dtype = DTYPES[case.dtype]
        self.num_qo_heads, self.num_kv_heads = case.heads
        self.causal, self.window = MASKS[case.mask]
        self.sm_scale = case.head_dim**-0.5 if case.sm_scale is None else case.sm_scale
        self.num_tokens = sum(self.qo)
        self.appended = appended
        self.qo_indptr = [0, *np.cumsum(self.qo).tolist()]
        shift = 0 if case.views == "plain" else 1
        self.q = self._filled((self.num_tokens, self.num_qo_heads, case.head_dim), [r.q for r in self.requests])
        new = [(r.k[len(r.k) - n :], r.v[len(r.v) - n :]) for r, n in zip(self.requests, self.qo, strict=True)]
        new_shape = (self.num_tokens, self.num_kv_heads, case.head_dim)
        # without a causal mask a request may have more queries than keys: nothing of it can be appended
        can_append = all(n <= m for n, m in zip(self.qo, self.kv, strict=True))
        self.k_new = self._filled(new_shape, [k for k, _ in new]) if can_append else None
        self.v_new = self._filled((*new_shape[:2], case.width_vo), [v for _, v in new]) if can_append else None
        if case.page_size:
            self._fill_pages(seed, shift)
        else:
            shape = (sum(self.kv), self.num_kv_heads, case.head_dim)
            self.k = self._filled(shape, [self._poisoned(i, "k") for i in range(len(self.kv))])
            v_shape = (*shape[:2], case.width_vo)
            self.v = self._filled(v_shape, [self._poisoned(i, "v") for i in range(len(self.kv))])
            self.kv_indptr = index_view([0, *np.cumsum(self.kv).tolist()], device, shift)
        self.device_qo_indptr = index_view(self.qo_indptr, device, shift)
        self.device_kv_len = index_view(self.kv, device, 3 * shift)

    def _filled(self, shape: tuple[int, ...], parts: list[torch.Tensor]) -> torch.Tensor:
        view, _ = embedded(shape, self.dtype, self.device, self.case.views)
        if shape[0]:
            view.copy_(torch.cat(parts))
        return view

    def _poisoned(self, request: int, name: str) -> torch.Tensor:
        """A request's keys or values as they lie in the cache: NaN where no row looks, or where append is to write."""
        x = getattr(self.requests[request], name).clone()
        n, m = self.qo[request], self.kv[request]
        first = max(0, m - n - self.window) if self.window >= 0 else 0
        x[: first if n else m] = math.nan
        if not self.appended:
            x[m - n :] = math.nan
        return x

    def _fill_pages(self, seed: int, shift: int) -> None:
        case, page = self.case, self.case.page_size
        counts = [-(-m // page) for m in self.kv]
        num_pages = sum(counts) + 3
        order = random.Random(seed).sample(range(num_pages), num_pages)
        nhd = case.layout.startswith("NHD")
        inner = (page, self.num_kv_heads) if nhd else (self.num_kv_heads, page)
        if case.layout.endswith("2"):
            shape = (num_pages, *inner, case.head_dim)
            k, self.k_base = embedded(shape, self.dtype, self.device, case.views)
            v, self.v_base = embedded((*shape[:-1], case.width_vo), self.dtype, self.device, case.views)
            self.cache: Any = (k, v)
        else:
            combined, self.k_base = embedded((num_pages, 2, *inner, case.head_dim), self.dtype, self.device, case.views)
            self.v_base = None
            self.cache, k, v = combined, combined[:, 0], combined[:, 1]
        self.k_pages, self.v_pages = (x.transpose(1, 2) if nhd else x for x in (k, v))  # [pages, heads, page, dim]
        indices, indptr, taken = [], [0], 0
        self.pages: list[torch.Tensor] = []
        for r, count in enumerate(counts):
            mine = order[taken : taken + count]
            taken += count
            slots = torch.arange(self.kv[r], device=self.device)
            where = torch.tensor(mine, dtype=torch.int64, device=self.device)
            self.pages.append(where)
            for pages, name in ((self.k_pages, "k"), (self.v_pages, "v")):
                pages.permute(0, 2, 1, 3)[where[slots // page], slots % page] = self._poisoned(r, name)
            indices += [*mine, GARBAGE[r % 2]]
            indptr.append(len(indices))
        self.kv_page_indptr = index_view(indptr, self.device, shift)
        self.kv_page_indices = index_view(indices, self.device, 3 * shift)

    @property
    def tables(self) -> dict[str, Any]:
        names = ("kv_page_indptr", "kv_page_indices")
        return {**{n: getattr(self, n) for n in names}, "kv_layout": self.case.layout[:3]}

    def plan(self, **changes: Any) -> tvm_infer.Plan:
        """The batch's plan, on the device; with views in the middle of a larger buffer, but for plans with other settings."""
        made = make_plan(self.qo_indptr, self.kv, self.case, self.device, **changes)
        if self.case.views == "plain" or not set(changes) <= VARIANT_BAND.keys():
            return made
        words = made.bytes_used // 4
        buffers = {"out": np.full(words + 64, GARBAGE[0], np.int32)[32 : 32 + words]}
        if self.device != "cpu":
            base = torch.full((words + 64,), GARBAGE[0], dtype=torch.int32, device=self.device)
            buffers["device_out"] = base[32 : 32 + words]
        rows = made.num_partial_rows
        return make_plan(self.qo_indptr, self.kv, self.case, self.device, max_partial_rows=rows, **buffers, **changes)

    def workspace(self, plan: tvm_infer.Plan) -> torch.Tensor:
        """Exactly what the plan needs, NaN; with views it starts 16 bytes into its storage."""
        shift = 0 if self.case.views == "plain" else 4
        floats = plan.num_partial_rows * (self.case.width_vo + 1)
        return torch.full((floats + 2 * shift,), math.nan, device=self.device)[shift : shift + floats]

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse), NaN, with NaN around them (assert_margins)."""
        shape = (self.num_tokens, self.num_qo_heads, self.case.width_vo)
        out, self.out_base = embedded(shape, self.dtype, self.device, self.case.views)
        contiguous = "plain" if self.case.views == "plain" else "offset"
        lse, self.lse_base = embedded(shape[:2], torch.float32, self.device, contiguous)
        return out, lse

    def attend(self, plan: tvm_infer.Plan | None = None, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(o, lse) of the call under test."""
        plan = self.plan() if plan is None else plan
        out, lse = self.outputs()
        keywords = {
            "sm_scale": self.case.sm_scale,
            "out": out,
            "lse": lse,
            "workspace": self.workspace(plan),
            **changes,
        }
        if self.case.page_size:
            return tvm_infer.attention(self.q, self.cache, plan, **self.tables, **keywords)
        return tvm_infer.ragged_attention(self.q, self.k, self.v, plan, kv_indptr=self.kv_indptr, **keywords)

    def poison(self, seen: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> int:
        """NaN in keys that no query of their request sees, by seen(q_pos [n, 1], kv_pos [1, m]); returns how many there are."""
        count = 0
        for r, (n, m) in enumerate(zip(self.qo, self.kv, strict=True)):
            positions = torch.arange(m, device=self.device)
            hidden = positions[~seen(positions[m - n :, None], positions[None]).any(0)] if n else positions
            count += len(hidden)
            if self.case.page_size:
                pages = self.pages[r][hidden // self.case.page_size]
                for x in (self.k_pages, self.v_pages):
                    x[pages, :, hidden % self.case.page_size] = math.nan
            else:
                for x in (self.k, self.v):
                    x[sum(self.kv[:r]) + hidden] = math.nan
        return count

    def assert_margins(self) -> None:
        """Nothing was written around the outputs."""
        for base, view in ((self.out_base, self.case.views), (self.lse_base, self.case.views != "plain" and "offset")):
            if view in ("plain", False) or not base.numel():
                continue
            outside = torch.ones(base.shape, dtype=torch.bool, device=base.device)
            inner = [slice(1, base.shape[0] - 1)] + [slice(None)] * (base.dim() - 1)
            if view == "strided":
                inner[1:] = [slice(1, None), slice(8, None)]
            outside[tuple(inner)] = False
            assert bool(torch.isnan(base[outside]).all()), "written outside an output"

    def errors(self, o: torch.Tensor, lse: torch.Tensor) -> Errors:
        """Against float64, request by request, beside what plain torch in the same dtype loses."""
        total = Errors()
        rows: list[torch.Tensor] = []
        for r, request in enumerate(self.requests):
            if not self.qo[r]:
                continue
            at = slice(self.qo_indptr[r], self.qo_indptr[r + 1])
            settings = {"sm_scale": self.sm_scale, "causal": self.causal, "window": self.window}
            wide = [x.double() for x in (request.q, request.k, request.v)]
            ref, ref_lse = plain_attention(*wide, **settings)
            plain, _ = plain_attention(request.q, request.k, request.v, **settings)
            norm = ref.norm().clamp_min(1e-300)
            seen = torch.isfinite(ref_lse)
            same = torch.isneginf(lse[at]) == ~seen
            differences = [(x.double() - ref) for x in (o[at], plain, ref.to(self.dtype))]
            zero = torch.zeros((), dtype=torch.float64, device=self.device)
            lse_error = torch.where(seen, (lse[at].double() - ref_lse).abs(), zero).amax() if seen.numel() else zero
            ok = torch.isfinite(o[at]).all() & ~torch.isnan(lse[at]).any() & same.all()
            squares = [d.square().sum() for d in differences]
            rows.append(torch.stack([*(s.sqrt() / norm for s in squares), lse_error, ok.double(), *squares, norm**2]))
        if rows:
            total.set(torch.stack(rows).tolist())
        return total


@dataclass
class Errors:
    """Relative errors of the worst request (‖o - ref‖ / ‖ref‖), and over the whole batch."""

    ratio: float = 0.0  # worst request: ours / the larger of plain torch's and what rounding the exact result loses
    ours: float = 0.0  # whole batch
    plain: float = 0.0  # whole batch, plain torch in the same dtype
    lse: float = 0.0  # largest absolute
    ok: bool = True  # no NaN, and -inf exactly where nothing is visible

    def set(self, rows: list[list[float]]) -> None:
        for ours, plain, rounding, lse, ok, *_ in rows:
            allowed = max(plain, rounding)
            self.ratio = max(self.ratio, ours / allowed if allowed else (math.inf if ours else 0.0))
            self.lse = max(self.lse, lse)
            self.ok &= bool(ok)
        norm = sum(r[8] for r in rows) ** 0.5
        self.ours, self.plain = ((sum(r[5 + i] for r in rows) ** 0.5 / norm if norm > 1e-200 else 0.0) for i in (0, 1))

    def assert_small(self) -> None:
        assert self.ok, "NaN in an output, or -inf in the wrong place"
        assert self.ratio <= 2.0, self
        assert self.ours <= 2.0 * self.plain + 1e-12 or self.ratio <= 1.0, self
        assert self.lse <= LSE_TOLERANCE, self


def make_plan(qo_indptr: Any, kv_len: Any, case: Case, device: str, **changes: Any) -> tvm_infer.Plan:
    causal, window = MASKS[case.mask]
    settings: dict[str, Any] = {
        "num_qo_heads": case.heads[0],
        "num_kv_heads": case.heads[1],
        "head_dim": case.head_dim,
        "head_dim_vo": case.head_dim_vo or None,
        "dtype": {"bf16": "bfloat16", "fp16": "float16"}[case.dtype],
        "causal": causal,
        "window_left": window,
        "fixed_split_size": SPLITS[case.split],
    }
    settings |= {"num_ctas": CPU_CTAS} if device == "cpu" else {"device": device}
    return tvm_infer.plan(list(qo_indptr), list(kv_len), **(settings | changes))


def bits(x: torch.Tensor) -> torch.Tensor:
    """The same memory as integers: comparisons that tell -0 from 0 and take NaN for itself."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(torch.equal(bits(a), bits(b)))
