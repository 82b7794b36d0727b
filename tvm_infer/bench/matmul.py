"""Matrix products of a decoder on the CPU: tvm_infer.matmul beside torch and the code that TVM generates by itself.

Weights are cycled through, so that each comes from memory as in a model. Times are minima: others' work on the machine only adds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import blas, ops
from ..errors import ArgumentError

# (k, n) of SmolLM2-135M: attention's projections, the feed-forward's two, the vocabulary's
SHAPES = ((576, 576), (576, 192), (576, 1536), (1536, 576), (576, 49152))
ROWS = (1, 4, 16, 256)
_CYCLE_BYTES = 64e6  # more than the last-level caches of small machines
_MAX_LOGIT_ROWS = 16  # the product with the vocabulary is for sampled rows only


def _torch_peer(a: np.ndarray, weights: Sequence[np.ndarray]) -> Callable[[], None]:
    import torch

    torch.set_num_threads(ops.num_threads())
    rows, matrices = torch.from_numpy(a), [torch.from_numpy(w) for w in weights]

    def run() -> None:
        for matrix in matrices:
            torch.nn.functional.linear(rows, matrix)

    return run


def _tvm_peer(a: np.ndarray, weights: Sequence[np.ndarray]) -> Callable[[], None]:
    import tvm
    from tvm import relax

    from ..relax import pipeline

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(a.shape, "float32"))
    w = relax.Var("w", relax.TensorType(weights[0].shape, "float32"))
    with builder.function("main", [x, w]):
        with builder.dataflow():
            y = builder.emit_output(builder.emit(relax.op.matmul(x, builder.emit(relax.op.permute_dims(w)))))
        builder.emit_func_output(y)
    main = relax.VirtualMachine(pipeline.lower_cpu(builder.finalize(), pipeline.host_target()), tvm.cpu())["main"]
    arguments = tvm.runtime.tensor(a), tvm.runtime.tensor(weights[0])

    def run() -> None:
        for _ in weights:
            main(*arguments)

    return run


def _ours(a: np.ndarray, weights: Sequence[np.ndarray]) -> Callable[[], None]:
    out = np.empty((a.shape[0], weights[0].shape[0]), np.float32)

    def run() -> None:
        for weight in weights:
            blas.matmul(a, weight, transpose_b=True, out=out)

    return run


PEERS: dict[str, Callable[[np.ndarray, Sequence[np.ndarray]], Callable[[], None]]] = {
    "torch": _torch_peer,
    "tvm": _tvm_peer,
}


def _best_ms(run: Callable[[], None], products: int, seconds: float) -> float:
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best / products * 1e3 if best < float("inf") else float("nan")


def measure(m: int, k: int, n: int, peers: Sequence[str], seconds: float) -> dict[str, Any]:
    """Milliseconds of [m, k] x [n, k]^T, ours and the peers'."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((m, k), dtype=np.float32)
    weights = [rng.standard_normal((n, k), dtype=np.float32) for _ in range(max(1, int(_CYCLE_BYTES / (4 * k * n))))]
    row: dict[str, Any] = {"m": m, "k": k, "n": n}
    row["tvm_infer"] = _best_ms(_ours(a, weights), len(weights), seconds)
    for peer in peers:
        row[peer] = _best_ms(PEERS[peer](a, weights), len(weights), seconds)
    row["GB/s"] = 4e-6 * k * n / row["tvm_infer"]
    row["GFLOP/s"] = 2e-6 * m * k * n / row["tvm_infer"]
    return row


def run(peers: Sequence[str] = ("torch",), json_path: str | None = None, seconds: float = 0.3) -> dict[str, Any]:
    """Measure all shapes, print a table, write JSON if asked, and return the results.

    Raises
    ------
    ArgumentError : an unknown peer. MissingDependencyError : no BLAS.
    """
    from rich.console import Console
    from rich.table import Table

    unknown = [peer for peer in peers if peer not in PEERS]
    if unknown:
        raise ArgumentError(f"argument `peers` has {unknown}; known peers are {', '.join(PEERS)}")
    core = blas.set_blas()
    rows = [
        measure(m, k, n, peers, seconds) for m in ROWS for k, n in SHAPES if m <= _MAX_LOGIT_ROWS or n <= max(SHAPES[3])
    ]
    names = ["tvm_infer", *peers]
    table = Table(
        title=f"a (m x k) times b (n x k) transposed, fp32, {ops.num_threads()} threads, OpenBLAS {core}",
        title_justify="left",
    )
    for column in ("m", "k", "n", *(f"{name} ms" for name in names), "GB/s", "GFLOP/s"):
        table.add_column(column, justify="right")
    for row in rows:
        times = [f"{row[name]:.3f}" for name in names]
        table.add_row(
            str(row["m"]), str(row["k"]), str(row["n"]), *times, f"{row['GB/s']:.1f}", f"{row['GFLOP/s']:.0f}"
        )
    console = Console()
    Console(width=max(console.width, 100)).print(table)
    results = {"core": core, "num_threads": ops.num_threads(), "rows": rows}
    if json_path:
        with open(json_path, "w") as f:
            json.dump(results, f, indent=2)
    return results
