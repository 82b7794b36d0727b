"""Functions of traced values. Numbers are taken too; an int becomes float32 where a function is one of floats."""

from __future__ import annotations

from typing import Any

from .expression import Expr, _alike, _arithmetic, apply, lift, to_float, to_int
from .location import error_here
from .operations import BOOL


def tanh(x: Any) -> Expr:
    """The hyperbolic tangent; on CUDA the hardware's, relative error 2^-11."""
    return apply("tanh", to_float(x))


def exp(x: Any) -> Expr:
    """e to the x."""
    return apply("exp", to_float(x))


def exp2(x: Any) -> Expr:
    """2 to the x."""
    return apply("exp2", to_float(x))


def log(x: Any) -> Expr:
    """The natural logarithm."""
    return apply("log", to_float(x))


def log2(x: Any) -> Expr:
    """The logarithm to base 2."""
    return apply("log2", to_float(x))


def sigmoid(x: Any) -> Expr:
    """1 / (1 + exp(-x))."""
    return apply("sigmoid", to_float(x))


def cos(x: Any) -> Expr:
    """The cosine of x in radians."""
    return apply("cos", to_float(x))


def sin(x: Any) -> Expr:
    """The sine of x in radians."""
    return apply("sin", to_float(x))


def sqrt(x: Any) -> Expr:
    """The square root."""
    return apply("sqrt", to_float(x))


def absolute(x: Any) -> Expr:
    """|x|, float32 or int32 as x is."""
    return abs(lift(x))


def minimum(x: Any, y: Any) -> Expr:
    """The smaller of two numbers."""
    return _arithmetic("min", x, y)


def maximum(x: Any, y: Any) -> Expr:
    """The greater of two numbers."""
    return _arithmetic("max", x, y)


def where(condition: Any, x: Any, y: Any) -> Expr:
    """x where the condition holds, else y. Both are evaluated: an index of a table must be in range in both."""
    condition = lift(condition)
    if condition.kind != BOOL:
        raise error_here(f"variant.where got a {condition.kind} as its condition; it must be a comparison")
    return apply("select", condition, *_alike(x, y))


def cast(x: Any, dtype: str) -> Expr:
    """x as "float32" or "int32" (rounded towards zero)."""
    if dtype not in ("float32", "int32"):
        raise error_here(f"argument `dtype` of variant.cast is {dtype!r}; it must be float32 or int32")
    return to_float(x) if dtype == "float32" else to_int(x)
