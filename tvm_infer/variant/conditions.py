"""A condition as TIR, taken apart: into conditions that all hold, or of which one holds."""

from __future__ import annotations

from typing import Any

from .operations import BOOL, INT

SWAPPED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}
_NEGATED = {"LT": "GE", "LE": "GT", "GT": "LE", "GE": "LT", "EQ": "NE", "NE": "EQ"}


def is_true(tir: Any) -> bool:
    """Whether it is the constant."""
    return type(tir).__name__ == "IntImm" and str(tir.ty) == BOOL and bool(tir.value)


def conjuncts(tir: Any, negated: bool = False) -> list[Any]:
    """Conditions whose conjunction is `tir`, or its negation."""
    return _parts(tir, negated, "And", "Max", "Min")


def disjuncts(tir: Any, negated: bool = False) -> list[Any]:
    """Conditions whose disjunction is `tir`, or its negation."""
    return _parts(tir, negated, "Or", "Min", "Max")


def _parts(tir: Any, negated: bool, junction: str, at_most: str, at_least: str) -> list[Any]:
    """Parts that "And" joins; max(a, b) <= c is both a <= c and b <= c, and |q_pos - kv_pos| is such a maximum. Or that "Or" joins,
    for which min(a, b) <= c is the like."""
    from tvm import tirx

    def again(x: Any, is_negated: bool = False) -> list[Any]:
        return _parts(x, is_negated, junction, at_most, at_least)

    name = type(tir).__name__
    if name == "Not":
        return again(tir.a, not negated)
    if name in ("And", "Or") and (name == junction) != negated:
        return again(tir.a, negated) + again(tir.b, negated)
    if name in _NEGATED and negated and str(tir.a.ty) == INT:  # of floats NaN would come out otherwise
        return again(getattr(tirx, _NEGATED[name])(tir.a, tir.b))
    if negated:
        return [tirx.Not(tir)]
    if name in ("GT", "GE") and _is_extremum(tir.a, at_least, tir.b, at_most):
        return again(getattr(tirx, SWAPPED[name])(tir.b, tir.a))
    if name in ("LT", "LE"):
        if type(tir.a).__name__ == at_most and str(tir.a.ty) == INT:
            return [part for x in (tir.a.a, tir.a.b) for part in again(type(tir)(x, tir.b))]
        if type(tir.b).__name__ == at_least and str(tir.b.ty) == INT:
            return [part for x in (tir.b.a, tir.b.b) for part in again(type(tir)(tir.a, x))]
    return [tir]


def _is_extremum(a: Any, of_a: str, b: Any, of_b: str) -> bool:
    return str(a.ty) == INT and (type(a).__name__ == of_a or type(b).__name__ == of_b)
