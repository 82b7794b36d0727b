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
    """Run `f` for about `seconds`, at least `min_runs` times, after two runs that do not count.

    What takes longer than five seconds is run once more after one run that does not count: its spread is small beside its length.
    """
    once = _seconds_of(f)
    if once > 5.0:
        min_runs = 1
    else:
        once = _seconds_of(f)
    runs = min(max_runs, max(min_runs, int(seconds / once)))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        f()
        times.append((time.perf_counter() - start) * 1e6)
    times.sort()
    return Timing(statistics.median(times), times[len(times) // 10], times[len(times) * 9 // 10], runs)


def _seconds_of(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return max(time.perf_counter() - start, 1e-7)
