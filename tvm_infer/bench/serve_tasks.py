"""What `bench serve` asks of each backend: a workload with arrivals, or full batches that decode."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ..errors import ArgumentError, TvmInferError
from . import serve_breakdown, serve_decode
from .serve_loop import Backend, CacheSizes, Clock, Loop, pages_needed
from .serve_metrics import summarize
from .serve_workloads import Request, ServeWorkload

_WARM_UP_STEPS = 3  # of every batch size: kernels are loaded and graphs captured by then
Tokens = Sequence[Sequence[int]]  # of each text


class Task(Protocol):
    """What to measure."""

    @property
    def mode(self) -> str:
        """ "serve" or "decode"."""

    @property
    def sizes(self) -> CacheSizes:
        """Of the cache that it needs."""

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""

    @property
    def method(self) -> tuple[str, ...]:
        """How figures come about, in words."""

    def rows(self, backend: Any, clock: Callable[[], Clock], first_seq: int) -> Iterator[tuple[dict[str, Any], Tokens]]:
        """Figures, and the tokens that the backend chose; sequences are numbered from `first_seq`."""

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class Serving:
    """Requests that arrive."""

    workload: ServeWorkload
    rate: float
    requests: Sequence[Request]
    sizes: CacheSizes
    vocab_size: int
    seed: int
    mode = "serve"
    method = (
        "TTFT from a request's arrival, waiting included; ITL between consecutive tokens of a text, prompts of others in between too",
        "requests start first come, first served; prompts go in chunks beside the decodes; greedy tokens, no stop token",
        "before the clock starts: a chunk of prompt, then decode steps of 1, 2, 4, … sequences",
        "parts: a decode step of the run's median number of samples and keys, by itself",
    )

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(len(r.prompt) + r.max_new_tokens for r in self.requests)

    def rows(self, backend: Any, clock: Callable[[], Clock], first_seq: int) -> Iterator[tuple[dict[str, Any], Tokens]]:
        """One row."""
        run = Loop(backend, clock(), first_seq=first_seq).run(self.requests)
        figures = summarize(run)
        free = first_seq + sum(r.samples for r in self.requests)
        figures["plain_step"] = plain_step(backend, figures["typical"], self.vocab_size, free, self.seed)
        yield figures, [sample.tokens for record in run.records for sample in record.samples]

    def __str__(self) -> str:
        speed = "all at once" if math.isinf(self.rate) else f"{self.rate:g} a second"
        return f"{len(self.requests)} requests, {speed}; {self.workload}"


@dataclass(frozen=True)
class Decoding:
    """Full batches that decode."""

    batches: Sequence[int]
    keys: int
    steps: int
    sizes: CacheSizes
    vocab_size: int
    seed: int
    mode = "decode"
    method = (
        "ITL: host time from step to step of a full batch, tokens on the host; keys grow by one a step and are --kv in the mean",
        "every request has a prompt of its own, in pages of its own; two steps before the first that counts",
        "parts: a decode step of that size, by itself",
    )

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return self.keys + self.steps

    def rows(self, backend: Any, clock: Callable[[], Clock], first_seq: int) -> Iterator[tuple[dict[str, Any], Tokens]]:
        """A row for each batch."""
        for batch in self.batches:
            seqs = range(first_seq, first_seq + batch)
            figures, tokens = serve_decode.measure(
                backend, seqs, self.keys, self.steps, self.vocab_size, self.seed, clock()
            )
            for seq in seqs:
                backend.remove(seq)
            figures["typical"] = typical = {"batch": batch, "keys": self.keys}
            figures["plain_step"] = plain_step(backend, typical, self.vocab_size, seqs.stop, self.seed)
            first_seq = seqs.stop + batch
            yield figures, tokens

    def __str__(self) -> str:
        return f"decode only: {self.steps} steps of batch {', '.join(map(str, self.batches))} at {self.keys} keys"


def serving_sizes(requests: Sequence[Request], max_batch: int, max_tokens: int, page_size: int) -> CacheSizes:
    """A cache that holds the longest requests of a full batch."""
    samples = max(r.samples for r in requests)
    if samples > min(max_batch, max_tokens):
        raise ArgumentError(
            f"{samples} samples of a prompt run together; a step takes {min(max_batch, max_tokens)} sequences: raise --max-batch"
        )
    needs = sorted((pages_needed(r, page_size) for r in requests), reverse=True)
    return CacheSizes(max_batch, max_tokens, sum(needs[: max_batch // samples]), page_size)


def warm_up(backend: Backend, vocab_size: int) -> int:
    """Run each kind of step; returns the first sequence number that is free after it."""
    sizes = backend.sizes
    length = min(sizes.max_tokens, sizes.num_pages * sizes.page_size)
    Loop(backend, Clock()).run([Request(0.0, tuple(i % vocab_size for i in range(length)), 1)])
    first, batch = 1, 1
    while batch <= min(sizes.max_batch, sizes.max_tokens, sizes.num_pages):
        seqs = range(first, first + batch)
        for seq in seqs:
            backend.add(seq)
        for _ in range(min(_WARM_UP_STEPS, sizes.page_size)):
            backend.step([(seq, [seq % vocab_size]) for seq in seqs])
        for seq in seqs:
            backend.remove(seq)
        first, batch = first + batch, batch * 2
    return first


def plain_step(
    backend: Any, typical: dict[str, int] | None, vocab_size: int, first_seq: int, seed: int
) -> dict[str, Any]:
    """{"seconds", "batch", "keys"} of a decode step of that size, "graph_seconds" of its graph alone where the backend has one, or
    {"skipped": why not}."""

    def measure(step: Callable[[bool], object], seqs: Sequence[int]) -> dict[str, Any]:
        alone = getattr(backend, "graph_alone", None)
        if alone is not None:
            # the prompts before have heated the chip: what follows them at once is slower for a moment
            alone(seqs)
        found = {"seconds": serve_breakdown.plain_step(step)}
        return found | ({} if alone is None else {"graph_seconds": alone(seqs)})

    return _of_step(backend, typical, vocab_size, first_seq, seed, measure)


def breakdown(backend: Any, plain: dict[str, Any], vocab_size: int, first_seq: int, seed: int) -> dict[str, Any]:
    """Seconds of the parts of the step that :func:`plain_step` timed, or {"skipped": why not}. Nothing is timed after this."""
    if "skipped" in plain:
        return plain

    def measure(step: Callable[[bool], object], seqs: Sequence[int]) -> dict[str, Any]:
        found = asdict(backend.breakdown(lambda: step(False), plain["seconds"]))
        alone = getattr(backend, "attention_alone", None)
        if alone is None:
            return found
        return found | {"attention_alone": alone(seqs, swept=True), "attention_back_to_back": alone(seqs, swept=False)}

    return _of_step(backend, plain, vocab_size, first_seq, seed, measure)


def _of_step(
    backend: Any,
    typical: dict[str, Any] | None,
    vocab_size: int,
    first_seq: int,
    seed: int,
    measure: Callable[[Callable[[bool], object], Sequence[int]], dict[str, Any]],
) -> dict[str, Any]:
    if typical is None:
        return {"skipped": "no sample decoded a second token"}
    sizes = backend.sizes
    batch = typical["batch"]
    keys = min(typical["keys"], sizes.num_pages // batch * sizes.page_size - serve_breakdown.PLAIN_RUNS - 1)
    if keys < 1:
        return {"skipped": f"the cache has no room for {batch} sequences that share nothing"}
    seqs = range(first_seq, first_seq + batch)
    try:
        tokens = serve_decode.fill(backend, seqs, keys, vocab_size, seed)
        decodes = [(s, [t]) for s, t in zip(seqs, tokens, strict=True)]
        found = measure(lambda goes_on: backend.step(decodes, goes_on=goes_on), seqs)
    except TvmInferError as error:
        return {"skipped": f"{type(error).__name__}: {error}"}
    finally:
        for seq in seqs:
            backend.remove(seq)
    return {"batch": batch, "keys": keys, **found}


def agreement(tokens: Tokens, reference: Tokens) -> dict[str, int]:
    """Tokens before the first difference of each text, summed, beside all of them."""
    same = 0
    for ours, theirs in zip(tokens, reference, strict=True):
        pairs = enumerate(zip(ours, theirs, strict=True))
        same += next((i for i, (a, b) in pairs if a != b), len(ours))
    return {"same_tokens": same, "compared_tokens": sum(map(len, tokens))}
