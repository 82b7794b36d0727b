"""Named ranges in NVIDIA's profilers (NVTX), off unless TVM_INFER_NVTX is 1."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from .. import env
from ..errors import MissingDependencyError

_OFF = contextlib.nullcontext()


@functools.cache
def _annotate() -> Any:
    if env.setting("TVM_INFER_NVTX").value != "1":
        return None
    try:
        import nvtx
    except ImportError as error:
        raise MissingDependencyError(
            "setting TVM_INFER_NVTX is 1, and the package nvtx, which marks ranges for profilers, is not installed: pip install nvtx, "
            "or unset it"
        ) from error
    return functools.partial(nvtx.annotate, domain="tvm_infer")


def mark(name: str, count: int | None = None) -> Any:
    """A context that profilers show as `name`, or as "name [count]". Costs 0.1 us where ranges are off."""
    annotate = _annotate()
    if annotate is None:
        return _OFF
    return annotate(name if count is None else f"{name} [{count}]")
