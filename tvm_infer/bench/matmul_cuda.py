"""Matrix products of a decoder on a CUDA device: tvm_infer.linear beside torch and TVM's own, by CUDA-graph replay.

Weights are cycled through, 256 MiB of them or more, so that each comes from memory as in a model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from .. import _ffi
from ..errors import ArgumentError, TvmInferError
from . import matmul_tvm
from .cuda_device import CudaDevice
from .rows import WrongResult
from .timing import REST_S

# (k, n) of Llama-3-8B: query, key and value together; attention's output; gate and up together; down; the vocabulary's
SHAPES = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 128256))
ROWS = (1, 2, 4, 8, 16, 64, 512, 2048)
MEMORY_BOUND_ROWS = 64  # up to here GB/s says how good a time is, above TFLOP/s
_ROTATE_BYTES = 256 << 20
_MIN_LAUNCHES = 8  # in a graph
_LONG_FLOPS = 4e11  # a graph's: under longer load a card lowers its clock
_CHECKED_COLUMNS = 256  # of the result, against float64
_TOLERANCE = {
    "bfloat16": 4e-3,
    "float16": 6e-4,
    "float32": 1e-5,
}  # rounding the result to the type loses 1.7e-3, 2.1e-4, 2.1e-8
METHOD = (
    "CUDA graph over launches on rotating weights (256 MiB or more together), replayed after the GPU has been idle for "
    f"{REST_S} s; us: median replay / launches. gb_per_s: bytes of a, b and out once. The first columns of each result are checked "
    "against float64 (relative error, norms)."
)


def _check(out: Any, a: Any, weight: Any) -> float:
    """Relative error of the first columns; raises WrongResult."""
    columns = slice(0, min(_CHECKED_COLUMNS, len(weight)))
    reference = a.double() @ weight[columns].double().T
    error = float((out[:, columns].double() - reference).norm() / reference.norm())
    limit = _TOLERANCE[str(out.dtype).removeprefix("torch.")]
    if not error <= limit:
        raise WrongResult(f"wrong result: relative error {error:.2e} (allowed {limit:.0e})")
    return error


def _ours(a: Any, weight: Any, out: Any) -> Callable[[], object]:
    linear = _ffi.func("linear")
    return lambda: linear(a, weight, out)


def _torch(a: Any, weight: Any, out: Any) -> Callable[[], object]:
    import torch

    transposed = weight.t()
    return lambda: torch.mm(a, transposed, out=out)


def _tvm(a: Any, weight: Any, out: Any) -> Callable[[], object]:
    (m, k), n = a.shape, len(weight)
    kernel = matmul_tvm.kernel(m, k, n, str(a.dtype).removeprefix("torch."))
    return lambda: kernel(a, weight, out)


_LAUNCHERS = {"tvm_infer": _ours, "torch": _torch, "tvm": _tvm}
PEERS = ("torch", "tvm")


def measure(device: CudaDevice, m: int, k: int, n: int, peers: Sequence[str], dtype: str) -> dict[str, Any]:
    """Microseconds of [m, k] x [n, k]^T, ours and the peers', on the same operands; what fails has an "error" instead."""
    import torch

    there: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device.torch_device}
    size = there["dtype"].itemsize
    num_weights = max(1, -(-_ROTATE_BYTES // (n * k * size)))
    generator = torch.Generator(device=device.torch_device).manual_seed(0)
    a = torch.empty((m, k), **there).normal_(generator=generator)
    weights = [torch.empty((n, k), **there).normal_(generator=generator) for _ in range(num_weights)]
    out = torch.empty((m, n), **there)
    flops = 2.0 * m * k * n
    launches = max(num_weights, min(_MIN_LAUNCHES, int(_LONG_FLOPS / flops)))
    row: dict[str, Any] = {"m": m, "k": k, "n": n}
    for name in ("tvm_infer", *peers):
        make = _LAUNCHERS[name]
        try:
            make(a, weights[0], out.fill_(float("nan")))()
            relative_error = _check(out, a, weights[0])
            timing = device.time([make(a, weights[i % num_weights], out) for i in range(launches)])
        except (WrongResult, TvmInferError, RuntimeError, ValueError) as failure:
            row[name] = {"error": f"{type(failure).__name__}: {failure}"}
            continue
        row[name] = {"us": timing.median, "p10_us": timing.p10, "p90_us": timing.p90, "relative_error": relative_error}
    us = row["tvm_infer"].get("us")
    if us:
        row["gb_per_s"] = (n * k + m * k + m * n) * size / us / 1e3
        row["tflop_per_s"] = flops / us / 1e6
    return row


def failures(results: dict[str, Any]) -> list[str]:
    """What had no figure and why, one line each."""
    return [
        f"{name}, [{row['m']}, {row['k']}] x [{row['n']}, {row['k']}]^T: {row[name]['error']}"
        for row in results["rows"]
        for name in _LAUNCHERS
        if "error" in row.get(name, {})
    ]


def _table(results: dict[str, Any], names: Sequence[str]) -> Any:
    from rich.table import Table

    title = f"a (m x k) times b (n x k) transposed, {results['dtype']}, {results['device_name']}, {results['library']}"
    table = Table(title=title, title_justify="left")
    for column in (
        "m",
        "k",
        "n",
        *(f"{name} us" for name in names),
        "GB/s",
        "TFLOP/s",
        *(f"{n} takes" for n in names[1:]),
    ):
        table.add_column(column, justify="right")
    for row in results["rows"]:
        times = [row[name].get("us") for name in names]
        is_bound_by_memory = row["m"] <= MEMORY_BOUND_ROWS
        table.add_row(
            *(str(row[key]) for key in "mkn"),
            *(f"{us:.1f}" if us else "–" for us in times),
            f"{row['gb_per_s']:,.0f}" if times[0] and is_bound_by_memory else "",
            f"{row['tflop_per_s']:.0f}" if times[0] and not is_bound_by_memory else "",
            *(f"{us / times[0]:.2f} x" if us and times[0] else "–" for us in times[1:]),
        )
    return table


def run(
    peers: Sequence[str] = PEERS,
    json_path: str | None = None,
    *,
    dtype: str = "bfloat16",
    device: CudaDevice | None = None,
) -> dict[str, Any]:
    """Measure all shapes, print a table and what had no figure (a wrong result, a peer that does not compile), write JSON if asked, and
    return the results.

    Raises
    ------
    ArgumentError : an unknown peer. MissingDependencyError : no torch with CUDA, no cuBLASLt. ExecutorError : no CUDA device.
    """
    from rich.console import Console

    unknown = [peer for peer in peers if peer not in PEERS]
    if unknown:
        raise ArgumentError(f"argument `peers` has {unknown}; on cuda known peers are {', '.join(PEERS)}")
    device = device or CudaDevice()
    results: dict[str, Any] = {**device.describe(), "library": device.matmul_library(), "dtype": dtype}
    results |= {"method": METHOD, "rows": []}
    for k, n in SHAPES:
        for m in ROWS:
            results["rows"].append(measure(device, m, k, n, peers, dtype))
            device.release()
    console = Console()
    Console(width=max(console.width, 120)).print(_table(results, ["tvm_infer", *peers]))
    for line in failures(results):
        console.print(line, markup=False, highlight=False)
    if json_path:
        with open(json_path, "w") as f:
            json.dump(results, f, indent=2)
    return results
