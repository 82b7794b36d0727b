"""Parallel generation (section 4.4 of arXiv 2501.01005): answers of one prompt, whose pages the cache's forks share, with the prompt's
keys read once for all of them and with every answer reading its own.

A step is that of a whole decoder with random weights: embedding, projections, head and the choice of tokens by torch; rotation, append
and attention by a PagedKVCache. There are two caches, alike but for `shared_prefix`, which take turns: the same tokens at the same
lengths, in the same process. On CUDA a step is one graph for each number of answers, replayed with every step's plan.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import ArgumentError
from ..models.llama import LLAMA_3_8B, LlamaConfig
from ..rope import RopeConfig
from ..runtime.kv_cache import PagedKVCache
from .rows import WrongResult
from .serve_models import TINY
from .timing import Timing, measure, time_graph
from .torch_decoder import TorchDecoder

WAYS = ("shared", "flat")
MODELS = {"llama-3-8b": LLAMA_3_8B, "tiny": TINY}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
_PREFILL = 512  # tokens a step
_WARM_UP_STEPS = 2
_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}  # of one attention between the two ways: sums of another order


@dataclass(frozen=True)
class Workload:
    """answers : numbers of answers, a row each; tokens : of each answer; prompt : tokens. layers : of the model, None: all."""

    answers: Sequence[int] = (4, 8, 16, 32)
    prompt: int = 2048
    tokens: int = 256
    model: str = "llama-3-8b"
    device: str = "cuda"
    layers: int | None = None
    page_size: int = 16

    def __post_init__(self) -> None:
        numbers = {name: getattr(self, name) for name in ("prompt", "tokens", "layers", "page_size")}
        for name, value in [*numbers.items(), *(("answers", count) for count in self.answers)]:
            if value is not None and value < 1:
                flag = f"--{name.replace('_', '-')}"
                raise ArgumentError(f"argument `{flag}` is {value}; it must be at least 1")
        for name, allowed in (("model", MODELS), ("device", DTYPES)):
            if getattr(self, name) not in allowed:
                raise ArgumentError(
                    f"argument `--{name}` is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}"
                )
        if not self.answers:
            raise ArgumentError("argument `--answers` is empty; say how many answers, such as --answers 16")

    @property
    def config(self) -> LlamaConfig:
        """Sizes of the model."""
        config = MODELS[self.model]
        return config if self.layers is None else replace(config, num_layers=self.layers)

    @property
    def dtype(self) -> str:
        """Of weights and keys: the device's usual one."""
        return DTYPES[self.device]

    def cache(self, way: str) -> PagedKVCache:
        """An empty cache for the prompt and all its answers."""
        longest, most = self.prompt + self.tokens + _WARM_UP_STEPS, max(self.answers)
        pages = -(-longest // self.page_size)
        own = pages - self.prompt // self.page_size  # of each answer, a copied last page of the prompt included
        cache = PagedKVCache(
            num_layers=self.config.num_layers,
            num_qo_heads=self.config.num_qo_heads,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            dtype=self.dtype,
            page_size=self.page_size,
            num_pages=pages + most * own,
            max_batch=most,
            max_tokens=max(most, min(self.prompt, _PREFILL)),
            device=self.device,
            shared_prefix=way == "shared",
        )
        cache.set_rope(RopeConfig(self.config.head_dim, theta=self.config.rope_theta))
        return cache


class Model:
    """A decoder that reads a cache. Tokens in, logits of the next out."""

    def __init__(self, w: Workload) -> None:
        self.decoder = TorchDecoder(w.config, w.device, w.dtype)
        self.embedding = self.decoder.weight(w.config.vocab_size, w.config.hidden_size, std=1.0)
        self.head = self.decoder.weight(w.config.vocab_size, w.config.hidden_size)

    def __call__(self, cache: PagedKVCache, ids: Any) -> Any:
        """[rows, vocab] of token ids [rows], whose step of the cache is under way."""
        from torch.nn import functional as f

        x = self.decoder(f.embedding(ids, self.embedding), lambda layer, qkv: attend(cache, layer, qkv))
        return f.linear(self.decoder.norm(x), self.head)


def attend(cache: PagedKVCache, layer: int, qkv: Any) -> Any:
    """Rotation, append and attention of a layer. qkv : [rows, query + 2 * KV heads, head_dim]."""
    return cache.attention_fused_qkv(layer, qkv)


def captured(f: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of `f`, whose kernels are loaded before."""
    import torch

    for _ in range(2):
        f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return graph.replay  # type: ignore[no-any-return]


class Way:
    """A cache, and a step of a number of answers on it: `ids` int64 [answers] in, `following` out."""

    def __init__(self, w: Workload, model: Model, cache: PagedKVCache, ids: Any) -> None:
        import torch

        self.cache, self.ids, self.following = cache, ids, torch.empty_like(ids)
        self.seqs = list(range(1, len(ids) + 1))
        self._model, self._is_cuda = model, w.device == "cuda"
        self._launch: Callable[[], None] | None = None
        self.times: list[float] = []
        self.shared_steps = 0
        for seq in self.seqs:
            cache.fork_sequence(0, seq)

    def _forward(self) -> None:
        self.following.copy_(self._model(self.cache, self.ids).argmax(-1))

    def step(self) -> None:
        """One token of each answer; its seconds go to `times`: bookkeeping, plan, kernels, until the tokens are there."""
        if self._launch is None:
            with self.cache.forward(self.seqs, [1] * len(self.seqs)):
                self._launch = captured(self._forward) if self._is_cuda else self._forward
                self._launch()
            return
        self.synchronize()
        start = time.perf_counter()
        with self.cache.forward(self.seqs, [1] * len(self.seqs)) as step:
            self._launch()
            self.synchronize()
            self.times.append(time.perf_counter() - start)
            self.shared_steps += step.plan.num_shared_works > 0

    def synchronize(self) -> None:
        """Wait for the device."""
        import torch

        if self._is_cuda:
            torch.cuda.synchronize()

    def attention(self, qkv: Any, length: int, timed: Callable[..., Timing]) -> tuple[Timing, Any]:
        """Microseconds of a layer's attention where every answer has `length` keys, and what layer 0 gives, whose keys come of tokens
        alone and are the same in both caches. Takes later tokens back."""
        for seq in self.seqs:
            self.cache.truncate(seq, length - 1)
        layers = range(self.cache.num_layers)
        with self.cache.forward(self.seqs, [1] * len(self.seqs)):
            timing = timed([lambda layer=layer: attend(self.cache, layer, qkv) for layer in layers])
            return timing, attend(self.cache, 0, qkv)

    def end(self) -> None:
        """Take the answers back; the prompt stays."""
        for seq in self.seqs:
            self.cache.remove_sequence(seq)


def prefill(w: Workload, model: Model, cache: PagedKVCache, ids: Any) -> None:
    """The prompt of tokens `ids`, as sequence 0."""
    cache.add_sequence(0)
    size = min(w.prompt, _PREFILL)
    for begin in range(0, w.prompt, size):
        part = ids[begin : begin + size]
        with cache.forward([0], [len(part)]):
            model(cache, part)


def time_each(launches: Sequence[Callable[[], object]]) -> Timing:
    """Microseconds of one launch on the host."""
    return measure(launches[0], seconds=0.2)


def measure_row(
    w: Workload, model: Model, caches: dict[str, PagedKVCache], answers: int, timed: Callable[..., Timing]
) -> dict[str, Any]:
    """The figures of one number of answers. Raises WrongResult where the ways differ beyond rounding."""
    import torch

    vocab, config = w.config.vocab_size, w.config
    # answers begin with tokens of their own, or they would all say the same
    ids = torch.arange(answers, device=w.device) % vocab
    ways = {name: Way(w, model, caches[name], ids) for name in WAYS}
    for number in range(_WARM_UP_STEPS + w.tokens):
        for name in WAYS if number % 2 else WAYS[::-1]:
            ways[name].step()
        ids.copy_(ways[WAYS[0]].following)
    shape = (answers, config.num_qo_heads + 2 * config.num_kv_heads, config.head_dim)
    qkv = torch.empty(shape, device=w.device, dtype=getattr(torch, w.dtype)).normal_()
    found = {name: way.attention(qkv, w.prompt + max(1, w.tokens // 2), timed) for name, way in ways.items()}
    ours, flat = (found[name][1].double() for name in WAYS)
    difference = float((ours - flat).norm() / flat.norm())
    if not difference <= _TOLERANCE[w.dtype]:
        raise WrongResult(
            f"wrong result: attention of {answers} answers with shared keys differs by {difference:.2e} from the flat plan's "
            f"(allowed {_TOLERANCE[w.dtype]:.0e})"
        )
    itl = {name: statistics.median(way.times[-w.tokens :]) * 1e3 for name, way in ways.items()}
    attention = {name: timing.median for name, (timing, _) in found.items()}
    for way in ways.values():
        way.end()
    return {
        "answers": answers,
        "itl_ms": itl,
        "attention_us": attention,
        "lower_percent": 100 * (1 - itl["shared"] / itl["flat"]),
        # of the flat plan's step: lower it cannot get by attention, and appends, that take no time
        "attention_percent": 100 * attention["flat"] * w.config.num_layers / (itl["flat"] * 1e3),
        "shared_steps": ways["shared"].shared_steps,
        "steps": len(ways["shared"].times),
        "difference": difference,
    }


def measure_all(w: Workload, timed: Callable[..., Timing] | None = None) -> dict[str, Any]:
    """A row for each number of answers."""
    import torch

    torch.manual_seed(0)
    model, caches = Model(w), {way: w.cache(way) for way in WAYS}
    prompt = torch.randint(w.config.vocab_size, (w.prompt,), device=w.device)
    for cache in caches.values():
        prefill(w, model, cache, prompt)
    timed = timed or (time_graph if w.device == "cuda" else time_each)
    rows = [measure_row(w, model, caches, answers, timed) for answers in w.answers]
    return {"workload": asdict(w), "num_layers": w.config.num_layers, "rows": rows}


def lines(found: dict[str, Any], device_name: str) -> list[str]:
    """The results as text."""
    w = Workload(**found["workload"])
    head = (
        f"answers of one prompt of {w.prompt} tokens on {device_name}, {w.dtype}, pages of {w.page_size}: "
        f"{found['num_layers']} layers of {w.model}, random weights; {w.tokens} tokens each, the two ways in turns; medians"
    )
    rows = [
        f"{row['answers']:3} answers   ITL {row['itl_ms']['shared']:7.3f} ms, flat {row['itl_ms']['flat']:7.3f}: "
        f"{row['lower_percent']:5.1f} % lower   attention {row['attention_us']['shared']:6.1f} us a layer, flat "
        f"{row['attention_us']['flat']:6.1f}, {row['attention_percent']:4.1f} % of the step   "
        f"keys shared in {row['shared_steps']} of {row['steps']} steps (results differ by {row['difference']:.1e})"
        for row in found["rows"]
    ]
    return [head, *rows]


def run(w: Workload, json_path: str | None = None) -> None:
    """Measure, print, store."""
    import torch
    from rich.console import Console

    described: dict[str, Any] = {"device_name": "the CPU"}
    if w.device == "cuda":
        from .cuda_device import CudaDevice

        described = CudaDevice().describe()
    with torch.inference_mode():
        found = measure_all(w)
    found["environment"] = described
    console = Console()
    for line in lines(found, described["device_name"]):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if json_path is not None:
        with open(json_path, "w") as file:
            json.dump(found, file, indent=1)
