"""FlashInfer on CUDA, through its batch wrappers on the same pages as ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .inputs import DeviceBatch, indptr
from .peers import Prepared, Skipped, require
from .workloads import Workload

_WORKSPACE_BYTES = 256 << 20


class FlashInfer:
    """Its backends that take the workload. `plan` is quoted apart, as ours is; index tables are on the host for it."""

    takes_float8 = True

    def variants(self, workload: Workload) -> Sequence[str]:
        require("flashinfer")
        if workload.ragged:
            return ("ragged fa2", "ragged fa3")
        decode = ("decode", "decode tensor cores") if max(workload.qo_lens) == 1 else ()
        return (*decode, "fa2", "fa3", "batch attention")

    def prepare(self, variant: str, workload: Workload, batches: Sequence[DeviceBatch]) -> Prepared:
        import torch

        w, dtype = workload, getattr(torch, workload.dtype)
        kv_dtype = getattr(torch, w.kv_dtype) if w.kv_dtype else dtype
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=batches[0].q.device)

        def host(values: Any) -> Any:
            return torch.from_numpy(np.ascontiguousarray(values, np.int32))

        pages = host(batches[0].host_page_indptr)
        tables = {
            "qo_indptr": host(indptr(w.qo_lens)),
            "kv_indptr": host(indptr(w.kv_lens)),
            "page_indptr": pages,
            "page_indices": batches[0].page_indices,
            "last_page_len": host([(n - 1) % w.page_size + 1 for n in w.kv_lens]),
            "kv_len": host(w.kv_lens),
        }
        wrapper, plan = _plan(variant, w, tables, workspace, (dtype, kv_dtype))
        plan()

        def runner(b: DeviceBatch) -> Callable[[], object]:
            keys = (b.kv[0], b.kv[1]) if w.ragged else (b.kv,)
            return lambda: wrapper.run(b.q, *keys, out=b.out, **b.kv_scales)

        runs = [runner(b) for b in batches]

        def output() -> Any:
            batches[0].poison_outputs()
            runs[0]()
            return batches[0].out

        return Prepared(runs, output, plan)


def _plan(
    variant: str, w: Workload, t: dict[str, Any], workspace: Any, dtypes: Any
) -> tuple[Any, Callable[[], object]]:
    """(wrapper, a call that plans the batch) of a backend."""
    import flashinfer

    heads, (dtype, kv_dtype) = (w.num_qo_heads, w.num_kv_heads, w.head_dim), dtypes
    scale = w.head_dim**-0.5
    if variant.startswith("decode"):
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, w.kv_layout, use_tensor_cores=variant == "decode tensor cores"
        )
        return wrapper, lambda: wrapper.plan(
            t["page_indptr"],
            t["page_indices"],
            t["last_page_len"],
            *heads,
            w.page_size,
            q_data_type=dtype,
            kv_data_type=kv_dtype,
            sm_scale=scale,
        )
    if variant in ("fa2", "fa3"):
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, w.kv_layout, backend=variant)
        return wrapper, lambda: wrapper.plan(
            t["qo_indptr"],
            t["page_indptr"],
            t["page_indices"],
            t["last_page_len"],
            *heads,
            w.page_size,
            causal=True,
            q_data_type=dtype,
            kv_data_type=kv_dtype,
            sm_scale=scale,
        )
    if variant.startswith("ragged "):
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
            workspace, "NHD", backend=variant.removeprefix("ragged ")
        )
        return wrapper, lambda: wrapper.plan(
            t["qo_indptr"],
            t["kv_indptr"],
            *heads,
            causal=True,
            q_data_type=dtype,
            kv_data_type=kv_dtype,
            sm_scale=scale,
        )
    if variant != "batch attention":
        raise Skipped(f"no such backend: {variant}")
    wrapper = flashinfer.BatchAttention(w.kv_layout)
    return wrapper, lambda: wrapper.plan(
        t["qo_indptr"],
        t["page_indptr"],
        t["page_indices"],
        t["kv_len"],
        *heads,
        w.head_dim,
        w.page_size,
        causal=True,
        sm_scale=scale,
        q_data_type=dtype,
        kv_data_type=kv_dtype,
    )
