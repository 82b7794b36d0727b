"""Integer divisions of PyTorch programs.

TVM's importer gives the divisor of `x // 7` the type int32, and then refuses it beside an int64 x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tvm import relax


def _div_mode(node: Any, importer: Any) -> Any:
    """torch.div(x, y, rounding_mode=…)."""
    x, y = (importer.env.get(arg, arg) if hasattr(arg, "op") else arg for arg in node.args[:2])
    if not isinstance(y, int) or isinstance(y, bool) or node.kwargs.get("rounding_mode") != "floor":
        return importer._div(node)
    return importer.block_builder.emit(relax.op.floor_divide(x, relax.const(y, str(x.ty.dtype))))


# aten operator -> converter (node, importer) -> relax.Var, for from_exported_program's custom_convert_map
CONVERTERS: Mapping[str, Callable[[Any, Any], Any]] = {"div.Tensor_mode": _div_mode}
