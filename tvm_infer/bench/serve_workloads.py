"""Serving workloads: how long requests are, when they come. All are synthetic and seeded; what a trace is said to be like is declared.

The same seed gives the same requests to every backend.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from ..errors import ArgumentError


class Lengths(Protocol):
    """A distribution of token counts, all at least 1."""

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """int64 [count]."""

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class Uniform:
    """Every length from `low` to `high`, both included, equally likely."""

    low: int
    high: int

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """int64 [count]."""
        return rng.integers(self.low, self.high, count, endpoint=True)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"uniform {self.low}..{self.high}"


@dataclass(frozen=True)
class LogNormal:
    """exp of a normal distribution with the given mean (before clipping) and sigma (of the logarithm), clipped to low..high."""

    mean: float
    sigma: float
    low: int
    high: int

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """int64 [count]."""
        drawn = rng.lognormal(math.log(self.mean) - self.sigma**2 / 2, self.sigma, count)
        return np.clip(np.rint(drawn), self.low, self.high).astype(np.int64)

    def __str__(self) -> str:
        return f"log-normal, mean {self.mean:g}, sigma {self.sigma:g}, in {self.low}..{self.high}"


@dataclass(frozen=True)
class Zipf:
    """Length k of low..high with probability proportional to k ** -exponent: many short ones, a long tail."""

    exponent: float
    low: int
    high: int

    def probabilities(self) -> np.ndarray:
        """float64 [high - low + 1]."""
        weights = np.arange(self.low, self.high + 1, dtype=np.float64) ** -self.exponent
        return weights / weights.sum()

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """int64 [count]."""
        index = np.searchsorted(np.cumsum(self.probabilities()), rng.random(count), side="right")
        return self.low + np.minimum(index, self.high - self.low)

    def __str__(self) -> str:
        return f"Zipf-like, p(k) ~ k^-{self.exponent:g} in {self.low}..{self.high}"


@dataclass(frozen=True)
class Arrivals:
    """Times between requests: a gamma distribution with mean 1 / rate and coefficient of variation `cv` (1: Poisson arrivals; above 1:
    bursts)."""

    cv: float = 1.0

    def sample(self, rng: np.random.Generator, count: int, rate: float) -> np.ndarray:
        """Seconds from the start, float64 [count], ascending from 0. An infinite rate: all at once."""
        if math.isinf(rate):
            return np.zeros(count)
        shape = 1 / self.cv**2
        gaps = rng.gamma(shape, 1 / (rate * shape), count)
        gaps[0] = 0.0  # nothing happens before the first
        return np.cumsum(gaps)

    def __str__(self) -> str:
        return "Poisson" if self.cv == 1 else f"gamma, coefficient of variation {self.cv:g}"


@dataclass(frozen=True)
class Request:
    """arrival : seconds from the start; prompt : its tokens; max_new_tokens : tokens of each of its `samples` texts."""

    arrival: float
    prompt: tuple[int, ...]
    max_new_tokens: int
    samples: int = 1


@dataclass(frozen=True)
class ServeWorkload:
    """Requests by distribution. samples : texts of one prompt, which share its pages by fork. source : what the figures come from."""

    name: str
    prompt: Lengths
    output: Lengths
    arrivals: Arrivals = Arrivals()
    samples: int = 1
    source: str = ""

    def requests(self, count: int, rate: float, vocab_size: int, seed: int) -> list[Request]:
        """The same for the same arguments. Prompt tokens are uniform: no two requests share a prefix."""
        streams = [np.random.Generator(np.random.PCG64([seed, i])) for i in range(4)]
        times = self.arrivals.sample(streams[0], count, rate)
        prompts, outputs = self.prompt.sample(streams[1], count), self.output.sample(streams[2], count)
        return [
            Request(float(t), tuple(streams[3].integers(0, vocab_size, int(p)).tolist()), int(o), self.samples)
            for t, p, o in zip(times, prompts, outputs, strict=True)
        ]

    def __str__(self) -> str:
        samples = f", {self.samples} samples of each prompt" if self.samples > 1 else ""
        return (
            f"{self.name} (synthetic): prompts {self.prompt}; outputs {self.output}; arrivals {self.arrivals}{samples}"
            f"{'; ' + self.source if self.source else ''}"
        )


WORKLOADS = {
    w.name: w
    for w in (
        ServeWorkload("fixed", Uniform(1024, 1024), Uniform(128, 128)),
        ServeWorkload("uniform", Uniform(512, 2048), Uniform(128, 256)),
        ServeWorkload(
            "sharegpt",
            LogNormal(161, 1.2, 4, 1024),
            LogNormal(338, 0.9, 4, 1024),
            source="like ShareGPT: means as in the vLLM paper, arXiv 2309.06180, section 6.1; shape and clipping ours",
        ),
        ServeWorkload(
            "burstgpt",
            Zipf(1.0, 16, 4096),
            LogNormal(200, 0.8, 4, 1024),
            Arrivals(2.0),
            source="like BurstGPT: gamma bursts and Zipf prompts as arXiv 2401.17644 describes; parameters ours",
        ),
        ServeWorkload("parallel", Uniform(512, 2048), Uniform(128, 128), samples=4),
    )
}


def parse_lengths(text: str, flag: str) -> Uniform:
    """ "128" or "512..2048"."""
    match = re.fullmatch(r"\s*(\d+)(?:\.\.(\d+))?\s*", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise ArgumentError(
            f"argument `{flag}` is {text!r}; it must be a number of tokens or a range of them, such as 128 or 512..2048"
        )
    return Uniform(low, high)


def workload(name: str, prompt: str | None, output: str | None, samples: int | None) -> ServeWorkload:
    """A workload by name, with other lengths or another number of samples where they are given."""
    if name not in WORKLOADS:
        raise ArgumentError(f"argument `--workload` is {name!r}; known are {', '.join(WORKLOADS)}")
    chosen = WORKLOADS[name]
    if prompt is not None:
        chosen = replace(chosen, prompt=parse_lengths(prompt, "--prompt-lens"))
    if output is not None:
        chosen = replace(chosen, output=parse_lengths(output, "--output-lens"))
    if samples is not None:
        if samples < 1:
            raise ArgumentError(f"argument `--samples` is {samples}; it must be at least 1")
        chosen = replace(chosen, samples=samples)
    return chosen


def longest(requests: Sequence[Request]) -> int:
    """Tokens of the longest text, prompt included."""
    return max(len(r.prompt) + r.max_new_tokens for r in requests)
