"""Continuous batching over any backend, with the time of every token.

The rules are those of `runtime.Engine`: first come, first served; a request starts when the cache has pages for its longest text; every
running sample decodes in every step; prompts go in chunks beside them, as far as the step's tokens reach.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import ArgumentError
from ..runtime.engine import Engine
from .serve_workloads import Request

Batch = Sequence[tuple[int, Sequence[int]]]  # (sequence, its new tokens)


@dataclass(frozen=True)
class CacheSizes:
    """max_batch : sequences of a step; max_tokens : new tokens of a step; num_pages, page_size : of the cache."""

    max_batch: int
    max_tokens: int
    num_pages: int
    page_size: int


class Backend(Protocol):
    """A model with its cache. Sequences are numbers that the caller chooses."""

    sizes: CacheSizes
    runs_ahead: bool  # it makes use of `goes_on`

    def add(self, seq: int) -> None:
        """An empty sequence."""

    def fork(self, parent: int, child: int) -> None:
        """A sequence that begins as the parent is now."""

    def remove(self, seq: int) -> None:
        """Its pages go back, where no other sequence needs them."""

    def step(self, batch: Batch, *, goes_on: bool = False) -> list[int]:
        """Run new tokens, at least one for each sequence named; returns the greedy next token of each. Returns when it has them.

        goes_on : the next step will be of the same sequences, each with its token of this one: it may be under way on return.
        """


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def now(self) -> float:
        """Seconds."""
        return time.perf_counter() - self._start

    def wait_until(self, moment: float) -> None:
        """Sleep; returns at once if the moment has passed."""
        time.sleep(max(0.0, moment - self.now()))


@dataclass
class Sample:
    """One text: its tokens, and when each of them was there (seconds)."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


@dataclass
class Record:
    """A request and what became of it."""

    request: Request
    samples: list[Sample]


@dataclass(frozen=True)
class StepRecord:
    """start, end : seconds; decoding : samples that decoded; prompt_tokens : of chunks; keys : tokens of all its sequences after it."""

    start: float
    end: float
    decoding: int
    prompt_tokens: int
    keys: int


@dataclass
class ServeRun:
    """What happened: a record of every request, in the order given, and of every step."""

    records: list[Record]
    steps: list[StepRecord]


@dataclass
class _Running:
    record: Record
    seqs: list[int]
    pages: int
    prefilled: int = 0

    @property
    def prompt(self) -> Sequence[int]:
        return self.record.request.prompt

    def active(self) -> list[int]:
        """Samples that decode."""
        if self.prefilled < len(self.prompt):
            return []
        limit = self.record.request.max_new_tokens
        return [i for i, sample in enumerate(self.record.samples) if len(sample.tokens) < limit]


def pages_needed(request: Request, page_size: int) -> int:
    """Pages of the request's longest text, those of the prompt shared by its samples."""
    return Engine.pages_needed(len(request.prompt), request.max_new_tokens, request.samples, page_size)


