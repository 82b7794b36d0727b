"""How large logits can become, by interval arithmetic on the expression with its scalars known.

A softmax subtracts the row's maximum so that exponentials neither overflow nor vanish together. Logits that cannot leave [-64, 64] do
neither by themselves: e^64 = 6e27, times a million keys and values in the thousands, is far from float32's 3e38, and e^-64 = 2e-28 from
its smallest. A prefill kernel on bfloat16 then spares itself the maximum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from .code import Code, Node
from .operations import BOOL, OPERATIONS

SMALL = 64.0


class _Interval(NamedTuple):
    low: float
    high: float


_ALL = _Interval(-math.inf, math.inf)
_INCREASING = ("tanh", "sigmoid", "exp", "exp2", "to_float")


def are_small(logits: Code, scalars: Mapping[str, int | float]) -> bool:
    """Whether logits stay within SMALL on both sides, whatever queries, keys and tables hold."""
    found: list[_Interval] = []
    for node in logits.nodes:
        found.append(_of(node, [found[a] for a in node.args], scalars))
    return found[-1].low >= -SMALL and found[-1].high <= SMALL


def _of(node: Node, args: list[_Interval], scalars: Mapping[str, int | float]) -> _Interval:
    if node.op == "const" and node.kind != BOOL:
        assert isinstance(node.value, (int, float))
        return _Interval(float(node.value), float(node.value))
    if node.op == "name" and node.value in scalars:
        return _Interval(float(scalars[str(node.value)]), float(scalars[str(node.value)]))
    if node.op in _INCREASING and node.kind != BOOL:
        return _Interval(*(_at(node.op, x) for x in args[0]))
    if node.op == "select":
        return _Interval(min(args[1].low, args[2].low), max(args[1].high, args[2].high))
    if node.op in ("min", "max"):
        pick: Callable[[float, float], float] = min if node.op == "min" else max
        return _Interval(pick(args[0].low, args[1].low), pick(args[0].high, args[1].high))
    if node.op in ("add", "sub", "mul") or (node.op == "div" and args[1].low == args[1].high != 0):
        return _corners(node.op, *args)
    return _ALL


def _corners(op: str, a: _Interval, b: _Interval) -> _Interval:
    values = [_at(op, x, y) for x in a for y in b]
    return _ALL if any(math.isnan(x) for x in values) else _Interval(min(values), max(values))


def _at(op: str, *args: float) -> float:
    import numpy as np

    with np.errstate(all="ignore"):
        return float(OPERATIONS[op].numpy(*(np.float64(x) for x in args)))
