"""Operators with a value: what one element of their result is, as a scalar expression of elements of their operands.

A rule takes (evaluator, call, index of the result) and gives the expression, None where it has no closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax, tirx

from .movement import broadcast_index
from .nodes import Index, dtype_class, dtype_of, int_imm, known_shape
from .scalars import as_expr, constant_value, literal

if TYPE_CHECKING:
    from .symbolic import Evaluator


def closed_form(data: np.ndarray, dtype: str, index: Index) -> Any | None:
    """An element of a constant that is a causal mask (one value on and below the diagonal, one above) or a run of positions."""
    rows: Any = data.reshape(data.shape[-2:]) if data.ndim >= 2 and data.size == math.prod(data.shape[-2:]) else None
    if rows is not None and min(rows.shape) > 1:
        kept, masked = rows[0, 0], rows[0, -1]
        if (rows == np.where(np.tri(rows.shape[0], rows.shape[1]) > 0, kept, masked)).all():
            return tirx.Select(index[-1] <= index[-2], literal(kept.item(), dtype), literal(masked.item(), dtype))
    if data.ndim == 1 and data.size > 1 and dtype_class(dtype) == "int":
        step = data[1] - data[0]
        if (np.diff(data) == step).all():
            value = int_imm(int(data[0])) + index[0] * int_imm(int(step))
            return value if dtype == "int64" else tirx.Cast(dtype, value)
    return None


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[Evaluator, Any, Index], Any]:
    def rule(ev: Evaluator, call: Any, index: Index) -> Any:
        a = ev._element(call.args[0], broadcast_index(call.args[0], index))
        b = ev._element(call.args[1], broadcast_index(call.args[1], index))
        return function(a, b)

    return rule


def _unary(function: Callable[[Any], Any]) -> Callable[[Evaluator, Any, Index], Any]:
    return lambda ev, call, index: function(ev._element(call.args[0], index))


def _logical(for_bool: Callable[..., Any]) -> Callable[..., Any]:
    """Bitwise operators on booleans are the logical ones; on integers they have no use here."""

    def apply(*operands: Any) -> Any:
        return for_bool(*operands) if all(str(x.ty) == "bool" for x in operands) else None

    return apply


def _divide(a: Any, b: Any) -> Any:
    return tirx.Div(a, b) if dtype_class(str(a.ty)) == "float" else None


def _where(ev: Evaluator, call: Any, index: Index) -> Any:
    parts = [ev._element(argument, broadcast_index(argument, index)) for argument in call.args]
    return tirx.Select(*parts)


def _astype(ev: Evaluator, call: Any, index: Index) -> Any:
    value = ev._element(call.args[0], index)
    dtype = dtype_of(call)
    if str(value.ty) == dtype:
        return value
    if dtype == "bool":
        return tirx.NE(value, literal(0, str(value.ty)))
    return tirx.Cast(dtype, value)


def _full(ev: Evaluator, call: Any, index: Index) -> Any:
    fill = call.args[1]
    value = ev._element(fill, tuple(int_imm(0) for _ in known_shape(fill) or ()))
    dtype = dtype_of(call)
    return value if str(value.ty) == dtype else tirx.Cast(dtype, value)


def _filled(number: int) -> Callable[[Evaluator, Any, Index], Any]:
    return lambda ev, call, index: literal(number, dtype_of(call))


def _arange(ev: Evaluator, call: Any, index: Index) -> Any:
    if len(call.args) < 3:
        return None
    start, step = (_whole(argument) for argument in (call.args[0], call.args[2]))
    if start is None or step is None:
        return None
    value = ev.simplify(start + index[0] * step)
    dtype = dtype_of(call)
    return value if dtype == "int64" else tirx.Cast(dtype, value)


def _whole(number: Any) -> Any | None:
    """An integer, or a literal that is one, as int64; None for others."""
    if dtype_class(str(number.ty)) == "int":
        return number if str(number.ty) == "int64" else tirx.Cast("int64", number)
    value = constant_value(number)
    return int_imm(int(value)) if value is not None and value % 1 == 0.0 else None


def _of_integers(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: function(a, b) if all(dtype_class(str(x.ty)) == "int" for x in (a, b)) else None


def _triangle(keep_upper: bool) -> Callable[[Evaluator, Any, Index], Any]:
    def rule(ev: Evaluator, call: Any, index: Index) -> Any:
        row, column = index[-2], index[-1]
        diagonal = as_expr(call.args[1])
        if str(diagonal.ty) != "int64":
            diagonal = tirx.Cast("int64", diagonal)
        keep = tirx.GE(column - row, diagonal) if keep_upper else tirx.LE(column - row, diagonal)
        value = ev._element(call.args[0], index)
        return tirx.Select(ev.simplify(keep), value, literal(0, str(value.ty)))

    return rule


def _concat(ev: Evaluator, call: Any, index: Index) -> Any:
    parts = ev.definition(call.args[0])
    if not isinstance(parts, relax.Tuple):
        return None
    axis = int(call.attrs.axis) % len(index)
    offset: Any = int_imm(0)
    pieces: list[tuple[Any, Any]] = []  # (end of the piece along the axis, its element)
    for part in parts.fields:
        shape = known_shape(part)
        if shape is None:
            return None
        source = list(index)
        source[axis] = ev.simplify(index[axis] - offset)
        offset = ev.simplify(offset + shape[axis])
        pieces.append((offset, ev._element(part, tuple(source))))
    result = pieces[-1][1]
    for end, value in reversed(pieces[:-1]):
        result = tirx.Select(tirx.LT(index[axis], end), value, result)
    return result


def _clip(ev: Evaluator, call: Any, index: Index) -> Any:
    value = ev._element(call.args[0], index)
    low, high = (constant_value(argument) for argument in call.args[1:3])
    if low is None or high is None:
        return None
    dtype = str(value.ty)
    return tirx.Min(tirx.Max(value, literal(low, dtype)), literal(high, dtype))


ELEMENT_RULES: dict[str, Callable[[Evaluator, Any, Index], Any]] = {
    "relax.add": _binary(tirx.Add),
    "relax.subtract": _binary(tirx.Sub),
    "relax.multiply": _binary(tirx.Mul),
    "relax.divide": _binary(_divide),
    "relax.maximum": _binary(tirx.Max),
    "relax.minimum": _binary(tirx.Min),
    "relax.floor_divide": _binary(_of_integers(tirx.floordiv)),
    "relax.floor_mod": _binary(_of_integers(tirx.floormod)),
    "relax.power": _binary(lambda a, b: tirx.power(a, b) if dtype_class(str(a.ty)) == "float" else None),
    "relax.less": _binary(tirx.LT),
    "relax.less_equal": _binary(tirx.LE),
    "relax.greater": _binary(tirx.GT),
    "relax.greater_equal": _binary(tirx.GE),
    "relax.equal": _binary(tirx.EQ),
    "relax.not_equal": _binary(tirx.NE),
    "relax.logical_and": _binary(_logical(tirx.And)),
    "relax.logical_or": _binary(_logical(tirx.Or)),
    "relax.bitwise_and": _binary(_logical(tirx.And)),
    "relax.bitwise_or": _binary(_logical(tirx.Or)),
    "relax.logical_not": _unary(_logical(tirx.Not)),
    "relax.bitwise_not": _unary(_logical(tirx.Not)),
    "relax.negative": _unary(lambda a: tirx.Mul(a, literal(-1, str(a.ty)))),
    "relax.abs": _unary(tirx.abs),
    "relax.cos": _unary(tirx.cos),
    "relax.sin": _unary(tirx.sin),
    "relax.exp": _unary(tirx.exp),
    "relax.log": _unary(tirx.log),
    "relax.sqrt": _unary(tirx.sqrt),
    "relax.rsqrt": _unary(tirx.rsqrt),
    "relax.tanh": _unary(tirx.tanh),
    "relax.sigmoid": _unary(tirx.sigmoid),
    "relax.floor": _unary(tirx.floor),
    "relax.where": _where,
    "relax.astype": _astype,
    "relax.full": _full,
    "relax.full_like": _full,
    "relax.zeros": _filled(0),
    "relax.zeros_like": _filled(0),
    "relax.ones": _filled(1),
    "relax.ones_like": _filled(1),
    "relax.arange": _arange,
    "relax.triu": _triangle(keep_upper=True),
    "relax.tril": _triangle(keep_upper=False),
    "relax.concat": _concat,
    "relax.clip": _clip,
}