class Loop:
    """Serves requests on a backend. Sequence numbers are used once, from `first_seq`."""

    def __init__(self, backend: Backend, clock: Clock, first_seq: int = 0) -> None:
        self.backend, self.clock, self.sizes = backend, clock, backend.sizes
        self._running: list[_Running] = []
        self._steps: list[StepRecord] = []
        self._reserved = 0
        self._next_seq = first_seq
        self._goes_on = False  # the backend was told that the next step is the last one's with its tokens

    def run(self, requests: Sequence[Request]) -> ServeRun:
        """Serve all requests, in the order of their arrivals. ArgumentError for one that can never be served."""
        for number, request in enumerate(requests):
            self._check(number, request)
        records = [Record(r, [Sample() for _ in range(r.samples)]) for r in requests]
        waiting = deque(sorted(records, key=lambda record: record.request.arrival))
        while waiting or self._running:
            if not self._running:
                self.clock.wait_until(waiting[0].request.arrival)
            if not self._goes_on:
                self._admit(waiting)
            if self._running:
                self._step(waiting)
        return ServeRun(records, self._steps)

    def _check(self, number: int, request: Request) -> None:
        sizes = self.sizes
        pages = pages_needed(request, sizes.page_size)
        if not request.prompt or request.max_new_tokens < 1:
            raise ArgumentError(f"request {number} has no prompt or asks for no tokens; both must be at least 1")
        if request.samples > min(sizes.max_batch, sizes.max_tokens):
            raise ArgumentError(
                f"request {number} has {request.samples} samples; a step takes {min(sizes.max_batch, sizes.max_tokens)} sequences: "
                "raise --max-batch"
            )
        if pages > sizes.num_pages:
            raise ArgumentError(
                f"request {number} needs {pages} pages of {sizes.page_size} tokens; the cache has {sizes.num_pages}: raise --num-pages"
            )

    def _can_admit(self, waiting: deque[Record]) -> bool:
        """Whether the first of those that wait is there, and there is room for it."""
        if not waiting or waiting[0].request.arrival > self.clock.now():
            return False
        request = waiting[0].request
        sequences = sum(len(r.seqs) for r in self._running) + request.samples
        limit = min(self.sizes.max_batch, self.sizes.max_tokens)
        return (
            sequences <= limit and self._reserved + pages_needed(request, self.sizes.page_size) <= self.sizes.num_pages
        )

    def _admit(self, waiting: deque[Record]) -> None:
        while self._can_admit(waiting):
            request = waiting[0].request
            pages = pages_needed(request, self.sizes.page_size)
            seqs = list(range(self._next_seq, self._next_seq + request.samples))
            self._next_seq += request.samples
            self._reserved += pages
            self.backend.add(seqs[0])
            self._running.append(_Running(waiting.popleft(), seqs, pages))

    def _step(self, waiting: deque[Record]) -> None:
        start = self.clock.now()
        decoding = [(r, i) for r in self._running for i in r.active()]
        batch: list[tuple[int, Sequence[int]]] = [(r.seqs[i], r.record.samples[i].tokens[-1:]) for r, i in decoding]
        chunks = self._chunks(self.sizes.max_tokens - len(batch))
        batch += [(r.seqs[0], r.prompt[r.prefilled : r.prefilled + size]) for r, size in chunks]
        # what arrives from now on begins a step later, as in runtime.Engine
        self._goes_on = (
            self.backend.runs_ahead
            and not chunks
            and not self._can_admit(waiting)
            and all(self._needs_two(r, i) for r, i in decoding)
        )
        tokens = self.backend.step(batch, goes_on=self._goes_on)
        taken = [(r, i, token) for (r, i), token in zip(decoding, tokens, strict=False)]
        keys = sum(len(r.prompt) + len(r.record.samples[i].tokens) for r, i in decoding)
        for (r, size), token in zip(chunks, tokens[len(decoding) :], strict=True):
            r.prefilled += size
            keys += r.prefilled
            if r.prefilled == len(r.prompt):
                for child in r.seqs[1:]:
                    self.backend.fork(r.seqs[0], child)
                taken += [(r, i, token) for i in range(len(r.seqs))]
        end = self.clock.now()
        for r, i, token in taken:
            self._take(r, i, token, end)
        self._steps.append(StepRecord(start, end, len(decoding), sum(size for _, size in chunks), keys))
        for r in [r for r in self._running if r.prefilled == len(r.prompt) and not r.active()]:
            self._running.remove(r)
            self._reserved -= r.pages

    @staticmethod
    def _needs_two(r: _Running, index: int) -> bool:
        """Whether the step's token is not the sample's last."""
        return len(r.record.samples[index].tokens) + 1 < r.record.request.max_new_tokens

    def _take(self, r: _Running, index: int, token: int, now: float) -> None:
        sample = r.record.samples[index]
        sample.tokens.append(token)
        sample.times.append(now)
        if len(sample.tokens) == r.record.request.max_new_tokens:
            self.backend.remove(r.seqs[index])

    def _chunks(self, budget: int) -> list[tuple[_Running, int]]:
        chunks = []
        for r in self._running:
            size = min(len(r.prompt) - r.prefilled, budget)
            if size > 0:
                chunks.append((r, size))
                budget -= size
        return chunks
