"""Flat code as a line of Python that, traced again, gives the same code."""

from __future__ import annotations

import collections

import numpy as np

from .code import Code, Node
from .operations import ATOM, FLOAT, OPERATIONS

_LONGEST = 200  # characters of one line; of longer expressions, what is shared is printed once
_CONVERTING = {"add", "sub", "mul", "min", "max", "eq", "ne", "lt", "le", "gt", "ge", "select"}


def number(value: float | int | bool, kind: str) -> str:
    """A constant as short as it can be and still be the same float32, int32 or bool."""
    return str(np.float32(value)) if kind == FLOAT else str(value)


def expression(code: Code) -> str:
    """One line. Of what is long, values that are used several times are named and come in lines of their own, after it."""
    last = len(code.nodes) - 1
    if _length(code) <= _LONGEST:
        return _Inline(code, {}).text(last)
    uses = collections.Counter(a for node in code.nodes for a in node.args)
    shared = [i for i, node in enumerate(code.nodes) if uses[i] > 1 and node.args]
    names = {i: f"t{number}" for number, i in enumerate(shared)}
    lines = [f"    {names[i]} = {_Inline(code, {k: n for k, n in names.items() if k != i}).text(i)}" for i in shared]
    return "\n".join([_Inline(code, names).text(last) + (", where" if lines else ""), *lines])


def _length(code: Code) -> int:
    """Characters of the one-line form, roughly: what shared values are written out several times would make."""
    lengths: list[int] = []
    for node in code.nodes:
        own = len(str(node.value)) if node.value is not None else len(node.op) + 2
        lengths.append(own + sum(lengths[i] for i in node.args))
    return lengths[-1]


class _Inline:
    """names : values that stand for themselves."""

    def __init__(self, code: Code, names: dict[int, str]) -> None:
        self._nodes = code.nodes
        self._names = names

    def text(self, i: int, least: int = 0) -> str:
        """Node i, in parentheses where its operator binds less than `least`."""
        if i in self._names:
            return self._names[i]
        node = self._nodes[i]
        if node.op == "const":
            assert isinstance(node.value, (int, float))
            text = number(node.value, node.kind)
            return f"({text})" if text.startswith("-") and least >= ATOM - 1 else text
        if node.op == "name":
            return str(node.value)
        if node.op == "load":
            return f"{node.value}[{', '.join(self.text(a) for a in node.args)}]"
        row = OPERATIONS[node.op]
        if self._is_negation(node):
            text, precedence = f"-{self.text(node.args[1], ATOM - 1)}", ATOM - 1
        else:
            precedence = row.precedence
            text = row.text.format(*self._operands(node, precedence))
        return f"({text})" if precedence < least else text

    def _is_negation(self, node: Node) -> bool:
        first = self._nodes[node.args[0]] if node.op == "sub" else None
        return first is not None and first.op == "const" and first.value == 0

    def _operands(self, node: Node, precedence: int) -> list[str]:
        """The operands' texts. A conversion to float32 that the operator makes by itself is left out."""
        converted = [self._nodes[a].op == "to_float" and self._is_int(a) for a in node.args]
        silent = node.op == "div" or (
            node.op in _CONVERTING
            and any(self._nodes[a].kind == FLOAT and not c for a, c in zip(node.args, converted, strict=True))
        )
        texts = []
        for position, (a, is_converted) in enumerate(zip(node.args, converted, strict=True)):
            # Operators group to the left, and comparisons not at all.
            bound = 0 if precedence == ATOM else precedence + (position > 0 or precedence == 1)
            shown = self._nodes[a].args[0] if silent and is_converted and a not in self._names else a
            texts.append(self.text(shown, bound))
        return texts

    def _is_int(self, a: int) -> bool:
        return self._nodes[self._nodes[a].args[0]].kind == "int32"
