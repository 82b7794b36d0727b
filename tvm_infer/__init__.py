"""tvm_infer: paged-KV attention for models compiled with Apache TVM.

The planner turns lengths into a :class:`Plan`; executors walk it; a Relax pass makes compiled models call them. See README.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import errors
from .spec import AttentionSpec

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import jit as jit
    from . import variant as variant
    from .blas import linear, matmul, matmul_add, set_blas
    from .block_sparse import BlockSparsePlan, block_sparse_attention, plan_block_sparse
    from .compiler import compile as compile
    from .contiguous import contiguous_attention, contiguous_start
    from .cublas import set_cublas
    from .ops import append, append_attention, attention, merge, ragged_attention, rope_append, update_page_bounds
    from .page_selection import PageSelection, SelectedPages, empty_page_bounds, page_scores
    from .planning import cpu_tile_table, cuda_tile_table, plan, plan_status, workspace_size
    from .rope import RopeConfig
    from .runtime import PageBudget, PagedKVCache
    from .runtime.loading import load as load
    from .schedule import Plan

__all__ = [
    "AttentionSpec",
    "BlockSparsePlan",
    "PageBudget",
    "PageSelection",
    "PagedKVCache",
    "Plan",
    "RopeConfig",
    "SelectedPages",
    "append",
    "append_attention",
    "attention",
    "block_sparse_attention",
    "compile",
    "contiguous_attention",
    "contiguous_start",
    "cpu_tile_table",
    "cuda_tile_table",
    "empty_page_bounds",
    "errors",
    "jit",
    "linear",
    "load",
    "matmul",
    "matmul_add",
    "merge",
    "page_scores",
    "plan",
    "plan_block_sparse",
    "plan_status",
    "ragged_attention",
    "rope_append",
    "set_blas",
    "set_cublas",
    "update_page_bounds",
    "variant",
    "workspace_size",
]

# Loaded at first use, so that `import tvm_infer` costs neither TVM nor a C++ library.
_LAZY = {
    "BlockSparsePlan": "block_sparse",
    "PageBudget": "runtime",
    "PageSelection": "page_selection",
    "PagedKVCache": "runtime",
    "Plan": "schedule",
    "RopeConfig": "rope",
    "SelectedPages": "page_selection",
    "append": "ops",
    "append_attention": "ops",
    "attention": "ops",
    "block_sparse_attention": "block_sparse",
    "compile": "compiler",
    "contiguous_attention": "contiguous",
    "contiguous_start": "contiguous",
    "cpu_tile_table": "planning",
    "cuda_tile_table": "planning",
    "empty_page_bounds": "page_selection",
    "linear": "blas",
    "load": "runtime",
    "matmul": "blas",
    "matmul_add": "blas",
    "merge": "ops",
    "page_scores": "page_selection",
    "plan": "planning",
    "plan_block_sparse": "block_sparse",
    "plan_status": "planning",
    "ragged_attention": "ops",
    "rope_append": "ops",
    "set_blas": "blas",
    "set_cublas": "cublas",
    "update_page_bounds": "ops",
    "workspace_size": "planning",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name in ("jit", "variant"):
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'tvm_infer' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
