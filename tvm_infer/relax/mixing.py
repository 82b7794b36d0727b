"""What else, besides attention, looks across the packed tokens.

After the rewrite the rows of a step belong to several sequences. An operator that reads several rows at once (a mean over the tokens, a
scan, a convolution) would mix sequences, and one that numbers or picks rows (arange, hidden[:, -1]) means the row of tokens, not a
sequence. The first are refused, the second are shown in the report.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

from tvm import ir, relax

from .nodes import bindings_of, known_shape, op_name, same, static_int
from .report import Location, Reason
from .scalars import free_vars

_REDUCTIONS = {f"relax.{name}" for name in "sum mean max min prod std variance median argmax argmin".split()}
_NORMALIZATIONS = {"relax.nn.softmax", "relax.nn.log_softmax", "relax.nn.layer_norm", "relax.nn.rms_norm"}
_SCANS = {"relax.cumsum", "relax.cumprod", "relax.sort", "relax.argsort", "relax.topk", "relax.flip", "relax.roll"}
_CONVOLUTIONS = {"relax.nn.conv1d", "relax.nn.avg_pool1d", "relax.nn.max_pool1d"}


def mixing_operators(name: str, func: Any, num_tokens: Any) -> tuple[list[Reason], list[str]]:
    """(operators that compute across tokens, notes on operators that number or pick rows) of a rewritten function."""
    reasons: list[Reason] = []
    notes: list[str] = []
    for binding in bindings_of(func):
        operator = op_name(binding.value)
        location = Location(name, str(binding.var.name), operator.removeprefix("relax."))
        if any(_is_tokens(dim, num_tokens) for dim in _mixed_dims(operator, binding.value)):
            reasons.append(
                Reason(
                    location,
                    f"{operator.removeprefix('relax.')} across the {num_tokens} packed tokens",
                    "it mixes the tokens of all sequences of a step, which are packed in one row",
                    "compute it per token, or outside this function",
                )
            )
        elif operator == "relax.arange" and num_tokens in _vars_of(binding.value):
            notes.append(f"{location} numbers the packed row, not positions in a sequence (those are position_ids)")
        elif operator in ("relax.strided_slice", "relax.take") and _picks_rows(operator, binding.value, num_tokens):
            notes.append(f"{location} picks fixed rows of the packed row, not of each sequence")
    return reasons, notes


def _is_tokens(dim: Any, num_tokens: Any) -> bool:
    return any(same(var, num_tokens) for var in free_vars(dim))


def _vars_of(call: Any) -> Set[Any]:
    return {var for argument in call.args if not isinstance(argument, relax.ShapeExpr) for var in free_vars(argument)}


def _mixed_dims(operator: str, call: Any) -> Iterator[Any]:
    """Lengths of the axes along which an operator combines elements."""
    shape = known_shape(call.args[0]) if operator and call.args and hasattr(call.args[0], "ty") else None
    if shape is None:
        return
    if operator in _REDUCTIONS:
        axes = _axes(call.attrs.axis, len(shape))
    elif operator in _NORMALIZATIONS:
        axes = _axes(getattr(call.attrs, "axes", None) or getattr(call.attrs, "axis", -1), len(shape))
    elif operator in _SCANS:
        axes = _axes(getattr(call.attrs, "axis", None), len(shape))
    elif operator == "relax.matmul":
        axes = [len(shape) - 1]
    elif operator in _CONVOLUTIONS:
        axes = list(range(2, len(shape)))
    else:
        return
    yield from (shape[axis] for axis in axes)


def _axes(axis: Any, rank: int) -> list[int]:
    """An axis attribute as a list; None means all axes."""
    if axis is None:
        return list(range(rank))
    axes = axis if hasattr(axis, "__iter__") else [axis]
    return [int(a) % rank for a in axes]


def _picks_rows(operator: str, call: Any, num_tokens: Any) -> bool:
    shape = known_shape(call.args[0])
    if shape is None:
        return False
    if operator == "relax.take":
        if call.attrs.axis is None or not isinstance(call.args[1], ir.GenericConst):
            return False
        return _is_tokens(shape[int(call.attrs.axis) % len(shape)], num_tokens)
    fields = getattr(call.args[1], "fields", ())
    return any(_is_tokens(shape[(static_int(axis) or 0) % len(shape)], num_tokens) for axis in fields)
