"""What a benchmark asks of a CUDA device: plans, our attention, GPU time, ceilings. Tests put another class in its place."""

from __future__ import annotations

import importlib.util
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from .. import _ffi, cublas, ops
from ..errors import ExecutorError, MissingDependencyError
from ..page_selection import PageSelection
from ..schedule import Plan
from .ceilings import Ceilings, measure_ceilings
from .inputs import DeviceBatch, indptr
from .planning import time_upload
from .timing import Timing, time_graph
from .workloads import Workload

_DRIVER_VERSION = pathlib.Path("/proc/driver/nvidia/version")


class CudaDevice:
    """torch's current CUDA device, measured through tvm_infer's public functions.

    Raises
    ------
    MissingDependencyError : torch is not installed, or is built without CUDA. ExecutorError : torch finds no CUDA device.
    """

    torch_device = "cuda"

    def __init__(self) -> None:
        if importlib.util.find_spec("torch") is None:
            raise MissingDependencyError(
                'argument `device` is "cuda", which needs torch for tensors, graphs and events, and torch is not installed: '
                "`pip install 'tvm_infer[torch]'`"
            )
        import torch

        if torch.version.cuda is None:
            raise MissingDependencyError(
                f'argument `device` is "cuda", but torch {torch.__version__} is built without CUDA: install a CUDA build of torch'
            )
        if not torch.cuda.is_available():
            raise ExecutorError(
                'argument `device` is "cuda", but torch finds no CUDA device here; `tvm-infer doctor` shows driver and devices. '
                "Use --device cpu to measure the CPU executor"
            )

    def describe(self) -> dict[str, Any]:
        """Name, SMs and memory of the device; versions of driver, CUDA and cuDNN."""
        import torch

        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        driver = _DRIVER_VERSION.read_text() if _DRIVER_VERSION.exists() else ""
        found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", driver)
        return {
            "device_name": properties.name,
            "num_sms": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": found.group(1) if found else None,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }

    def plan(self, workload: Workload) -> Plan:
        """The workload's plan, on the host and on the device."""
        return ops.plan(
            indptr(workload.qo_lens),
            workload.list_lens,
            num_qo_heads=workload.num_qo_heads,
            num_kv_heads=workload.num_kv_heads,
            head_dim=workload.head_dim,
            head_dim_vo=workload.head_dim_vo or None,
            dtype=workload.dtype,
            kv_dtype=workload.kv_dtype or None,
            window_left=workload.window,
            num_sink=workload.num_sink,
            chunk=workload.chunk,
            device=self.torch_device,
            levels=workload.levels,
        )

    def tile_table(self, workload: Workload) -> tuple[int, ...]:
        """What such plans are made with."""
        table = ops.cuda_tile_table if self.torch_device == "cuda" else ops.cpu_tile_table
        return table(workload.dtype, workload.head_dim, workload.kv_dtype or None, workload.head_dim_vo or None)

    def launcher(self, batch: DeviceBatch, plan: Plan, workspace: Any) -> Callable[[], object]:
        """A call of tvm_infer.attention (or ragged_attention) on the batch, everything allocated before."""
        settings: dict[str, Any] = {
            "sm_scale": batch.sm_scale,
            "out": batch.out,
            "lse": batch.lse,
            "workspace": workspace,
            "variant": batch.variant,
        }
        if batch.workload.ragged:
            k, v = batch.cache  # [2, …] or a pair
            return lambda: ops.ragged_attention(batch.q, k, v, plan, kv_indptr=batch.kv_indptr, **settings)
        settings |= batch.kv_scales
        if batch.workload.selected[0]:
            return self._selecting(batch, settings)
        settings |= batch.tables
        return lambda: ops.attention(batch.q, batch.cache, plan, kv_layout=batch.workload.kv_layout, **settings)

    def _selecting(self, batch: DeviceBatch, settings: dict[str, Any]) -> Callable[[], object]:
        """Scores, selection and attention, by a plan of the selection's own."""
        w = batch.workload
        num_pages, first, last = w.selected
        selection = PageSelection(
            num_requests=len(w.kv_lens),
            max_pages=-(-max(w.kv_lens) // w.page_size),
            num_pages=num_pages,
            num_sink_pages=first,
            num_recent_pages=last,
            page_size=w.page_size,
            num_qo_heads=w.num_qo_heads,
            num_kv_heads=w.num_kv_heads,
            head_dim=w.head_dim,
            dtype=w.dtype,
            kv_dtype=w.kv_dtype or None,
            head_dim_vo=w.head_dim_vo or None,
            device=self.torch_device,
        )
        where = {"kv_page_indptr": batch.page_indptr, "kv_page_indices": batch.page_indices, "kv_len": batch.kv_len}
        bounds = batch.page_bounds
        settings |= {"kv_layout": w.kv_layout, "workspace": selection.workspace}

        def launch() -> object:
            pages = selection.select(batch.q, bounds, **where)
            return ops.attention(batch.q, batch.cache, pages.plan, **pages.tables, **settings)

        return launch

    def time(self, launches: Sequence[Callable[[], object]]) -> Timing:
        """Microseconds of one launch, by replaying a CUDA graph of all of them."""
        return time_graph(launches)

    def time_upload(self, plan: Plan) -> Timing:
        """Host microseconds of one copy of the plan to the device."""
        return time_upload(plan.buffer, plan.device_buffer, self.synchronize)

    def ceilings(self) -> Ceilings:
        """What this device does at best."""
        return measure_ceilings(self, self.torch_device)

    def matmul_library(self) -> str:
        """What tvm_infer.matmul runs on there: name, version, path. Opens it; MissingDependencyError where there is none."""
        version = cublas.set_cublas()
        return f"cuBLASLt {version} of {_ffi.func('cublas_path')()}"

    def synchronize(self) -> None:
        """Wait for the device."""
        import torch

        torch.cuda.synchronize()

    def release(self) -> None:
        """Give memory that nothing holds any more back to the device: the next workload needs it in another shape."""
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
