"""How long something takes on the host: warm up, repeat, take the median."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Microseconds of repeated runs."""

    median: float
    p10: float
    p90: float
    runs: int


def measure(f: Callable[[], object], *, seconds: float = 1.0, min_runs: int = 5, max_runs: int = 1000) -> Timing:
    """Run `f` for about `seconds`, at least `min_runs` times, after two runs that do not count."""
    f()
    start = time.perf_counter()
    f()
    once = max(time.perf_counter() - start, 1e-7)
    runs = min(max_runs, max(min_runs, int(seconds / once)))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        f()
        times.append((time.perf_counter() - start) * 1e6)
    times.sort()
    return Timing(statistics.median(times), times[len(times) // 10], times[len(times) * 9 // 10], runs)
