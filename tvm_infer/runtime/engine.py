"""Continuous batching: requests join and leave between steps, prefill and decode run in one call."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ArgumentError, OutOfPagesError
from .kv_cache import PagedKVCache
from .sampling import Sampler

if TYPE_CHECKING:
    from .executable import Executable
    from .session import StepResult


@dataclass(eq=False)  # two generations with equal tokens are still two
class Generation:
    """One sample of one request, growing while the engine runs.

    request, sample : its numbers. prompt : tokens. tokens : what was generated. finish_reason : "" while it runs, "stop" (a stop
    token, the last of `tokens`), "length" (max_new_tokens) or "cancelled".
    """

    request: int
    sample: int
    prompt: Sequence[int]
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""


OnToken = Callable[[Generation, int], None]


@dataclass
class EngineStats:
    """Work done so far. A step that has prompt tokens counts as prefill, its decode tokens too. decode_seconds : of the host; a step
    launched ahead also runs while callbacks do, and then counts less. reused_tokens : of prompts, which the cache held already."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    reused_tokens: int = 0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens of pure decode steps a second, all sequences together."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class _Decodes:
    """A step of decodes. samples : (request, number of the sample), a row each."""

    result: StepResult
    samples: Sequence[tuple[_Request, int]]

    def any_active(self) -> bool:
        return any(not request.samples[i].finish_reason for request, i in self.samples)


@dataclass(eq=False)
class _Request:
    prompt: np.ndarray
    samples: list[Generation]
    max_new_tokens: int
    sampler: Sampler
    stop_tokens: frozenset[int]
    on_token: OnToken | None
    pages: int  # reserved from admission to the end
    streams: list[np.random.Generator]
    namespace: int
    seq_ids: list[int] = field(default_factory=list)
    live: list[int] = field(default_factory=list)  # of seq_ids, those in the cache
    has_begun: bool = False
    prefilled: int = 0

    @property
    def is_prefilling(self) -> bool:
        return self.prefilled < len(self.prompt)


