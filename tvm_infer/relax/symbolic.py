"""What one element of a Relax tensor is, as a scalar expression of its indices.

`Evaluator.element(x, (b, h, i, j))` walks back from `x` through the bindings of a Relax function. Elementwise operators become scalar
operators, data movement (reshape, permute, broadcast, slice, concat, arange, triu, …) becomes index arithmetic, scalar constants become
literals. What has no closed form stays as an *atom*: a fresh scalar variable together with the record of what it stands for (an element
of another tensor, one entry of a matrix product, …). The result says nothing of attention yet: matching reads it (match.py, prove.py).

Indices are int64 TVM expressions, so that `tvm.sym.Analyzer` can prove facts about them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import ir, relax, sym, tirx

from .elements import ELEMENT_RULES, closed_form
from .movement import VIEW_RULES, broadcast_index, split_view
from .nodes import Index, dtype_of, int_imm, is_widening, known_shape, op_name, same, static_int
from .scalars import as_expr, constant_value, free_vars, literal

# An element whose expression needs more operators than this is not a mask or a score: it is a network.
MAX_OPERATORS = 2000

_INT_LIMIT = 1 << 31  # lengths stay below 2^31 tokens; the analyzer needs a finite bound


class TooComplexError(Exception):
    """The element depends on more than MAX_OPERATORS operators."""


@dataclass(frozen=True)
class Atom:
    """What an opaque scalar variable stands for.

    kind : "load" (element `index` of `source`, a parameter, constant or the result of an operator without closed form),
      "dot" (entry `index` of the matmul bound to `source`), "softmax" (element `index` of the softmax bound to `source`), or
      "reduce" (max or min of `operand`; `index` has one entry per axis of the operand, None at the reduced ones).
    """

    kind: str
    source: Any
    index: Index
    call: Any = None
    operand: Any = None
    reducer: str = ""

    @property
    def name(self) -> str:
        """Name of the tensor that the element belongs to."""
        return self.source.name if isinstance(self.source, ir.Var) else "constant"


@dataclass(frozen=True)
class View:
    """An element of `tensor`, times a constant factor: `factor * tensor[index]`."""

    tensor: Any
    index: Index
    factor: float


class Evaluator:
    """Evaluates elements of the tensors of one Relax function.

    Parameters
    ----------
    definitions : variable -> the expression that it is bound to. positions : the input [1, n] that counts the tokens of the row, whose
        element (0, x) is x; None where there is none.

    Attributes
    ----------
    read_positions : whether an element of `positions` was needed so far.
    """

    def __init__(self, definitions: Mapping[Any, Any], positions: Any = None) -> None:
        self.definitions = definitions
        self.positions = positions
        self.read_positions = False
        self.analyzer = sym.Analyzer()
        self.atoms: dict[Any, Atom] = {}
        self.stops: set[Any] = set()
        self._operators = 0

    # ---- indices

    def bind(self, name: str, extent: Any) -> Any:
        """A fresh index variable in [0, extent)."""
        var = tirx.Var(name, "int64")
        self.bind_lengths(extent)
        self.analyzer.bind(var, ir.Range(int_imm(0), extent))
        return var

    def bind_lengths(self, extent: Any) -> None:
        """Tell the analyzer that the symbolic lengths in `extent` are positive."""
        for var in free_vars(extent):
            if not self.analyzer.const_int_bound_is_bound(var):
                self.analyzer.bind(var, ir.Range(int_imm(1), int_imm(_INT_LIMIT)))

    def equal(self, a: Any, b: Any) -> bool:
        """Whether two integer expressions are provably equal."""
        return bool(self.analyzer.can_prove_equal(as_expr(a), as_expr(b)))

    def simplify(self, expr: Any) -> Any:
        return self.analyzer.simplify(expr)

    def definition(self, expr: Any) -> Any:
        """The expression behind a variable, following variable = variable bindings."""
        while isinstance(expr, ir.Var) and expr in self.definitions:
            expr = self.definitions[expr]
        return expr

    def root(self, expr: Any) -> Any:
        """The last variable of a chain of variable = variable bindings."""
        while isinstance(expr, ir.Var) and isinstance(self.definitions.get(expr), ir.Var):
            expr = self.definitions[expr]
        return expr

    # ---- elements

    def element(self, tensor: Any, index: Sequence[Any]) -> Any:
        """The scalar expression of `tensor[index]`.

        Raises
        ------
        TooComplexError : the expression would need more than MAX_OPERATORS operators.
        """
        self._operators = 0
        return self._element(tensor, tuple(as_expr(i) for i in index))

    def _element(self, tensor: Any, index: Index) -> Any:
        self._operators += 1
        if self._operators > MAX_OPERATORS:
            raise TooComplexError
        tensor = self.root(tensor)
        if tensor in self.stops:
            return self.atom("load", tensor, index)
        if self.positions is not None and same(tensor, self.positions):
            self.read_positions = True
            return index[-1] if dtype_of(tensor) == "int64" else tirx.Cast(dtype_of(tensor), index[-1])
        value = self.definition(tensor)
        if isinstance(value, ir.GenericConst):
            return self._constant(tensor, value, index)
        if isinstance(value, relax.TupleGetItem):
            return self._tuple_item(tensor, value, index)
        name = op_name(value)
        if name in ELEMENT_RULES:
            result = ELEMENT_RULES[name](self, value, index)
            if result is not None:
                return result
        if name in VIEW_RULES:
            source = VIEW_RULES[name](self, value, index)
            if source is not None:
                return self._element(value.args[0], source)
        if name == "relax.matmul":
            return self.atom("dot", tensor, index, call=value)
        if name == "relax.nn.softmax":
            return self.atom("softmax", tensor, index, call=value)
        if name in ("relax.max", "relax.min"):
            return self._reduction(tensor, value, index)
        return self.atom("load", tensor, index)

    def atom(self, kind: str, source: Any, index: Index, **fields: Any) -> Any:
        """The scalar variable that stands for an element without closed form; equal elements get the same variable."""
        for var, known in self.atoms.items():
            if known.kind == kind and same(known.source, source) and self._same_index(known.index, index):
                return var
        var = tirx.Var(kind, dtype_of(source))
        self.atoms[var] = Atom(kind, source, index, **fields)
        return var

    def _same_index(self, a: Index, b: Index) -> bool:
        return len(a) == len(b) and all(
            (x is None and y is None) or (x is not None and y is not None and self.equal(x, y))
            for x, y in zip(a, b, strict=True)
        )

    def _constant(self, tensor: Any, value: Any, index: Index) -> Any:
        data = value.value.numpy()
        if data.size and (data == data.flat[0]).all():
            return literal(data.flat[0].item(), dtype_of(value))
        numbers = [static_int(i) for i in index]
        if all(number is not None for number in numbers):
            return literal(data[tuple(numbers)].item(), dtype_of(value))
        closed = closed_form(data, dtype_of(value), index)
        return self.atom("load", tensor, index) if closed is None else closed

    def _tuple_item(self, tensor: Any, item: Any, index: Index) -> Any:
        """One output of `split`, or a field of a tuple that was just made."""
        source = self.definition(item.tuple_value)
        if isinstance(source, relax.Tuple):
            return self._element(source.fields[item.index], index)
        moved = split_view(self, source, item.index, index)
        if moved is not None:
            return self._element(source.args[0], moved)
        return self.atom("load", tensor, index)

    def _reduction(self, tensor: Any, call: Any, index: Index) -> Any:
        operand = call.args[0]
        shape = known_shape(operand)
        if shape is None or call.attrs.axis is None:
            return self.atom("load", tensor, index)
        axes = {int(axis) % len(shape) for axis in call.attrs.axis}
        remaining = iter(index)
        source: list[Any] = []
        for axis in range(len(shape)):
            if axis in axes:
                source.append(None)
                if call.attrs.keepdims:
                    next(remaining)
            else:
                source.append(next(remaining))
        reducer = "max" if op_name(call) == "relax.max" else "min"
        return self.atom("reduce", tensor, tuple(source), operand=operand, reducer=reducer)

    # ---- views

    def views(self, tensor: Any, index: Sequence[Any]) -> Iterator[View]:
        """The element and its sources, nearest first, through data movement, scalar factors and widening casts alone."""
        current = View(self.root(tensor), tuple(as_expr(i) for i in index), 1.0)
        while True:
            yield current
            following = self._source_view(current)
            if following is None:
                return
            current = following

    def _source_view(self, view: View) -> View | None:
        value = self.definition(view.tensor)
        name = op_name(value)
        if isinstance(value, relax.TupleGetItem):
            source = self.definition(value.tuple_value)
            if isinstance(source, relax.Tuple):
                return View(self.root(source.fields[value.index]), view.index, view.factor)
            moved = split_view(self, source, value.index, view.index)
            return None if moved is None else View(self.root(source.args[0]), moved, view.factor)
        if name in VIEW_RULES:
            moved = VIEW_RULES[name](self, value, view.index)
            return None if moved is None else View(self.root(value.args[0]), moved, view.factor)
        if name in ("relax.multiply", "relax.divide"):
            return self._scaled_view(value, name, view)
        if name == "relax.negative":
            return View(self.root(value.args[0]), view.index, -view.factor)
        if name == "relax.astype" and is_widening(dtype_of(value.args[0]), dtype_of(value)):
            return View(self.root(value.args[0]), view.index, view.factor)
        return None

    def _scaled_view(self, call: Any, name: str, view: View) -> View | None:
        """x * c, c * x or x / c with a scalar constant c."""
        for operand, other in ((call.args[0], call.args[1]), (call.args[1], call.args[0])):
            constant = self._scalar(other)
            if constant is None or (name == "relax.divide" and (operand is call.args[1] or constant == 0.0)):
                continue
            factor = view.factor * constant if name == "relax.multiply" else view.factor / constant
            return View(self.root(operand), broadcast_index(operand, view.index), factor)
        return None

    def _scalar(self, expr: Any) -> float | None:
        """The value of a tensor of one element that is constant."""
        shape = known_shape(expr)
        if shape is None or any(static_int(dim) != 1 for dim in shape):
            return None
        try:
            return constant_value(self._element(expr, tuple(int_imm(0) for _ in shape)))
        except TooComplexError:
            return None


def decided(evaluator: Evaluator, expr: Any) -> Any:
    """An expression without the selections that the ranges of its indices decide (which piece of a concat an element is of)."""

    def decide(node: Any) -> Any:
        number = static_int(evaluator.simplify(node.condition)) if isinstance(node, tirx.Select) else None
        if number is None:
            return node
        return node.true_value if number else node.false_value

    return tvm_ffi.structural_map(expr, decide)
