"""The matrix product that TVM generates for a CUDA device by itself, where DispatchMatmul leaves one to it."""

from __future__ import annotations

import functools
from typing import Any

GEMV_ROWS = 8  # up to here TVM has schedules that read the weight once for all rows
ARCH = "sm_90"  # not sm_90a, of which TVM's schedules know nothing


def scheduled(m: int, k: int, n: int, dtype: str) -> tuple[Any, Any]:
    """(module whose "main" is out [m, n] = a [m, k] @ w [n, k]^T with float32 sums, target), by dlight: GEMV for one row, LowBatchGEMV
    for up to GEMV_ROWS (it wants a symbolic number of rows), above that Matmul."""
    import tvm
    from tvm import te
    from tvm.s_tir import dlight

    rows: Any = te.var("m", "int64") if 1 < m <= GEMV_ROWS else m
    a, w = te.placeholder((rows, k), dtype, name="a"), te.placeholder((n, k), dtype, name="w")
    r = te.reduce_axis((0, k), name="r")
    total = te.compute(
        (rows, n), lambda i, j: te.sum(a[i, r].astype("float32") * w[j, r].astype("float32"), axis=r), name="total"
    )
    out = te.compute((rows, n), lambda i, j: total[i, j].astype(dtype), name="out")
    function = te.create_prim_func([a, w, out]).with_attr("global_symbol", "main")
    target = tvm.target.Target({"kind": "cuda", "arch": ARCH})
    gemv = dlight.gpu.GEMV() if m == 1 else dlight.gpu.LowBatchGEMV(m)
    rules = [gemv] if m <= GEMV_ROWS else [dlight.gpu.Matmul()]
    with target:
        mod = dlight.ApplyDefaultSchedule(*rules, dlight.gpu.Fallback())(tvm.IRModule({"main": function}))
    return mod, target


@functools.cache
def kernel(m: int, k: int, n: int, dtype: str) -> Any:
    """`scheduled`, compiled: a function of (a, w, out) that runs on the current stream."""
    import tvm

    mod, target = scheduled(m, k, n, dtype)
    with target:
        return tvm.compile(mod, target=target)["main"]
