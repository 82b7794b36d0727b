"""Traced values in numpy's hands: its numbers meet them through their operators, and nothing else of numpy does."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .expression import Expr
from .location import error_here

_OPERATORS = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": operator.truediv,
    "floor_divide": operator.floordiv,
    "remainder": operator.mod,
    "less": operator.lt,
    "less_equal": operator.le,
    "greater": operator.gt,
    "greater_equal": operator.ge,
    "equal": operator.eq,
    "not_equal": operator.ne,
}
_RENAMED = {"absolute": "abs", "fabs": "abs"}


def apply_ufunc(ufunc: Any, method: str, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Expr:
    """``np.float32(2) * x`` for a traced x. Raises VariantError for any other function, and for arrays."""
    name = ufunc.__name__
    if name not in _OPERATORS:
        raise error_here(
            f"numpy.{name} cannot take a traced value: use variant.{_RENAMED.get(name, name)} if there is one"
        )
    if method != "__call__" or kwargs or not all(isinstance(x, (Expr, np.generic)) for x in inputs):
        raise error_here(
            "a numpy array beside a traced value: declare a parameter (variant.tensor, per_head, per_request)"
        )
    result: Expr = _OPERATORS[name](*(x.item() if isinstance(x, np.generic) else x for x in inputs))
    return result
