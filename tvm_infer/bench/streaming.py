"""StreamingLLM (arXiv 2309.17453): a decode step over sinks and a window whose keys turn by their places, with the rotation inside
attention and with a kernel that turns the window's keys at every step (section 4.3 of arXiv 2501.01005).

A step is that of a decoder of Llama-3-8B's sizes with random weights: projections by torch, attention ours; the new tokens' keys are
there already, none is appended. The ways differ in attention alone: `fused` is paged attention with the variant `streaming` over keys
that lie unturned in pages; `separate` turns all visible keys into another buffer by a kernel that torch.compile makes, and attends to
them; `unturned` leaves the rotation out, for what it costs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from .. import ops, variant
from ..errors import ArgumentError
from ..models.llama import LLAMA_3_8B
from ..rope import RopeConfig
from .rows import WrongResult
from .timing import Timing, time_graph
from .torch_decoder import TorchDecoder

PAGE_SIZE = 16
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE = 32, 8, 128, 4096, 14336
WAYS = ("fused", "separate", "unturned")
_CACHES = 2  # buffers that layers take turns in: a layer's gigabyte of keys and values has left the L2 long before its next turn
_TOLERANCE = (
    1.5e-2  # between the two ways: keys and queries are rounded to bf16 after their turns, by another order of products
)


@dataclass(frozen=True)
class Workload:
    """batch : requests, each of `kv` tokens so far. A query sees `sink` keys and the last `window` before its own. layers : of the
    model."""

    batch: int = 128
    sink: int = 4
    window: int = 2000
    kv: int = 8192
    layers: int = 32

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("sink", 0), ("window", 0), ("layers", 1)):
            if getattr(self, name) < least:
                raise ArgumentError(f"argument `--{name}` is {getattr(self, name)}; it must be at least {least}")
        if self.kv < self.sink + self.window + 1:
            raise ArgumentError(
                f"argument `--kv` is {self.kv}; it must be at least sink + window + 1 = {self.visible}, or nothing has left the window"
            )

    @property
    def visible(self) -> int:
        """Keys that a query sees: the sinks, the window, its own."""
        return self.sink + self.window + 1

    @property
    def positions(self) -> list[int]:
        """Of the visible keys, in order of their places."""
        return [*range(self.sink), *range(self.kv - self.window - 1, self.kv)]


class Caches:
    """One layer's keys and values, dense and in pages. keys, values : [batch, visible, kv_heads, head_dim], unturned. pages : the same
    at their positions, and NaN in a page that stands for all that no query may see."""

    def __init__(self, w: Workload, device: str, seed: int) -> None:
        import torch

        generator = torch.Generator(device).manual_seed(seed)
        shape = (w.batch, w.visible, KV_HEADS, HEAD_DIM)
        there: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        self.keys = torch.empty(shape, **there).normal_(generator=generator)
        self.values = torch.empty(shape, **there).normal_(generator=generator)
        self.turned = torch.empty_like(self.keys)
        positions = torch.tensor(w.positions, device=device)
        used = torch.unique(positions // PAGE_SIZE)
        num_pages = 1 + w.batch * len(used)
        self.pages = torch.full((num_pages, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM), torch.nan, **there)
        place = torch.zeros(-(-w.kv // PAGE_SIZE), dtype=torch.int32, device=device)
        first = torch.arange(w.batch, device=device, dtype=torch.int32)[:, None] * len(used)
        table = place[None].expand(w.batch, -1).clone()
        table[:, used] = 1 + first + torch.arange(len(used), device=device, dtype=torch.int32)
        self.page_indices = table.reshape(-1)
        self.page_indptr = torch.arange(w.batch + 1, device=device, dtype=torch.int32) * len(place)
        for r in range(w.batch):
            page, slot = table[r, positions // PAGE_SIZE].long(), positions % PAGE_SIZE
            self.pages[page, 0, :, slot] = self.keys[r]
            self.pages[page, 1, :, slot] = self.values[r]


class Attention:
    """The three ways, for one layer's queries [batch, heads, head_dim], unturned."""

    def __init__(self, w: Workload, device: str, compiled: bool = True) -> None:
        import torch

        inv_freq = torch.from_numpy(RopeConfig(HEAD_DIM, theta=500000.0).inv_freq()).to(device)
        self.fused = variant.streaming.bind(sink=w.sink, window=w.window, inv_freq=inv_freq)
        self.masked = variant.sink_window.bind(sink=w.sink, window=w.window)
        heads: dict[str, Any] = {
            "num_qo_heads": HEADS,
            "num_kv_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "dtype": "bfloat16",
        }
        indptr = list(range(w.batch + 1))
        self.paged_plan = ops.plan(indptr, [w.kv] * w.batch, variant=self.fused, device=device, **heads)
        self.dense_plan = ops.plan(indptr, [w.visible] * w.batch, device=device, **heads)
        rows = max(self.paged_plan.num_partial_rows, self.dense_plan.num_partial_rows, 1)
        self.workspace = torch.zeros(rows * (HEAD_DIM + 1), device=device)
        self.indptr = torch.arange(w.batch + 1, device=device, dtype=torch.int32) * w.visible
        angle = torch.arange(w.visible, device=device)[:, None] * inv_freq.double()
        self.cos, self.sin = (f(angle).float()[:, None] for f in (torch.cos, torch.sin))

        def turn(q: Any, k: Any, cos: Any, sin: Any, turned: Any) -> Any:
            def of(x: Any, cos: Any, sin: Any) -> Any:
                a, b = x.float().chunk(2, -1)
                return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

            turned.copy_(of(k, cos, sin))
            return of(q, cos[-1], sin[-1])

        self._turn = torch.compile(turn, dynamic=False) if compiled else turn

    def __call__(self, way: str, q: Any, cache: Caches) -> Any:
        if way == "separate":
            q = self._turn(q, cache.keys, self.cos, self.sin, cache.turned)
            k, v = cache.turned.flatten(0, 1), cache.values.flatten(0, 1)
            return ops.ragged_attention(q, k, v, self.dense_plan, kv_indptr=self.indptr, workspace=self.workspace)
        return ops.attention(
            q,
            cache.pages,
            self.paged_plan,
            kv_page_indptr=cache.page_indptr,
            kv_page_indices=cache.page_indices,
            variant=self.fused if way == "fused" else self.masked,
            workspace=self.workspace,
        )


