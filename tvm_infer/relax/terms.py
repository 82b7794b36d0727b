"""Sums: an expression as terms with constant factors, and what a softmax over the keys leaves of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import tvm_ffi
from tvm import ir, relax, sym, tirx

from .scalars import children, constant_value, free_vars

Term = tuple[float, Any]  # factor, expression; the expression of a constant is None


def is_float(expr: Any) -> bool:
    return str(expr.ty).startswith(("float", "bfloat"))


def terms(expr: Any, factor: float = 1.0) -> list[Term]:
    """Terms whose sum is factor * expr, in order, equal ones together; casts between floating types are looked through."""
    merged: list[Term] = []
    for own, part in _terms(expr, factor):
        for position, (other, known) in enumerate(merged):
            if (part is None and known is None) or (
                part is not None and known is not None and tvm_ffi.structural_equal(part, known)
            ):
                merged[position] = (own + other, known)
                break
        else:
            merged.append((own, part))
    return [(own, part) for own, part in merged if own != 0.0]


def _terms(expr: Any, factor: float) -> Iterator[Term]:
    number = constant_value(expr)
    if number is not None:
        yield factor * number, None
    elif isinstance(expr, tirx.Cast) and is_float(expr) and is_float(expr.value):
        yield from _terms(expr.value, factor)
    elif isinstance(expr, tirx.Add | tirx.Sub) and is_float(expr):
        yield from _terms(expr.a, factor)
        yield from _terms(expr.b, -factor if isinstance(expr, tirx.Sub) else factor)
    elif isinstance(expr, tirx.Mul | tirx.Div) and is_float(expr):
        a, b = constant_value(expr.a), constant_value(expr.b)
        if isinstance(expr, tirx.Mul) and a is not None:
            yield from _terms(expr.b, factor * a)
        elif b is not None and (b != 0.0 or isinstance(expr, tirx.Mul)):
            yield from _terms(expr.a, factor * b if isinstance(expr, tirx.Mul) else factor / b)
        elif isinstance(expr, tirx.Mul):
            constant, parts = factors(expr)
            yield factor * constant, expr if constant == 1.0 else functools.reduce(_product, parts)
        else:
            yield factor, expr
    else:
        yield factor, expr


def factors(expr: Any) -> tuple[float, list[Any]]:
    """What a product multiplies: a constant, and expressions that are no products."""
    constant, parts = 1.0, []
    for side in (expr.a, expr.b) if isinstance(expr, tirx.Mul) and is_float(expr) else ():
        own = terms(side)
        if len(own) != 1 or own[0][1] is None:
            parts.append(side)
            continue
        more, inner = factors(own[0][1])
        constant *= own[0][0] * more
        parts += inner
    return constant, parts or [expr]


def _product(a: Any, b: Any) -> Any:
    return tirx.Mul(a, b if str(a.ty) == str(b.ty) else tirx.Cast(str(a.ty), b))


def depends_on(expr: Any, test: Callable[[Any], bool]) -> bool:
    """Whether one of an expression's variables passes a test."""
    return any(test(var) for var in free_vars(expr))


def linear(expr: Any, variable: Any) -> int | None:
    """The c of an expression c * variable + (anything without it), where c is an integer other than 0; None for others."""
    total = 0
    for factor, part in terms(expr):
        if part is None or not any(var.same_as(variable) for var in free_vars(part)):
            continue
        inner = part.value if isinstance(part, tirx.Cast) else part
        if factor % 1 or not str(inner.ty).startswith("int"):
            return None
        found = sym.detect_linear_equation(sym.Analyzer().simplify(inner), [variable])
        if len(found) != 2 or not isinstance(found[0], tirx.IntImm):
            return None
        total += int(factor) * int(found[0].value)
    return total or None


def score_factors(expr: Any, score: Any) -> Iterator[float]:
    """The constants that stand right at the score, wherever it is read."""
    for factor, part in terms(expr) if is_float(expr) else [(1.0, expr)]:
        if isinstance(part, ir.Var):
            if part.same_as(score):
                yield factor
        elif part is not None:
            for child in children(part):
                yield from score_factors(child, score)


def tanh_argument(expr: Any) -> Any | None:
    """The x of tanh(x), None for anything else."""
    return _argument(expr, "tanh")


def absolute_argument(expr: Any) -> Any | None:
    """The x of |x|, None for anything else."""
    return _argument(expr, "fabs")


def _argument(expr: Any, function: str) -> Any | None:
    is_call = isinstance(expr, relax.Call) and isinstance(expr.op, ir.Op)
    return expr.args[0] if is_call and str(expr.op.name).rsplit(".", 1)[-1] == function else None
