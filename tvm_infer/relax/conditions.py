"""Conditions: and, or, not and selections of boolean expressions, of which some are known."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import tvm_ffi
from tvm import tirx

_NEGATED = {tirx.LT: tirx.GE, tirx.LE: tirx.GT, tirx.GT: tirx.LE, tirx.GE: tirx.LT, tirx.EQ: tirx.NE, tirx.NE: tirx.EQ}

# Of numbers, and of expressions of variants, which overload the operators.
COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    tirx.LT: operator.lt,
    tirx.LE: operator.le,
    tirx.GT: operator.gt,
    tirx.GE: operator.ge,
    tirx.EQ: operator.eq,
    tirx.NE: operator.ne,
}


def alike(a: Any, b: Any) -> bool:
    """Whether two conditions, bools or expressions, are the same."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    return bool(tvm_ffi.structural_equal(a, b))


def conjuncts(condition: Any) -> list[Any]:
    """The conditions that a condition is the conjunction of."""
    if condition is True:
        return []
    if isinstance(condition, tirx.And):
        return conjuncts(condition.a) + conjuncts(condition.b)
    return [condition]


def both(a: Any, b: Any) -> Any:
    """a and b, each conjunct once."""
    if a is False or b is False:
        return False
    parts = conjuncts(a)
    for part in conjuncts(b):
        if not any(alike(part, known) for known in parts):
            parts.append(part)
    if not parts:
        return True
    result = parts[0]
    for part in parts[1:]:
        result = tirx.And(result, part)
    return result


def either(a: Any, b: Any) -> Any:
    """a or b."""
    if a is True or b is True:
        return True
    if a is False or b is False:
        return b if a is False else a
    return a if alike(a, b) else tirx.Or(a, b)


def negation(a: Any) -> Any:
    """Not a; of a comparison of integers the opposite one."""
    if isinstance(a, bool):
        return not a
    if isinstance(a, tirx.Not):
        return a.a
    if isinstance(a, tirx.And):
        return either(negation(a.a), negation(a.b))
    if isinstance(a, tirx.Or):
        return both(negation(a.a), negation(a.b))
    if type(a) in _NEGATED and str(a.a.ty).startswith("int"):
        return _NEGATED[type(a)](a.a, a.b)
    return tirx.Not(a)


def select(condition: Any, yes: Any, no: Any) -> Any:
    """A selection between conditions, as and and or."""
    if isinstance(condition, bool):
        return yes if condition else no
    if alike(yes, no):
        return yes
    if yes is True:
        return either(condition, no)
    if no is True:
        return either(negation(condition), yes)
    return either(both(condition, yes), both(negation(condition), no))
