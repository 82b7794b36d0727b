"""Attention variants: Python functions traced to TIR expressions, which are compiled into the attention kernels (docs of Variant)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .band import Band
from .bind import BoundVariant, as_bound
from .code import Code
from .expression import Expr, to_float, to_int
from .functions import absolute as abs
from .functions import cast, cos, exp, exp2, log, log2, maximum, minimum, sigmoid, sin, sqrt, tanh, where
from .numpy_eval import evaluate
from .parameters import Parameter, per_channel, per_head, per_pair, per_request, scalar, tensor
from .variant import Variant, combine

if TYPE_CHECKING:
    from .cpu import cpu_functions
    from .standard import (
        STANDARD,
        alibi,
        attention_sink,
        causal,
        chunked_local,
        custom_mask,
        full,
        logit_bias,
        qk_norm,
        rope,
        rope_by_length,
        rope_interleaved,
        rotary,
        sigmoid_attention,
        sink_window,
        sliding_window,
        soft_cap,
        streaming,
        tree_mask,
        two_sided_window,
    )

__all__ = [
    "STANDARD",
    "Band",
    "BoundVariant",
    "Code",
    "Expr",
    "Parameter",
    "Variant",
    "abs",
    "alibi",
    "as_bound",
    "attention_sink",
    "cast",
    "causal",
    "chunked_local",
    "combine",
    "cos",
    "cpu_functions",
    "custom_mask",
    "evaluate",
    "exp",
    "exp2",
    "full",
    "log",
    "log2",
    "logit_bias",
    "maximum",
    "minimum",
    "per_channel",
    "per_head",
    "per_pair",
    "per_request",
    "qk_norm",
    "rope",
    "rope_by_length",
    "rope_interleaved",
    "rotary",
    "scalar",
    "sigmoid",
    "sigmoid_attention",
    "sin",
    "sink_window",
    "sliding_window",
    "soft_cap",
    "sqrt",
    "streaming",
    "tanh",
    "tensor",
    "to_float",
    "to_int",
    "tree_mask",
    "two_sided_window",
    "where",
]


def __getattr__(name: str) -> Any:
    """The standard variants are traced at first use, which is when TVM is loaded."""
    import importlib

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "cpu" if name == "cpu_functions" else "standard"
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value
