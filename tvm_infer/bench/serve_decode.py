"""Decode alone: inter-token latency of a full batch at a given number of keys, without arrivals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ArgumentError
from .serve_loop import Backend, CacheSizes, Clock
from .serve_metrics import quantiles

_WARM_UP_STEPS = 2


def parse_batches(text: str) -> list[int]:
    """ "16,64"."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) >= 1 for part in parts):
        raise ArgumentError(f"argument `--batch` is {text!r}; it must be numbers of requests, such as 16,64")
    return [int(part) for part in parts]


def first_length(keys: int, steps: int) -> int:
    """Tokens before the first timed step, so that the steps' mean number of keys is `keys`."""
    start = keys - 1 - (steps - 1) // 2
    if start < 1:
        raise ArgumentError(
            f"argument `--kv` is {keys} with {steps} steps; keys grow by one a step, so --kv must be at least {(steps - 1) // 2 + 2}"
        )
    return start


def cache_sizes(batches: Sequence[int], keys: int, steps: int, max_tokens: int, page_size: int) -> CacheSizes:
    """A cache for the largest batch."""
    batch = max(batches)
    longest = first_length(keys, steps) + steps
    return CacheSizes(batch, max(max_tokens, batch), batch * -(-longest // page_size), page_size)


def fill(backend: Backend, seqs: Sequence[int], length: int, vocab_size: int, seed: int) -> list[int]:
    """Sequences of `length` random tokens each, prompts in chunks; the next token of each."""
    rng = np.random.Generator(np.random.PCG64([seed, length, len(seqs)]))
    size = backend.sizes.max_tokens
    following = []
    for seq in seqs:
        backend.add(seq)
        tokens = rng.integers(0, vocab_size, length).tolist()
        for begin in range(0, length, size):
            chosen = backend.step([(seq, tokens[begin : begin + size])])
        following += chosen
    return following


def measure(
    backend: Backend, seqs: Sequence[int], keys: int, steps: int, vocab_size: int, seed: int, clock: Clock
) -> tuple[dict[str, Any], list[list[int]]]:
    """Figures of `steps` decode steps of new sequences of these numbers, after two that do not count, and the tokens of each. The
    sequences stay."""
    start = first_length(keys, steps)
    warm_up = min(_WARM_UP_STEPS, start - 1)
    following = fill(backend, seqs, start - warm_up, vocab_size, seed)
    times, tokens = [], [[token] for token in following]
    for number in range(warm_up + steps):
        begin = clock.now()
        batch = [(seq, [token]) for seq, token in zip(seqs, following, strict=True)]
        following = backend.step(batch, goes_on=number + 1 < warm_up + steps)
        if number >= warm_up:
            times.append(clock.now() - begin)
        for text, token in zip(tokens, following, strict=True):
            text.append(token)
    itl = quantiles(times)
    rate = len(seqs) / (itl["median"] * 1e-3) if itl["median"] else None
    return {"batch": len(seqs), "keys": keys, "steps": steps, "itl_ms": itl, "tokens_per_s": rate}, tokens
