"""CUDA kernels: a name becomes a few lines of source, nvcc makes a cubin of them, and the cache keeps it (docs/jit.md).

Nothing here needs a GPU, TVM or torch.
"""

from __future__ import annotations

from .cubins import Built, Resources, build, cubin, load
from .names import KernelSpec, all_names, parse
from .variants import check_kernel as check_variant
from .variants import register as register_variant

__all__ = [
    "Built",
    "KernelSpec",
    "Resources",
    "all_names",
    "build",
    "check_variant",
    "cubin",
    "load",
    "parse",
    "register_variant",
]
