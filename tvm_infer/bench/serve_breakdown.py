"""Where the time of a step goes: attention, matrix products, other kernels, host.

A kernel belongs to a part by its name. Kernels are timed on a step that is run for the purpose, after everything else was timed: once
CUPTI watches a process, its launches are slower to the end (a graph of 350 kernels by 0.3 ms). The host's part is what a plain step,
timed before that, takes beyond the kernels.

A kernel may start before the one ahead has ended and wait for it there (programmatic dependent launch), so that durations would count
the same time twice: a kernel is charged from the end of those ahead of it, if that is later than its own start.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import ExecutorError

PARTS = ("attention", "gemm", "other")
RUNS = 3  # of the step under CUPTI: others' work on the machine only adds, so the fastest count
PLAIN_RUNS = 9  # of the step alone; odd, so that the median is one of them
# Of ours, TVM's TIR cache and FlashInfer: attention with its append, rotation, plan and merge kernels as far as they are kernels apart
_ATTENTION = (
    "attention",
    "batch_decode",
    "batch_prefill",
    "batchdecode",
    "batchprefill",
    "merge_state",
    "mergestate",
    "kv_cache",
    "append",
    "rope",
)
_GEMM = ("matmul", "linear", "gemm", "gemv", "cutlass", "nvjet", "cublas", "splitk")


@dataclass(frozen=True)
class Breakdown:
    """Seconds of one step. attention, gemm, other : of kernels; host : of a plain step of that size, beyond them; method : in words."""

    attention: float
    gemm: float
    other: float
    host: float
    method: str

    @property
    def step(self) -> float:
        """All of it."""
        return self.attention + self.gemm + self.other + self.host


def part_of(kernel: str) -> str:
    """The part that a kernel belongs to, by its name."""
    name = kernel.lower()
    if any(word in name for word in _ATTENTION):
        return "attention"
    return "gemm" if any(word in name for word in _GEMM) else "other"


def sums(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Seconds by part of (kernel, seconds)."""
    found = dict.fromkeys(PARTS, 0.0)
    for name, seconds in kernels:
        found[part_of(name)] += seconds
    return found


def plain_step(step: Callable[[bool], object]) -> float:
    """Seconds of a step, the median of a few. step : called with whether it goes on (serve_loop.Backend.step)."""
    plain = []
    for number in range(PLAIN_RUNS):
        start = time.perf_counter()
        step(number + 1 < PLAIN_RUNS)
        plain.append(time.perf_counter() - start)
    return statistics.median(plain)


def of_step(
    step: Callable[[], object],
    measure: Callable[[Callable[[], object]], list[tuple[str, float]]],
    method: str,
    plain: float,
) -> Breakdown:
    """The breakdown of `step`: the kernels of the fastest of a few runs that `measure` makes; the host has what `plain` seconds have
    beyond them."""
    measured = [sums(measure(step)) for _ in range(RUNS)]
    parts = min(measured, key=lambda found: sum(found.values()))
    host = max(0.0, plain - sum(parts.values()))
    return Breakdown(parts["attention"], parts["gemm"], parts["other"], host, method)


VM_METHOD = "each call of the virtual machine timed in a step of its own; host: a plain step less these"


class VmTimer:
    """Times every call that a virtual machine makes, on the CPU, where a call returns when its work is done."""

    def __init__(self, vm: Any) -> None:
        self._vm = vm
        self._started = 0.0
        self._calls: list[tuple[str, float]] = []

    def _instrument(self, _func: Any, name: Any, before: Any, _result: Any, *_arguments: Any) -> int:
        if before:
            self._started = time.perf_counter()
        # allocations, shapes and views of the machine itself are the host's
        elif not str(name).startswith("vm.builtin.") or "attention" in str(name):
            self._calls.append((str(name), time.perf_counter() - self._started))
        return 0

    def __call__(self, step: Callable[[], object]) -> list[tuple[str, float]]:
        self._calls = []
        self._vm.set_instrument(self._instrument)
        try:
            step()
        finally:
            self._vm.set_instrument(None)
        return self._calls


def exclusive(spans: Iterable[tuple[str, float, float]]) -> list[tuple[str, float]]:
    """(kernel, time) of (kernel, start, end): of each what passes between the end of all that started before it and its own end."""
    found, done = [], -math.inf
    for name, start, end in sorted(spans, key=lambda span: span[1:]):
        found.append((name, max(0.0, end - max(start, done))))
        done = max(done, end)
    return found


CUDA_METHOD = (
    "kernels of a step by CUPTI (torch.profiler), inside graphs too, each from the end of the one ahead; host: what a plain step "
    "takes beyond these"
)


def cuda_kernels(step: Callable[[], object]) -> list[tuple[str, float]]:
    """(kernel, seconds) of everything that `step` runs on the GPU, whoever launches it, as :func:`exclusive` has them. ExecutorError
    where CUPTI reports nothing."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not events:
        raise ExecutorError("torch.profiler saw no kernels: CUPTI is not available to this process")
    return exclusive((event.name, event.time_range.start * 1e-6, event.time_range.end * 1e-6) for event in events)