class Engine:
    """Requests that share one cache. Not thread-safe.

    A request is admitted, first come first served, when the cache has pages for its longest possible text and room for its samples,
    so that a step never runs out of pages; those that running requests share are counted once. A long prompt is prefilled in chunks
    beside the others' decoding.

    Where the executable can (`Executable.runs_ahead`) and all running samples decode greedily, with tokens to come after the next, a
    step is launched before the tokens of the one ahead of it are read. It is then under way when a sample turns out to have ended,
    whose token in it is dropped, and when a request arrives, which begins a step later. The device may still be at it when
    :meth:`step` and :meth:`run` return. While the engine has requests, the cache is the engine's: steps of others on it would write
    their tokens over those that the engine has not read.

    Prompts are not computed as far as the cache holds what they begin with (`prefix_reuse`): pages of earlier requests, running or
    ended, that nothing else has needed since. A request that would find at least half of what it has to compute in the pages of
    another one's prompt, were that step done, begins behind it. Decodes that share pages, found so or as samples of one prompt, read
    them once where that is shorter, unless the cache was made with ``shared_prefix=False``.
    """

    def __init__(self, executable: Executable, cache: PagedKVCache, *, prefix_reuse: bool = True) -> None:
        executable.bind(cache)
        if len(cache):
            raise ArgumentError(
                f"argument `cache` holds {len(cache)} sequences; an engine needs an empty cache: clear() it"
            )
        # with tables by request, what pages hold depends on more than tokens
        self.prefix_reuse = prefix_reuse and not cache.has_request_tables
        if self.prefix_reuse:
            cache.enable_prefix_reuse()
        self.executable = executable
        self.cache = cache
        self.stats = EngineStats()
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._next_request = 0
        self._next_seq_id = 0
        self._reserved_pages = 0
        # Reservations count a page once for each request that has it; this is how many times too often. (What windows keep is counted
        # otherwise: pages that requests share leave them one by one.)
        self._shared_pages = 0
        self._counts_shared = self.prefix_reuse and cache.window_left is None
        self._max_step_tokens = min(cache.max_tokens, executable.manifest.max_tokens)
        # every running sample decodes one token in every step
        self._max_sequences = min(cache.max_batch, self._max_step_tokens)
        self._events: list[tuple[_Request, Generation, int]] = []
        self._launched: deque[_Decodes] = deque()  # whose tokens were not taken, the oldest first; two at most

    @staticmethod
    def pages_needed(prompt_length: int, max_new_tokens: int, n: int, page_size: int) -> int:
        """Pages of a request's longest text: whole pages of the prompt are shared by its samples, the rest is each one's own."""
        longest = prompt_length + max(max_new_tokens - 1, 0)  # the last token is never fed back
        shared = prompt_length // page_size
        return shared + n * (-(-longest // page_size) - shared)

    def _pages_of(self, prompt_length: int, max_new_tokens: int, n: int) -> int:
        """The same for this cache, whose windows may keep fewer of them."""
        all_pages = self.pages_needed(prompt_length, max_new_tokens, n, self.cache.page_size)
        longest = prompt_length + max(max_new_tokens - 1, 0)
        return min(all_pages, n * self.cache.peak_pages(longest, self._max_step_tokens))

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int = 64,
        sampler: Sampler | None = None,
        n: int = 1,
        stop_tokens: Sequence[int] = (),
        on_token: OnToken | None = None,
        namespace: int = 0,
    ) -> list[Generation]:
        """Queue a prompt; returns its `n` generations, which grow as steps are run. Any time, also between steps.

        namespace : prompts of one namespace reuse each other's pages (:meth:`PagedKVCache.add_sequence`), and nobody else's.

        Raises
        ------
        ArgumentError : an empty prompt, a token outside the vocabulary, n or max_new_tokens below 1, more samples than the cache's
        max_batch, a text longer than the model's context. OutOfPagesError : the prompt and its longest text do not fit the whole cache.
        """
        tokens = np.asarray(prompt, np.int64).reshape(-1)
        self._check(tokens, max_new_tokens, n)
        request = self._next_request
        self._next_request += 1
        sampler = sampler or Sampler()
        samples = [Generation(request, i, [int(t) for t in tokens]) for i in range(n)]
        streams = [sampler.stream(request, i) for i in range(n)]
        pages = self._pages_of(len(tokens), max_new_tokens, n)
        stops = frozenset(int(t) for t in stop_tokens)
        self._waiting.append(
            _Request(tokens, samples, max_new_tokens, sampler, stops, on_token, pages, streams, namespace)
        )
        return samples

    def _check(self, tokens: np.ndarray, max_new_tokens: int, n: int) -> None:
        manifest, cache = self.executable.manifest, self.cache
        if tokens.size == 0:
            raise ArgumentError("argument `prompt` is empty; a text needs one token at least to begin from")
        if tokens.min() < 0 or tokens.max() >= manifest.vocab_size:
            raise ArgumentError(
                f"argument `prompt` has tokens {tokens.min()} to {tokens.max()}; the vocabulary is 0 to {manifest.vocab_size - 1}"
            )
        if max_new_tokens < 1 or n < 1:
            raise ArgumentError(f"max_new_tokens is {max_new_tokens}, n is {n}; both must be at least 1")
        if n > self._max_sequences:
            raise ArgumentError(
                f"n is {n}; a step takes at most {self._max_sequences} sequences (max_batch {cache.max_batch}, max_tokens "
                f"{self._max_step_tokens})"
            )
        longest = tokens.size + max_new_tokens
        max_position = self.executable.max_position
        if max_position is not None and longest > max_position:
            raise ArgumentError(
                f"a prompt of {tokens.size} tokens and {max_new_tokens} new ones are {longest}; the model's context is "
                f"{max_position}: shorten one of them"
            )
        pages = self._pages_of(tokens.size, max_new_tokens, n)
        if pages > cache.num_pages:
            raise OutOfPagesError(
                f"a prompt of {tokens.size} tokens and {n} x {max_new_tokens} new ones need {pages} pages of {cache.page_size} tokens "
                f"({pages * cache.bytes_per_page} bytes); the cache has {cache.num_pages} in all: make it with num_pages={pages} or "
                "more, or shorten them"
            )

    def cancel(self, generation: Generation) -> None:
        """End the request of this generation, all its samples, between two steps. Nothing happens if it has ended."""
        for queue in (self._waiting, self._running):
            for request in list(queue):
                if any(sample is generation for sample in request.samples):
                    for sample in request.samples:
                        sample.finish_reason = sample.finish_reason or "cancelled"
                    queue.remove(request)
                    if queue is self._running:
                        self._free(request)

    @property
    def num_waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests under way."""
        return len(self._running)

    def run(self) -> None:
        """Step until every request has ended."""
        while self.step():
            pass

    def step(self) -> bool:
        """One token for every running sample, and prompt tokens up to the step's limit. False when there is nothing left to do.

        Callbacks come last, when the engine is ready for its next step: what they raise passes through, and they may submit or cancel.
        """
        self._drop_ended()
        if not self._launched:
            self._admit()
            decoding = [(r, i) for r in self._running if not r.is_prefilling for i in self._active(r)]
            chunks = self._prefill_chunks(self._max_step_tokens - len(decoding))
            if not decoding and not chunks:
                return False
            if chunks:
                self._run_step(decoding, chunks)
            else:
                batch = [(r.seq_ids[i], r.samples[i].tokens[-1:]) for r, i in decoding]
                self._launched.append(_Decodes(self.executable.forward(self.cache, batch), decoding))
        if self._launched:
            self._finish_decodes()
        self._retire()
        self._drop_ended()
        events, self._events = self._events, []
        for request, generation, token in events:
            assert request.on_token is not None
            request.on_token(generation, token)
        return bool(self._running or self._waiting)

    def _drop_ended(self) -> None:
        """Forget a launched step all of whose samples have ended by the step before it."""
        if self._launched and not self._launched[0].any_active():
            self._launched.clear()

    def _run_step(self, decoding: Sequence[tuple[_Request, int]], chunks: Sequence[tuple[_Request, int]]) -> None:
        batch: list[tuple[int, Sequence[int]]] = [(r.seq_ids[i], r.samples[i].tokens[-1:]) for r, i in decoding]
        batch += [(r.seq_ids[0], r.prompt[r.prefilled : r.prefilled + size].tolist()) for r, size in chunks]
        started = time.perf_counter()
        ends = np.cumsum([len(tokens) for _, tokens in batch]) - 1
        finishing = [r.prefilled + size == len(r.prompt) for r, size in chunks]
        rows = [*ends[: len(decoding)], *(e for e, done in zip(ends[len(decoding) :], finishing, strict=True) if done)]
        result = self.executable.forward(self.cache, batch, rows=[int(row) for row in rows])
        if rows:
            # the device works until its answer is read; the time of prefill and decode steps is told apart by it
            _ = result.greedy if self._is_greedy() else result.logits
        seconds = time.perf_counter() - started
        for row_index, (request, sample) in enumerate(decoding):
            self._take(request, sample, result, row_index)
        row_index = len(decoding)
        for (request, size), done in zip(chunks, finishing, strict=True):
            request.prefilled += size
            if done:
                self._begin_samples(request, result, row_index)
                row_index += 1
        self.stats.prefill_tokens += sum(size for _, size in chunks)
        self.stats.prefill_seconds += seconds

    def _finish_decodes(self) -> None:
        """Take the tokens of the oldest launched step, the next one launched before they are waited for if it may be.

        Whatever raises on the way, launched steps stay: the cache has them, so their tokens must be taken.
        """
        started = time.perf_counter()
        step = self._launched[0]
        if len(self._launched) == 1 and self._may_run_ahead(step.samples):
            self._launched.append(_Decodes(self.executable.decode_next(self.cache, step.result), step.samples))
        _ = step.result.greedy if self._is_greedy() else step.result.logits  # waits
        self._launched.popleft()
        taken = 0
        for row, (request, sample) in enumerate(step.samples):
            if not request.samples[sample].finish_reason:  # of a step ahead: ended or cancelled meanwhile
                self._take(request, sample, step.result, row)
                taken += 1
        self.stats.decode_steps += 1
        self.stats.decode_tokens += taken
        self.stats.decode_seconds += time.perf_counter() - started  # sampling included

    def _may_run_ahead(self, samples: Sequence[tuple[_Request, int]]) -> bool:
        """Whether the step behind one of these samples is another of the same, as far as can be known before their tokens are."""
        if not self.executable.runs_ahead or self._can_admit() or any(r.is_prefilling for r in self._running):
            return False
        return all(
            not r.samples[i].finish_reason and r.sampler.is_greedy and len(r.samples[i].tokens) + 1 < r.max_new_tokens
            for r, i in samples
        )

    def _is_greedy(self) -> bool:
        return all(request.sampler.is_greedy for request in self._running)

    @staticmethod
    def _active(request: _Request) -> list[int]:
        return [i for i, sample in enumerate(request.samples) if not sample.finish_reason]

    def _can_admit(self) -> bool:
        """Whether there is room for the first of those that wait."""
        if not self._waiting:
            return False
        request = self._waiting[0]
        sequences = sum(len(r.samples) for r in self._running) + len(request.samples)
        reserved = self._reserved_pages - self._shared_pages
        return sequences <= self._max_sequences and reserved + request.pages <= self.cache.num_pages

    def _admit(self) -> None:
        while self._can_admit():
            request = self._waiting.popleft()
            self._reserved_pages += request.pages
            request.seq_ids = [self._next_seq_id + i for i in range(len(request.samples))]
            self._next_seq_id += len(request.samples)
            self._running.append(request)

    def _prefill_chunks(self, budget: int) -> list[tuple[_Request, int]]:
        chunks: list[tuple[_Request, int]] = []
        for request in self._running:
            if budget <= 0:
                break
            if not request.has_begun:
                if self.prefix_reuse and self._is_better_later(request, chunks):
                    continue
                self._begin(request)
            size = min(len(request.prompt) - request.prefilled, budget)
            if size > 0:
                chunks.append((request, size))
                budget -= size
        return chunks

    def _begin(self, request: _Request) -> None:
        """Give the request its first sequence, with what the cache holds of its prompt."""
        if self.prefix_reuse:
            request.prefilled = self.cache.add_sequence(request.seq_ids[0], request.prompt, namespace=request.namespace)
            self.stats.reused_tokens += request.prefilled
        else:
            self.cache.add_sequence(request.seq_ids[0])
        request.has_begun = True
        request.live = request.seq_ids[:1]
        self._shared_pages += self._num_shared(request)

    def _is_better_later(self, request: _Request, chunks: Sequence[tuple[_Request, int]]) -> bool:
        """Whether these chunks, once computed, hold at least half of what the request would have to compute now.

        Then it loses a step and gains half of its prompt at least; less would not be worth a step to a long prompt.
        """
        page_size, prompt = self.cache.page_size, request.prompt
        most = 0
        for other, size in chunks:
            if other.namespace == request.namespace:
                count = min(other.prefilled + size, len(prompt) - 1)
                alike = prompt[:count] == other.prompt[:count]
                most = max(most, (count if alike.all() else int(alike.argmin())) // page_size * page_size)
        if most == 0:
            return False
        now = self.cache.match_prefix(prompt, namespace=request.namespace)
        return most > now and 2 * (most - now) >= len(prompt) - now

    def _begin_samples(self, request: _Request, result: StepResult, row: int) -> None:
        """The prompt is in: its other samples fork from it, and each takes its first token."""
        for child in request.seq_ids[1:]:
            self.cache.fork_sequence(request.seq_ids[0], child)
            request.live.append(child)
        for i in range(len(request.samples)):
            self._take(request, i, result, row)

    def _take(self, request: _Request, index: int, result: StepResult, row: int) -> None:
        sample = request.samples[index]
        if request.sampler.is_greedy:
            token = int(result.greedy[row])
        else:
            token = request.sampler.choose(result.logits[row], request.streams[index])
        sample.tokens.append(token)
        if token in request.stop_tokens:
            sample.finish_reason = "stop"
        elif len(sample.tokens) >= request.max_new_tokens:
            sample.finish_reason = "length"
        if sample.finish_reason:
            self._remove(request, index)
        if request.on_token is not None:
            self._events.append((request, sample, token))

    def _retire(self) -> None:
        for request in [r for r in self._running if not r.is_prefilling and not self._active(r)]:
            self._running.remove(request)
            self._reserved_pages -= request.pages

    def _free(self, request: _Request) -> None:
        self._reserved_pages -= request.pages
        for seq_id in list(request.live):
            self._remove(request, request.seq_ids.index(seq_id))

    def _remove(self, request: _Request, index: int) -> None:
        """Remove a sample's sequence; its pages can be found by all tokens that are known by now, those of steps ahead too."""
        seq_id = request.seq_ids[index]
        if self.prefix_reuse:
            known, length = self.cache.num_known_tokens(seq_id), self.cache.seq_len(seq_id)
            if known < length:
                self.cache.commit_tokens(seq_id, [*request.prompt, *request.samples[index].tokens][known:length])
        shared = self._num_shared(request)
        self.cache.remove_sequence(seq_id)
        request.live.remove(seq_id)
        self._shared_pages += self._num_shared(request) - shared

    def _num_shared(self, request: _Request) -> int:
        """Pages of the request that other requests have, too."""
        return self.cache.num_shared_pages(request.live) if self._counts_shared else 0
