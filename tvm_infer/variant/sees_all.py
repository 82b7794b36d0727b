"""From a mask to a test of a run of keys: whether a row sees all keys from `first` to `last`, told from these two alone.

Interval arithmetic on the expression with kv_pos anywhere in first … last. The test may say no where it does not know; where it says
yes, every key is seen. Kernels ask once a tile and then spare themselves the mask of every logit: a tile is mostly seen whole.
"""

from __future__ import annotations

from typing import NamedTuple

from .code import Builder, Code
from .operations import BOOL, INT

# Arguments of the generated test; no parameter can be called so.
FIRST, LAST = "@first", "@last"


class _Value(NamedTuple):
    """Positions of nodes. Of a number: its bounds `low`, `high`. Of a condition: `low` is true only if it always holds, `high` only if
    it never does. None: not known."""

    low: int | None
    high: int | None


_UNKNOWN = _Value(None, None)
_MONOTONE = ("add", "min", "max", "to_float", "floordiv", "shr")  # in their first operand, or in both


class _Intervals:
    def __init__(self, code: Code) -> None:
        self.nodes = code.nodes
        self.builder = Builder()
        self.fixed: list[int | None] = []  # the node itself, where it does not depend on the key
        self.values: list[_Value] = []
        for node in code.nodes:
            args = [self.fixed[i] for i in node.args]
            fixed = None
            if not (node.op == "name" and node.value == "kv_pos") and all(a is not None for a in args):
                fixed = self.builder.add(node.op, node.kind, tuple(a for a in args if a is not None), node.value)
            self.fixed.append(fixed)
            self.values.append(self._value(len(self.values)))

    def _value(self, i: int) -> _Value:
        node, fixed, add = self.nodes[i], self.fixed[i], self.builder.add
        if fixed is not None:
            return _Value(fixed, add("not", BOOL, (fixed,)) if node.kind == BOOL else fixed)
        if node.op == "name":
            return _Value(add("name", INT, (), FIRST), add("name", INT, (), LAST))
        args = [self.values[a] for a in node.args]
        if node.op in ("to_float", "to_int") and self.nodes[node.args[0]].kind == BOOL:
            return self._number(node.op, node.kind, args[0])
        if node.op in _MONOTONE and (node.op not in ("floordiv", "shr") or self.fixed[node.args[1]] is not None):
            return self._of_each(node.op, node.kind, args)
        if node.op == "sub":
            a, b = args
            return self._of_each("sub", node.kind, [a, _Value(b.high, b.low)])
        # conditions may be compared, too, but have no bounds
        if node.op in ("lt", "le", "gt", "ge", "eq", "ne") and self.nodes[node.args[0]].kind != BOOL:
            return self._comparison(node.op, *args)
        if node.op in ("and", "or"):
            a, b = args
            low = self._combined(node.op, a.low, b.low)
            return _Value(low, self._combined("or" if node.op == "and" else "and", a.high, b.high))
        if node.op == "not":
            return _Value(args[0].high, args[0].low)
        return _UNKNOWN

    def _number(self, op: str, kind: str, condition: _Value) -> _Value:
        """A condition as 1 or 0: at least 1 where it always holds, at most 0 where it never does."""
        add = self.builder.add
        low = add("const", kind, (), 0) if condition.low is None else add(op, kind, (condition.low,))
        if condition.high is None:
            return _Value(low, add("const", kind, (), 1))
        return _Value(low, add(op, kind, (add("not", BOOL, (condition.high,)),)))

    def _of_each(self, op: str, kind: str, args: list[_Value]) -> _Value:
        lows, highs = [a.low for a in args], [a.high for a in args]
        if None in lows or None in highs:
            return _UNKNOWN
        return _Value(
            self.builder.add(op, kind, tuple(x for x in lows if x is not None)),
            self.builder.add(op, kind, tuple(x for x in highs if x is not None)),
        )

    def _combined(self, op: str, a: int | None, b: int | None) -> int | None:
        """Of two conditions; an unknown one counts as false."""
        if a is None or b is None:
            return (b if a is None else a) if op == "or" else None
        return self.builder.add(op, BOOL, (a, b))

    def _comparison(self, op: str, a: _Value, b: _Value) -> _Value:
        if op in ("gt", "ge"):
            return self._comparison({"gt": "lt", "ge": "le"}[op], b, a)
        if a.low is None or a.high is None or b.low is None or b.high is None:
            return _UNKNOWN
        add = self.builder.add
        if op == "lt":
            return _Value(add("lt", BOOL, (a.high, b.low)), add("ge", BOOL, (a.low, b.high)))
        if op == "le":
            return _Value(add("le", BOOL, (a.high, b.low)), add("gt", BOOL, (a.low, b.high)))
        always = add("and", BOOL, (add("eq", BOOL, (a.low, b.high)), add("eq", BOOL, (a.high, b.low))))
        never = add("or", BOOL, (add("lt", BOOL, (a.high, b.low)), add("gt", BOOL, (a.low, b.high))))
        return _Value(always, never) if op == "eq" else _Value(never, always)


def sees_all(mask: Code) -> Code | None:
    """The test, over the mask's variables and int32 `first` and `last` in place of kv_pos; None where nothing can be told."""
    intervals = _Intervals(mask)
    low = intervals.values[-1].low
    return None if low is None else intervals.builder.code(low)
