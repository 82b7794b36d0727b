"""Scalar expressions: literals, constants, variables, substitution."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import tvm_ffi
from tvm import ir, relax, tirx

from .nodes import int_imm, same


def as_expr(value: Any) -> Any:
    """An index as a TVM expression."""
    return int_imm(value) if isinstance(value, int) else value


def literal(value: Any, dtype: str) -> Any:
    """A scalar literal of the given type."""
    if dtype == "bool":
        return tirx.IntImm("bool", int(value))
    if dtype.startswith(("int", "uint")):
        return tirx.IntImm(dtype, int(value))
    return tirx.FloatImm(dtype, float(value))


def constant_value(expr: Any) -> float | None:
    """The value of an expression of literals, None where a variable is left."""
    if isinstance(expr, tirx.IntImm | tirx.FloatImm):
        return float(expr.value)
    if isinstance(expr, tirx.Cast):
        return constant_value(expr.value)
    if isinstance(expr, tirx.Add | tirx.Sub | tirx.Mul | tirx.Div):
        a, b = constant_value(expr.a), constant_value(expr.b)
        if a is None or b is None or (isinstance(expr, tirx.Div) and b == 0.0):
            return None
        if isinstance(expr, tirx.Add):
            return a + b
        if isinstance(expr, tirx.Sub):
            return a - b
        return a * b if isinstance(expr, tirx.Mul) else a / b
    function = _call_name(expr)
    if function in _CONSTANT_CALLS:
        arguments = [constant_value(argument) for argument in expr.args]
        if all(argument is not None for argument in arguments):
            try:
                return float(_CONSTANT_CALLS[function](*arguments))
            except (ValueError, OverflowError, ZeroDivisionError):
                return None
    return None


def _call_name(expr: Any) -> str:
    """Short name of a scalar intrinsic ("sqrt"), "" for anything else."""
    if isinstance(expr, relax.Call) and isinstance(expr.op, ir.Op):
        return str(expr.op.name).rsplit(".", 1)[-1]
    return ""


_CONSTANT_CALLS: dict[str, Callable[..., float]] = {
    "sqrt": math.sqrt,
    "rsqrt": lambda x: 1.0 / math.sqrt(x),
    "exp": math.exp,
    "log": math.log,
    "pow": math.pow,
}


def free_vars(expr: Any) -> list[Any]:
    """Variables of an expression, in order of appearance."""
    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, ir.Var) and not any(same(node, known) for known in found):
            found.append(node)

    walk(as_expr(expr), visit)
    return found


def children(expr: Any) -> tuple[Any, ...]:
    """Operands of a scalar expression."""
    if isinstance(expr, tirx.Cast):
        return (expr.value,)
    if isinstance(expr, tirx.Select):
        return (expr.condition, expr.true_value, expr.false_value)
    if isinstance(expr, relax.Call):
        return tuple(expr.args)
    if isinstance(expr, tirx.Not):
        return (expr.a,)
    return (expr.a, expr.b) if hasattr(expr, "a") and hasattr(expr, "b") else ()


def walk(expr: Any, visit: Callable[[Any], None]) -> None:
    """Visit every node of a scalar expression."""
    visit(expr)
    for child in children(expr):
        walk(child, visit)


def substitute(expr: Any, values: Mapping[Any, Any]) -> Any:
    """Replace variables of a scalar expression."""

    def replace(node: Any) -> Any:
        if isinstance(node, ir.Var):
            for var, value in values.items():
                if same(var, node):
                    return value
        return node

    return tvm_ffi.structural_map(expr, replace)
