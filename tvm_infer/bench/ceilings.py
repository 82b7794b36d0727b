"""What the machine can do at best, measured in the same run: figures of kernels are quoted as shares of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .. import _ffi
from .timing import Timing, measure
from .workloads import Workload

_READ_BYTES = 4 << 30  # of the GPU; 70 times its L2
_COPY_BYTES = 1 << 30  # in each direction; torch splits what is larger into several launches
_MATMUL_SIZE = 8192


def read_bandwidth(num_threads: int, gib: float = 0.5) -> float:
    """GB/s at which `num_threads` threads read host memory that no cache holds."""
    data = np.ones(int(gib * 2**24) * 16, np.float32)
    f = _ffi.func("cpu_stream_read")
    timing = measure(lambda: f(data, num_threads), seconds=0.5, min_runs=10)
    return data.nbytes / timing.median / 1e3


@dataclass(frozen=True)
class Ceilings:
    """Of one GPU. read_gb_per_s : our own kernel of plain loads (kernels/read_ceiling.cuh) over 4 GiB. copy_gb_per_s : a kernel of
    torch's that writes as much as it reads, both counted. matmul_tflop_per_s : torch's bfloat16 product of 8192 x 8192 matrices.
    """

    read_gb_per_s: float
    copy_gb_per_s: float
    matmul_tflop_per_s: float

    def fastest_us(self, workload: Workload) -> tuple[float, str]:
        """(µs, "read" or "matmul"): what the workload's bytes or its arithmetic would take at the ceiling, whichever is longer."""
        read = workload.bytes_moved / self.read_gb_per_s / 1e3
        matmul = workload.flops / self.matmul_tflop_per_s / 1e6
        return (read, "read") if read >= matmul else (matmul, "matmul")


class Timer(Protocol):
    """Times launches back to back, as attention is timed."""

    def time(self, launches: Sequence[Callable[[], object]]) -> Timing: ...


def check_read(x: Any, total: Any) -> None:
    """Raise where the read ceiling's kernel did not read all of `x`: its sum must be x's, modulo 2^32."""
    import torch

    words = x.view(torch.int32)
    expected = sum(int(part.sum(dtype=torch.int64)) for part in words.split(1 << 28))
    got = int(total.item())
    if (got - expected) % 2**32:
        raise RuntimeError(
            f"tvm_infer.read_ceiling summed to {got % 2**32}, not {expected % 2**32}: it did not read everything once"
        )


def _read_us(timer: Timer, device: Any) -> float:
    import torch

    read = _ffi.func("read_ceiling")
    x = torch.empty(_READ_BYTES // 2, device=device, dtype=torch.bfloat16).normal_()
    total = torch.zeros(1, device=device, dtype=torch.int32)
    read(x, total)
    check_read(x, total)
    return timer.time([lambda: read(x, total)] * 2).median


def _copy_us(timer: Timer, device: Any) -> float:
    import torch

    source = torch.randint(1 << 30, (_COPY_BYTES // 4,), device=device, dtype=torch.int32)
    target = torch.empty_like(source)
    # NOTE: not copy_, which a CUDA graph turns into a node for the copy engine: 2,775 GB/s on an H200, where its SMs copy at 4,265.
    return timer.time([lambda: torch.neg(source, out=target)] * 2).median


def _matmul_us(timer: Timer, device: Any) -> float:
    import torch

    shape = (_MATMUL_SIZE, _MATMUL_SIZE)
    a, b = (torch.empty(shape, device=device, dtype=torch.bfloat16).normal_() for _ in range(2))
    c = torch.empty_like(a)
    return timer.time([lambda: torch.mm(a, b, out=c)] * 2).median


def measure_ceilings(timer: Timer, device: Any = "cuda") -> Ceilings:
    """Measure all three, in the way the attention is measured."""
    return Ceilings(
        read_gb_per_s=_READ_BYTES / _read_us(timer, device) / 1e3,
        copy_gb_per_s=2 * _COPY_BYTES / _copy_us(timer, device) / 1e3,
        matmul_tflop_per_s=2 * _MATMUL_SIZE**3 / _matmul_us(timer, device) / 1e6,
    )
