"""An element of a head as a sum of terms `factor * [position] * [cos or sin (freq * position)] * [x]`, for all elements at once.

The index along the head is an array, so that slices, halves, repeats and tables of constants become array lookups; what does not hold
for all elements alike (pieces of a concat) is a factor of 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import ir, relax, tirx

from .movement import broadcast_index
from .nodes import Index, dtype_class, int_imm, known_shape, same, static_int
from .scalars import children, free_vars
from .symbolic import Atom, Evaluator


class NotARotationError(Exception):
    """Why an expression is no rotation. rank : how telling that is: 2 where an angle is not known, so that the rest may well be one; 1
    where all of it is known; 0, and -1 where nothing was read, else."""

    def __init__(self, why: str, rank: int = 0) -> None:
        super().__init__(why)
        self.rank = rank


@dataclass(frozen=True)
class Term:
    """All arrays are [head_dim]. trig : "cos", "sin" or None, of freq * position. source : element of x, None where x is no factor.
    of_position : whether the position itself is a factor."""

    factor: np.ndarray
    freq: np.ndarray
    trig: str | None = None
    source: np.ndarray | None = None
    of_position: bool = False


_COMPARISONS: dict[Any, Callable[..., Any]] = {
    tirx.LT: np.less,
    tirx.LE: np.less_equal,
    tirx.GT: np.greater,
    tirx.GE: np.greater_equal,
    tirx.EQ: np.equal,
    tirx.NE: np.not_equal,
}
_NUMBERS: dict[Any, Callable[..., Any]] = {
    tirx.FloorDiv: np.floor_divide,
    tirx.FloorMod: np.mod,
    tirx.Max: np.maximum,
    tirx.Min: np.minimum,
    tirx.Div: np.divide,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "pow": np.power,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "fabs": np.abs,
    "floor": np.floor,
}
_WIDE = ("float32", "float64")
_SHORT = ("float16", "bfloat16")


class Reader:
    """Reads expressions of elements of one tensor `x`, at `token` and `depth` (index variables; depth runs over a head)."""

    def __init__(self, ev: Evaluator, x: Any, token: Any, depth: Any, head_dim: int) -> None:
        self._ev = ev
        self._x = x
        self._token = token
        self._depth = depth
        self._active = np.ones(head_dim, bool)  # elements that the piece under way is of
        self._zeros = np.zeros(head_dim)
        self._in_angle = False
        self._index: Index = ()  # of x, but for its place along the head
        self._axis = -1

    def place(self) -> Index:
        """The index of x of which the element at `depth` was read."""
        return (*self._index[: self._axis], self._depth, *self._index[self._axis + 1 :])

    def terms(self, expr: Any) -> list[Term]:
        """The terms whose sum an expression is. Raises NotARotationError."""
        return [term for term in self._terms(expr) if term.factor.any()]

    def _terms(self, expr: Any) -> list[Term]:
        if isinstance(expr, tirx.IntImm | tirx.FloatImm):
            return [self._number(float(expr.value))]
        if isinstance(expr, ir.Var):
            return self._variable(expr)
        if isinstance(expr, tirx.Cast):
            target, source = str(expr.ty), str(expr.value.ty)
            rounds = target not in _WIDE and not (dtype_class(target) == dtype_class(source) == "int")
            if rounds and (self._in_angle or target not in _SHORT):  # x and cosines keep what a 16-bit model keeps
                raise self._other(f"it is rounded to {expr.ty}")
            return self._terms(expr.value)
        if isinstance(expr, tirx.Add | tirx.Sub):
            sign = -1.0 if isinstance(expr, tirx.Sub) else 1.0
            return self.terms(expr.a) + [_scaled(term, sign) for term in self.terms(expr.b)]
        if isinstance(expr, tirx.Mul):
            return self._product(self.terms(expr.a), self.terms(expr.b))
        if isinstance(expr, tirx.Div) and self._numbers(expr.a) is None:
            divisor = self._need(expr.b)
            return [_scaled(term, 1.0 / np.where(term.factor != 0.0, divisor, 1.0)) for term in self.terms(expr.a)]
        if isinstance(expr, tirx.Select):
            return self._selected(expr)
        numbers = self._numbers(expr)
        if numbers is not None:
            return [self._number(numbers)]
        return self._function(expr)

    def _number(self, value: Any) -> Term:
        return Term(np.where(self._active, value, 0.0), self._zeros)

    def _other(self, why: str) -> NotARotationError:
        return NotARotationError(why, 2 if self._in_angle else 0)

    def _variable(self, var: Any) -> list[Term]:
        if same(var, self._depth):
            return [self._number(np.arange(len(self._active)))]
        if same(var, self._token):
            return [Term(self._active.astype(float), self._zeros, of_position=True)]
        atom = self._ev.atoms.get(var)
        if atom is None:
            raise self._other(f"it depends on {var.name}, which is not the position along the head")
        if atom.kind == "load" and same(atom.source, self._x):
            return [self._element_of_x(atom.index)]
        constant = self._ev.definition(atom.source)
        if atom.kind == "load" and isinstance(constant, ir.GenericConst):
            return [self._lookup(constant.value.numpy(), atom)]
        if atom.kind == "dot":
            return self._outer_product(atom)
        what = "its angles depend on" if self._in_angle else "it depends on"
        raise self._other(f"{what} `{atom.name}`, which is neither a constant nor the token's position (position_ids)")

    def _element_of_x(self, index: Index) -> Term:
        axis = self._axis_of_head(index)
        rest = (*index[:axis], int_imm(0), *index[axis + 1 :])
        if not self._index:
            self._index, self._axis = rest, axis
        if axis != self._axis or not all(self._ev.equal(a, b) for a, b in zip(rest, self._index, strict=True)):
            raise self._other("it mixes elements of several heads or tokens")
        source = self._need(index[axis])
        return Term(self._active.astype(float), self._zeros, source=np.where(self._active, source, -1).astype(int))

    def _axis_of_head(self, index: Index) -> int:
        """The axis along a head: that whose index follows the place in a head; one and the same element of each head has none such."""
        along = [axis for axis, part in enumerate(index) if any(same(var, self._depth) for var in free_vars(part))]
        if not along:
            shape = known_shape(self._x) or ()
            extent = len(self._active)
            along = [
                a for a, part in enumerate(index) if static_int(part) is not None and static_int(shape[a]) == extent
            ]
            along = along[-1:]
        if len(along) != 1:
            raise self._other("its heads are not an axis of their own")
        return along[0]

    def _lookup(self, table: np.ndarray, atom: Atom) -> Term:
        """Elements of a constant."""
        index = []
        for part in atom.index:
            numbers = self._numbers(part)
            if numbers is None:
                raise NotARotationError("its cosines, sines or angles come from a table by position", rank=1)
            index.append(np.where(self._active, numbers, 0).astype(int))
        return self._number(table[tuple(index)].astype(float))

    def _outer_product(self, atom: Atom) -> list[Term]:
        """A matmul whose sum has one term: torch's way to multiply positions by frequencies."""
        a, b = atom.call.args[:2]
        shapes = known_shape(a), known_shape(b)
        if any(shape is None or len(shape) < 2 for shape in shapes) or static_int(shapes[0][-1]) != 1:  # type: ignore[index]
            raise self._other(f"it depends on `{atom.name}`, a matmul")
        *batch, row, column = atom.index
        left = broadcast_index(a, (*batch, row, int_imm(0)))
        right = broadcast_index(b, (*batch, int_imm(0), column))
        return self._product(self.terms(self._ev.element(a, left)), self.terms(self._ev.element(b, right)))

    def _product(self, a: list[Term], b: list[Term]) -> list[Term]:
        products = []
        for left in a:
            for right in b:
                factor = left.factor * right.factor
                if not factor.any():
                    continue
                if (
                    (left.trig and right.trig)
                    or (left.source is not None and right.source is not None)
                    or (left.of_position and right.of_position)
                ):
                    raise self._other("it is not linear in x, or a product of angles")
                trig = left if left.trig else right
                source = right.source if left.source is None else left.source
                products.append(Term(factor, trig.freq, trig.trig, source, left.of_position or right.of_position))
        return products

    def _selected(self, expr: Any) -> list[Term]:
        """Each branch on its elements, so that the other's lookups do not leave their tables."""
        chosen, before = self._condition(expr.condition), self._active
        found: list[Term] = []
        try:
            for branch, holds in ((expr.true_value, chosen), (expr.false_value, ~chosen)):
                self._active = before & holds
                if self._active.any():
                    found += self.terms(branch)
        finally:
            self._active = before
        return found

    def _condition(self, expr: Any) -> np.ndarray:
        if type(expr) in _COMPARISONS:
            return _COMPARISONS[type(expr)](self._need(expr.a), self._need(expr.b))
        if isinstance(expr, tirx.Not):
            return ~self._condition(expr.a)
        if isinstance(expr, tirx.And | tirx.Or):
            combine = np.logical_and if isinstance(expr, tirx.And) else np.logical_or
            return combine(self._condition(expr.a), self._condition(expr.b))
        raise self._other("it differs by a condition that is not on the place in a head")

    def _function(self, expr: Any) -> list[Term]:
        name = _function_name(expr)
        if name not in ("cos", "sin"):
            for operand in children(expr):
                self.terms(operand)  # says more, if it is an operand's fault
            raise self._other(f"{name or type(expr).__name__} takes part in it")
        before, self._in_angle = self._in_angle, True
        freq = self._zeros
        try:
            for term in self.terms(expr.args[0]):
                if term.trig or term.source is not None or not term.of_position:
                    raise self._other("its angles are not a constant times the token's position")
                freq = freq + term.factor
        finally:
            self._in_angle = before
        return [Term(self._active.astype(float), freq, name)]

    # ---- numbers

    def _need(self, expr: Any) -> np.ndarray:
        numbers = self._numbers(expr)
        if numbers is None:
            raise self._other("it differs from token to token, or from head to head, in more than its angle")
        return numbers

    def _numbers(self, expr: Any) -> np.ndarray | None:
        """The values of an expression that depends on the place in a head alone, None for others."""
        function = _NUMBERS.get(type(expr)) or _FUNCTIONS.get(_function_name(expr))
        if function is not None:
            operands = expr.args if isinstance(expr, relax.Call) else (expr.a, expr.b)
            values = [self._numbers(operand) for operand in operands]
            if any(value is None for value in values):
                return None
            with np.errstate(all="ignore"):  # of elements that a piece is not of
                return np.where(self._active, function(*values), 0.0)
        if _function_name(expr):
            return None
        try:
            found = self.terms(expr)
        except NotARotationError:
            return None
        if any(term.trig or term.source is not None or term.of_position for term in found):
            return None
        return np.sum([self._zeros, *(term.factor for term in found)], axis=0)


def _scaled(term: Term, factor: Any) -> Term:
    return Term(term.factor * factor, term.freq, term.trig, term.source, term.of_position)


def _function_name(expr: Any) -> str:
    """Short name of a scalar intrinsic, "" for anything else."""
    is_call = isinstance(expr, relax.Call) and isinstance(expr.op, ir.Op)
    return str(expr.op.name).rsplit(".", 1)[-1] if is_call else ""
