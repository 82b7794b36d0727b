"""Where the time of a step goes: attention, matrix products, other kernels, host.

A kernel belongs to a part by its name. Kernels are timed on a step that is run for the purpose, after everything else was timed: once
CUPTI watches a process, its launches are slower to the end (a graph of 350 kernels by 0.3 ms). The host's part is what a plain step,
timed before that, takes beyond the kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import ExecutorError

PARTS = ("attention", "gemm", "other")
RUNS = 3  # of the step: others' work on the machine only adds, so the fastest count
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
_GEMM = ("matmul", "gemm", "gemv", "cutlass", "nvjet", "cublas", "splitk")


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


def plain_step(step: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs of `step`."""
    plain = []
    for _ in range(RUNS):
        start = time.perf_counter()
        step()
        plain.append(time.perf_counter() - start)
    return min(plain)


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


CUDA_METHOD = "kernels of a step by CUPTI (torch.profiler), inside graphs too; host: a plain step less these"


def cuda_kernels(step: Callable[[], object]) -> list[tuple[str, float]]:
    """(kernel, seconds) of everything that `step` runs on the GPU, whoever launches it. ExecutorError where CUPTI reports nothing."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not events:
        raise ExecutorError("torch.profiler saw no kernels: CUPTI is not available to this process")
    return [(event.name, event.device_time_total * 1e-6) for event in events]
