"""How a token is chosen from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..errors import ArgumentError

# The nucleus is looked for among this many largest logits first: sorting a vocabulary of 49,152 takes milliseconds.
_FIRST_LOOK = 512


@dataclass(frozen=True)
class Sampler:
    """Greedy, or temperature with nucleus (top-p) sampling (Holtzman et al., arXiv 1904.09751).

    temperature : 0 takes the largest logit; otherwise logits are divided by it.
    top_p : the smallest set of tokens whose probability reaches this is sampled from; 1.0 for all.
    seed : of the random numbers; each sample of each request draws from a stream of its own, so a request's text depends neither on
        the batch nor on the other samples.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ArgumentError(f"temperature is {self.temperature}; it must be finite and at least 0 (0: greedy)")
        if not 0 < self.top_p <= 1:
            raise ArgumentError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.seed < 0:
            raise ArgumentError(f"seed is {self.seed}; it must be at least 0")

    @property
    def is_greedy(self) -> bool:
        """Whether the largest logit is taken, so that logits need not leave a device."""
        return self.temperature == 0

    def stream(self, request: int, sample: int) -> np.random.Generator:
        """The random numbers of one sample of one request."""
        return np.random.Generator(np.random.PCG64([self.seed, request, sample]))

    def choose(self, logits: np.ndarray, rng: np.random.Generator) -> int:
        """A token for logits [vocab_size], float32."""
        if self.is_greedy:
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / self.temperature
        weights = np.exp(scaled - scaled.max())
        if self.top_p == 1:
            return _draw(np.arange(weights.size), weights, rng)
        return _draw(*nucleus(weights, self.top_p), rng)


def nucleus(weights: np.ndarray, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """The fewest tokens whose weights reach `top_p` of the sum, heaviest first, and their weights; at least one."""
    target = top_p * weights.sum()
    count = min(_FIRST_LOOK, weights.size)
    while True:
        heaviest = np.argpartition(weights, weights.size - count)[weights.size - count :]
        heaviest = heaviest[np.argsort(-weights[heaviest], kind="stable")]
        reached = np.cumsum(weights[heaviest])
        if reached[-1] >= target or count == weights.size:
            size = min(int(np.searchsorted(reached, target)) + 1, count)
            return heaviest[:size], weights[heaviest[:size]]
        count = min(count * 8, weights.size)


def _draw(tokens: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> int:
    cumulative = np.cumsum(weights)
    index = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    return int(tokens[min(index, tokens.size - 1)])