class Model:
    """A decoder's layers but for attention, whose queries alone are used: keys are there already."""

    def __init__(self, w: Workload, device: str) -> None:
        import torch

        config = replace(LLAMA_3_8B, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_layers=w.layers)
        self.decoder = TorchDecoder(config, device, "bfloat16")
        self.x = torch.empty((w.batch, HIDDEN), device=device, dtype=torch.bfloat16).normal_()

    def step(self, attend: Callable[[int, Any], Any]) -> Any:
        """One token of each request through all layers. attend(layer, q)."""
        return self.decoder(self.x, lambda layer, qkv: attend(layer, qkv[:, :HEADS]))


def check(attention: Attention, cache: Caches, w: Workload) -> float:
    """Relative difference of the two ways on the same queries; raises WrongResult above the tolerance, and for NaN."""
    import torch

    q = torch.empty((w.batch, HEADS, HEAD_DIM), device=cache.keys.device, dtype=torch.bfloat16).normal_()
    fused, separate = (attention(way, q, cache).double() for way in ("fused", "separate"))
    error = float((fused - separate).norm() / separate.norm())
    if not error <= _TOLERANCE:
        raise WrongResult(f"wrong result: fused and separate rotation differ by {error:.2e} (allowed {_TOLERANCE:.1e})")
    return error


def measure(
    w: Workload, device: str = "cuda", time: Callable[..., Timing] = time_graph, compiled: bool = True
) -> dict[str, Any]:
    """Milliseconds of a step and microseconds of a layer's attention, by way; the difference of the ways' results."""
    import torch

    attention, model = Attention(w, device, compiled), Model(w, device)
    caches = [Caches(w, device, seed) for seed in range(min(_CACHES, w.layers))]
    found: dict[str, Any] = {
        "workload": asdict(w),
        "difference": check(attention, caches[0], w),
        "step_ms": {},
        "attention_us": {},
    }
    q = torch.empty((w.batch, HEADS, HEAD_DIM), device=device, dtype=torch.bfloat16).normal_()
    for way in WAYS:
        alone = [lambda c=c, way=way: attention(way, q, c) for c in caches * 8]
        found["attention_us"][way] = time(alone).median
        step = lambda way=way: model.step(lambda n, q: attention(way, q, caches[n % len(caches)]))  # noqa: E731
        found["step_ms"][way] = time([step]).median / 1000
    found["lower_percent"] = 100 * (1 - found["step_ms"]["fused"] / found["step_ms"]["separate"])
    return found


def lines(found: dict[str, Any], device_name: str) -> list[str]:
    """The results as text."""
    w = found["workload"]
    head = (
        f"StreamingLLM on {device_name}, bf16: {w['batch']} requests of {w['kv']} tokens, {w['sink']} sinks and a window of "
        f"{w['window']}; {w['layers']} layers of Llama-3-8B's sizes, random weights; CUDA graph, median"
    )
    rows = [
        f"{way:9} step {found['step_ms'][way]:7.2f} ms   attention {found['attention_us'][way]:7.1f} us a layer"
        for way in WAYS
    ]
    return [
        head,
        *rows,
        f"a step with the rotation in attention takes {found['lower_percent']:.1f} % less than with a kernel of its own "
        f"(results differ by {found['difference']:.1e})",
    ]


def run(w: Workload, json_path: str | None) -> None:
    """Measure, print, store."""
    import torch
    from rich.console import Console

    from .cuda_device import CudaDevice

    device = CudaDevice()
    with torch.inference_mode():
        found = measure(w)
    found["environment"] = device.describe()
    console = Console()
    for line in lines(found, found["environment"]["device_name"]):
        console.print(line, markup=False, highlight=False)
    if json_path is not None:
        with open(json_path, "w") as file:
            json.dump(found, file, indent=1)
