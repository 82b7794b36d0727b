"""A variant's expressions evaluated by numpy, in float64 and int64: what generated code is held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .code import Code
from .operations import BOOL, FLOAT, OPERATIONS


def evaluate(code: Code, values: Mapping[str, Any]) -> Any:
    """The value of `code`, broadcast over the arrays given: float64, int64 or bool.

    values : numbers or arrays of the variables and parameters that it reads, by name; a table is an array that is indexed.
    """
    results: list[Any] = []
    with np.errstate(all="ignore"):
        for node in code.nodes:
            args = [results[i] for i in node.args]
            if node.op == "const":
                results.append(as_kind(node.value, node.kind))
            elif node.op == "name":
                results.append(as_kind(values[str(node.value)], node.kind))
            elif node.op == "load":
                results.append(as_kind(np.asarray(values[str(node.value)])[tuple(args)], node.kind))
            else:
                results.append(OPERATIONS[node.op].numpy(*args))
    return results[-1]


def as_kind(x: Any, kind: str) -> np.ndarray:
    """In numpy's type of values of this kind."""
    return np.asarray(x).astype({FLOAT: np.float64, BOOL: np.bool_}.get(kind, np.int64))
