"""How long something takes: on the host, and on a GPU by replaying a CUDA graph."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WARM_UP_LAUNCHES = 3  # before capture: kernels are loaded and compiled by then, which a capture does not allow
WARM_UP_REPLAYS = 2
REPLAYS = 15
# Of the GPU before each timing. Long prefills run into a card's power limit: an H200 takes 3.24 ms for 16384 tokens after a rest and
# 3.65 ms after seconds of load, so without a rest a figure would depend on what was measured before it.
REST_S = 0.5


@dataclass(frozen=True)
class Timing:
    """Microseconds of repeated runs."""

    median: float
    p10: float
    p90: float
    runs: int


def summarize(times: list[float]) -> Timing:
    """Quantiles of microseconds."""
    times = sorted(times)
    return Timing(statistics.median(times), times[len(times) // 10], times[len(times) * 9 // 10], len(times))


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
    return summarize([_seconds_of(f) * 1e6 for _ in range(runs)])


def _seconds_of(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return max(time.perf_counter() - start, 1e-7)


def time_graph(launches: Sequence[Callable[[], object]], *, replays: int = REPLAYS) -> Timing:
    """Microseconds of one launch on the GPU: `launches` are captured into one CUDA graph, which is replayed after a rest of REST_S;
    each replay counts as its time by events divided by the number of launches. No host work is in it, and the gaps between launches
    are."""
    import torch

    for launch in launches[:WARM_UP_LAUNCHES]:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    torch.cuda.synchronize()
    time.sleep(REST_S)
    for _ in range(WARM_UP_REPLAYS):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(launches))
    return summarize(times)
