"""The attention kernels that TVM compiles for its own paged KV cache, on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .inputs import DeviceBatch
from .peers import Prepared, Skipped, require
from .workloads import Workload

# "sm_90", not "sm_90a": TVM's schedules take "90a" for no architecture at all
_TARGET = {"kind": "cuda", "arch": "sm_90"}


def compile_kernel(workload: Workload) -> Any:
    """The PrimFunc of TVM's KV cache for the workload, compiled: decode where every request has one token, prefill elsewhere."""
    import tvm
    from tvm.relax.frontend.nn.llm import _decode_kernels, _prefill_kernels

    w, target = workload, tvm.target.Target(_TARGET, host={"kind": "llvm"})
    make = _decode_kernels._attention_decode if max(w.qo_lens) == 1 else _prefill_kernels._attention_prefill
    function = make(w.num_kv_heads, w.num_qo_heads, w.head_dim, w.dtype, False, {}, target, w.page_size)
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    with target:
        return tvm.compile(module, target)


class TvmTir:
    """TVM's kernels on the same pages; they launch on torch's current stream, so that they are captured like the others."""

    def variants(self, workload: Workload) -> Sequence[str]:
        require("tvm")
        if workload.ragged or workload.kv_layout != "HND":
            raise Skipped('TVM\'s cache has pages in layout "HND" only')
        import tvm

        if not tvm.runtime.enabled("cuda"):
            raise Skipped("TVM's CUDA runtime is not loaded")
        return ("",)

    def prepare(self, variant: str, workload: Workload, batches: Sequence[DeviceBatch]) -> Prepared:
        import torch
        import tvm
        import tvm_ffi

        w = workload
        kernel = compile_kernel(w)["main"]
        decode, device = max(w.qo_lens) == 1, batches[0].q.device
        positions = np.concatenate([np.arange(m - n, m) for n, m in zip(w.qo_lens, w.kv_lens, strict=True)])

        def index(values: Any) -> Any:
            return torch.from_numpy(np.ascontiguousarray(values, np.int32)).to(device)

        def tensor(x: Any) -> Any:
            return tvm.runtime.from_dlpack(x)

        last_page_len = tensor(index([(n - 1) % w.page_size + 1 for n in w.kv_lens]))
        rope_offset, position = tensor(index(np.zeros(len(w.kv_lens)))), tensor(index(positions))

        def runner(b: DeviceBatch) -> Callable[[], None]:
            first = (tensor(b.q),) if decode else (tensor(b.q), tensor(b.qo_indptr))
            tables = (tensor(b.kv), tensor(b.page_indptr), tensor(b.page_indices), last_page_len, rope_offset, position)
            causal = () if decode else (1,)
            arguments = (*first, *tables, tensor(b.out), tensor(b.lse), *causal, 0, 1.0, 1e4, b.sm_scale)

            def run() -> None:
                with tvm_ffi.use_torch_stream():
                    kernel(*arguments)

            return run

        runs = [runner(b) for b in batches]

        def output() -> Any:
            batches[0].poison_outputs()
            runs[0]()
            return batches[0].out

        return Prepared(runs, output)
