"""What one element of a Relax tensor is, as a scalar expression of its indices.

`Evaluator.element(x, (b, h, i, j))` walks back from `x` through the bindings of a Relax function. Elementwise operators become scalar
operators, data movement (reshape, permute, broadcast, slice, concat, arange, triu, …) becomes index arithmetic, scalar constants become
literals. What has no closed form stays as an *atom*: a fresh scalar variable together with the record of what it stands for (an element
of another tensor, one entry of a matrix product, …). The result says nothing of attention yet: matching reads it (match.py, prove.py).

Indices are int64 TVM expressions, so that `tvm.sym.Analyzer` can prove facts about them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm_ffi
from tvm import ir, relax, sym, tirx

Index = tuple[Any, ...]

# An element whose expression needs more operators than this is not a mask or a score: it is a network. (HF Llama's largest is ~30.)
MAX_OPERATORS = 2000

_INT_LIMIT = 1 << 31  # lengths stay below 2^31 tokens; the analyzer needs a finite bound


class TooComplexError(Exception):
    """The element depends on more than MAX_OPERATORS operators."""


class UnknownShapeError(Exception):
    """A tensor whose shape is needed and not known."""


@dataclass(frozen=True)
class Atom:
    """What an opaque scalar variable stands for.

    kind : "load" (element `index` of `source`, a parameter, constant or the result of an operator without closed form),
      "dot" (entry `index` of the matmul bound to `source`), "softmax" (element `index` of the softmax bound to `source`), or
      "reduce" (max / min over the axes `axes` of `operand`; `index` has one entry per axis of the operand, None at reduced ones).
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


def int_imm(value: int) -> Any:
    """An int64 literal, the type of every index."""
    return tirx.IntImm("int64", value)


def static_int(expr: Any) -> int | None:
    """The value of an integer literal, None for anything symbolic."""
    if isinstance(expr, int):
        return expr
    return int(expr.value) if isinstance(expr, tirx.IntImm) else None


def known_shape(expr: Any) -> tuple[Any, ...] | None:
    """Dimensions of a tensor expression, None where its shape is unknown."""
    ty = expr.ty
    if isinstance(ty, relax.TensorType) and isinstance(ty.shape, relax.ShapeExpr):
        return tuple(ty.shape.values)
    return None


def shape_of(expr: Any) -> tuple[Any, ...]:
    """Dimensions of a tensor expression; raises UnknownShapeError."""
    shape = known_shape(expr)
    if shape is None:
        raise UnknownShapeError(getattr(expr, "name", "tensor"))
    return shape


def dtype_of(expr: Any) -> str:
    """Element type of a tensor expression, as TVM prints it."""
    return str(expr.ty.dtype)


def op_name(expr: Any) -> str:
    """Name of the operator that a call applies ("relax.add"), "" for anything else."""
    if isinstance(expr, relax.Call) and isinstance(expr.op, ir.Op):
        return str(expr.op.name)
    return ""


def bindings_of(func: relax.Function) -> list[Any]:
    """All bindings of the function in program order; its body is a sequence of blocks."""
    return [binding for block in func.body.blocks for binding in block.bindings]


def used_vars(expr: Any) -> list[Any]:
    """Relax variables that an expression reads (shapes and types left out)."""
    if isinstance(expr, ir.Var):
        return [expr]
    if isinstance(expr, relax.Call):
        return [var for argument in expr.args for var in used_vars(argument)]
    if isinstance(expr, relax.Tuple):
        return [var for item in expr.fields for var in used_vars(item)]
    if isinstance(expr, relax.TupleGetItem):
        return used_vars(expr.tuple_value)
    if isinstance(expr, relax.If):
        return used_vars(expr.cond)
    return []


class Evaluator:
    """Evaluates elements of the tensors of one Relax function.

    Parameters
    ----------
    definitions : variable -> the expression that it is bound to.
    """

    def __init__(self, definitions: Mapping[Any, Any]) -> None:
        self.definitions = definitions
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
        value = self.definition(tensor)
        if isinstance(value, ir.GenericConst):
            return self._constant(tensor, value, index)
        if isinstance(value, relax.TupleGetItem):
            return self._tuple_item(tensor, value, index)
        name = op_name(value)
        if name in _ELEMENT_RULES:
            result = _ELEMENT_RULES[name](self, value, index)
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


# ---- scalars


def as_expr(value: Any) -> Any:
    """An index as a TVM expression."""
    return int_imm(value) if isinstance(value, int) else value


def literal(value: Any, dtype: str) -> Any:
    """A scalar literal of the given type."""
    if dtype == "bool":
        return tirx.IntImm("bool", int(value))
    if dtype.startswith(("int", "uint")):
        return tirx.IntImm(dtype, int(value))
    return tirx.FloatImm(dtype, float(value))


def closed_form(data: np.ndarray, dtype: str, index: Index) -> Any | None:
    """An element of a constant that is a causal mask (one value on and below the diagonal, one above) or a run of positions."""
    rows: Any = data.reshape(data.shape[-2:]) if data.ndim >= 2 and data.size == math.prod(data.shape[-2:]) else None
    if rows is not None and min(rows.shape) > 1:
        kept, masked = rows[0, 0], rows[0, -1]
        if (rows == np.where(np.tri(rows.shape[0], rows.shape[1]) > 0, kept, masked)).all():
            return tirx.Select(index[-1] <= index[-2], literal(kept.item(), dtype), literal(masked.item(), dtype))
    if data.ndim == 1 and data.size > 1 and dtype_class(dtype) == "int":
        step = data[1] - data[0]
        if (np.diff(data) == step).all():
            value = int_imm(int(data[0])) + index[0] * int_imm(int(step))
            return value if dtype == "int64" else tirx.Cast(dtype, value)
    return None


def same(a: Any, b: Any) -> bool:
    """Whether two nodes are one object."""
    return a is b or (hasattr(a, "same_as") and a.same_as(b))


def dtype_class(dtype: str) -> str:
    """ "bool", "int" or "float"."""
    if dtype == "bool":
        return "bool"
    return "int" if dtype.startswith(("int", "uint")) else "float"


def is_widening(source: str, target: str) -> bool:
    """Whether a cast between two floating types loses nothing."""
    wider = {"float16": {"float32", "float64"}, "bfloat16": {"float32", "float64"}, "float32": {"float64"}}
    return source == target or target in wider.get(source, set())


def constant_value(expr: Any) -> float | None:
    """The value of an expression of literals, None where a variable is left."""
    if isinstance(expr, tirx.IntImm | tirx.FloatImm):
        return float(expr.value)
    if isinstance(expr, tirx.Cast):
        return constant_value(expr.value)
    if isinstance(expr, tirx.Add | tirx.Sub | tirx.Mul | tirx.Div):
        a, b = constant_value(expr.a), constant_value(expr.b)
        if a is None or b is None or (isinstance(expr, tirx.Div) and b == 0.0):
            return None
        if isinstance(expr, tirx.Add):
            return a + b
        if isinstance(expr, tirx.Sub):
            return a - b
        return a * b if isinstance(expr, tirx.Mul) else a / b
    function = _call_name(expr)
    if function in _CONSTANT_CALLS:
        arguments = [constant_value(argument) for argument in expr.args]
        if all(argument is not None for argument in arguments):
            try:
                return float(_CONSTANT_CALLS[function](*arguments))
            except (ValueError, OverflowError, ZeroDivisionError):
                return None
    return None


def _call_name(expr: Any) -> str:
    """Short name of a scalar intrinsic ("sqrt"), "" for anything else."""
    if isinstance(expr, relax.Call) and isinstance(expr.op, ir.Op):
        return str(expr.op.name).rsplit(".", 1)[-1]
    return ""


_CONSTANT_CALLS: dict[str, Callable[..., float]] = {
    "sqrt": math.sqrt,
    "rsqrt": lambda x: 1.0 / math.sqrt(x),
    "exp": math.exp,
    "log": math.log,
    "pow": math.pow,
}


def free_vars(expr: Any) -> list[Any]:
    """Variables of an expression, in order of appearance."""
    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, ir.Var) and not any(same(node, known) for known in found):
            found.append(node)

    walk(as_expr(expr), visit)
    return found


def children(expr: Any) -> tuple[Any, ...]:
    """Operands of a scalar expression."""
    if isinstance(expr, tirx.Cast):
        return (expr.value,)
    if isinstance(expr, tirx.Select):
        return (expr.condition, expr.true_value, expr.false_value)
    if isinstance(expr, relax.Call):
        return tuple(expr.args)
    if isinstance(expr, tirx.Not):
        return (expr.a,)
    return (expr.a, expr.b) if hasattr(expr, "a") and hasattr(expr, "b") else ()


def walk(expr: Any, visit: Callable[[Any], None]) -> None:
    """Visit every node of a scalar expression."""
    visit(expr)
    for child in children(expr):
        walk(child, visit)


def substitute(expr: Any, values: Mapping[Any, Any]) -> Any:
    """Replace variables of a scalar expression."""

    def replace(node: Any) -> Any:
        if isinstance(node, ir.Var):
            for var, value in values.items():
                if same(var, node):
                    return value
        return node

    return tvm_ffi.structural_map(expr, replace)


# ---- data movement: (evaluator, call, index of the result) -> index of call.args[0], or None where the operator has no closed form


def broadcast_index(operand: Any, index: Index) -> Index:
    """Index into an operand that is broadcast to the rank and shape that `index` addresses."""
    shape = known_shape(operand)
    if shape is None:
        return index
    tail = index[len(index) - len(shape) :]
    return tuple(int_imm(0) if static_int(dim) == 1 else i for dim, i in zip(shape, tail, strict=True))


def _permute(ev: Evaluator, call: Any, index: Index) -> Index | None:
    axes = call.attrs.axes
    order = [int(axis) % len(index) for axis in axes] if axes is not None else list(range(len(index)))[::-1]
    source: list[Any] = [None] * len(index)
    for position, axis in enumerate(order):
        source[axis] = index[position]
    return tuple(source)


def _reshape(ev: Evaluator, call: Any, index: Index) -> Index | None:
    return reshape_index(ev, known_shape(call.args[0]), known_shape(call), index)


def _expand_dims(ev: Evaluator, call: Any, index: Index) -> Index | None:
    new = {int(axis) % len(index) for axis in call.attrs.axis}
    return tuple(i for position, i in enumerate(index) if position not in new)


def _squeeze(ev: Evaluator, call: Any, index: Index) -> Index | None:
    shape = known_shape(call.args[0])
    if shape is None:
        return None
    if call.attrs.axis is None:
        gone = {axis for axis, dim in enumerate(shape) if static_int(dim) == 1}
    else:
        gone = {int(axis) % len(shape) for axis in call.attrs.axis}
    remaining = iter(index)
    return tuple(int_imm(0) if axis in gone else next(remaining) for axis in range(len(shape)))


def _broadcast_to(ev: Evaluator, call: Any, index: Index) -> Index | None:
    return None if known_shape(call.args[0]) is None else broadcast_index(call.args[0], index)


def _strided_slice(ev: Evaluator, call: Any, index: Index) -> Index | None:
    shape = known_shape(call.args[0])
    fields = [argument.fields for argument in call.args[1:]]
    if shape is None or len(fields) < 2:
        return None
    strides = fields[3] if len(fields) > 3 else [int_imm(1)] * len(fields[0])
    source = list(index)
    for axis_expr, begin_expr, stride_expr in zip(fields[0], fields[1], strides, strict=True):
        axis, begin, stride = static_int(axis_expr), static_int(begin_expr), static_int(stride_expr)
        if axis is None or begin is None or stride is None or stride < 1:
            return None
        extent = static_int(shape[axis])
        if begin < 0:
            if extent is None:
                return None
            begin = max(begin + extent, 0)
        source[axis] = ev.simplify(source[axis] * int_imm(stride) + int_imm(begin))
    return tuple(source)


def _repeat(ev: Evaluator, call: Any, index: Index) -> Index | None:
    if call.attrs.axis is None:
        return None
    axis, repeats = int(call.attrs.axis) % len(index), int(call.attrs.repeats)
    source = list(index)
    source[axis] = ev.simplify(tirx.floordiv(source[axis], int_imm(repeats)))
    return tuple(source)


def _take(ev: Evaluator, call: Any, index: Index) -> Index | None:
    """take(x, where, axis): `where` is a number or a tensor, whose axes take the place of `axis`."""
    shape = known_shape(call.args[0])
    if shape is None or call.attrs.axis is None:
        return None
    axis, where = int(call.attrs.axis) % len(shape), call.args[1]
    number = static_int(ev.definition(where))
    if number is not None:
        return (*index[:axis], int_imm(number), *index[axis:])
    rank = len(known_shape(where) or ())
    position = _position(ev, where, index[axis : axis + rank], shape[axis])
    return None if position is None else (*index[:axis], position, *index[axis + rank :])


def _index_tensor(ev: Evaluator, call: Any, index: Index) -> Index | None:
    """x[a, b, …] with index tensors that are broadcast to one shape, for the leading axes of x."""
    shape, indices = known_shape(call.args[0]), ev.definition(call.args[1])
    if shape is None or not isinstance(indices, relax.Tuple):
        return None
    count = len(indices.fields)
    split = len(index) - (len(shape) - count)  # result axes that come from the index tensors
    positions = [
        _position(ev, where, broadcast_index(where, index[:split]), dim)
        for where, dim in zip(indices.fields, shape, strict=False)
    ]
    if any(position is None for position in positions):
        return None
    return (*positions, *index[split:])


def _position(ev: Evaluator, where: Any, index: Index, extent: Any) -> Any | None:
    """An element of an index tensor as an index along an axis; None where it depends on data."""
    value = ev._element(where, index)
    while isinstance(value, tirx.Cast):
        value = value.value
    if dtype_class(str(value.ty)) != "int" or any(var in ev.atoms for var in free_vars(value)):
        return None
    if str(value.ty) != "int64":
        value = tirx.Cast("int64", value)
    value = ev.simplify(value)
    number = static_int(value)
    if number is not None and number < 0:
        length = static_int(extent)
        return None if length is None else int_imm(number + length)
    return value


def split_view(ev: Evaluator, call: Any, output: int, index: Index) -> Index | None:
    """Index into the operand of `split` for element `index` of its `output`-th piece."""
    if op_name(call) != "relax.split":
        return None
    shape = known_shape(call.args[0])
    if shape is None:
        return None
    axis = int(call.attrs.axis) % len(shape)
    sections = call.attrs.indices_or_sections
    extent = static_int(shape[axis])
    if isinstance(sections, int | tirx.IntImm):
        count = int(sections)
        if extent is None or extent % count:
            return None
        begin = output * (extent // count)
    else:
        begin = 0 if output == 0 else int(sections[output - 1])
    source = list(index)
    source[axis] = ev.simplify(source[axis] + int_imm(begin))
    return tuple(source)


VIEW_RULES: dict[str, Callable[[Evaluator, Any, Index], Index | None]] = {
    "relax.permute_dims": _permute,
    "relax.reshape": _reshape,
    "relax.expand_dims": _expand_dims,
    "relax.squeeze": _squeeze,
    "relax.broadcast_to": _broadcast_to,
    "relax.strided_slice": _strided_slice,
    "relax.repeat": _repeat,
    "relax.take": _take,
    "relax.index_tensor": _index_tensor,
}


@dataclass
class _Product:
    """A product of dimensions: an integer times symbolic factors. Two dimensions lists are compared by it."""

    number: int
    symbols: Counter[str]

    @staticmethod
    def one() -> _Product:
        return _Product(1, Counter())

    def times(self, dim: Any) -> _Product:
        result = _Product(self.number, self.symbols.copy())
        stack = [dim]
        while stack:
            factor = stack.pop()
            if isinstance(factor, tirx.Mul):
                stack += [factor.a, factor.b]
            elif (number := static_int(factor)) is not None:
                result.number *= number
            else:
                result.symbols[str(factor)] += 1
        return result

    def weight(self) -> tuple[int, int]:
        return (sum(self.symbols.values()), self.number)


def reshape_index(ev: Evaluator, source: Any, target: Any, index: Index) -> Index | None:
    """Index into `source` of element `index` of its reshape to `target`.

    The shapes are cut into the shortest runs of dimensions with equal products, so that a symbolic length that stands alone on both
    sides never enters a division: `(x * n + i) // n` does not simplify.
    """
    if source is None or target is None:
        return None
    inputs = [(axis, dim) for axis, dim in enumerate(source) if static_int(dim) != 1]
    outputs = [(axis, dim) for axis, dim in enumerate(target) if static_int(dim) != 1]
    result: list[Any] = [int_imm(0)] * len(source)
    a = b = 0
    while a < len(inputs) or b < len(outputs):
        begin_a, begin_b = a, b
        product_a, product_b = _Product.one(), _Product.one()
        while a == begin_a or product_a != product_b:
            extend_a = a < len(inputs) and (b == len(outputs) or product_a.weight() <= product_b.weight())
            if extend_a:
                product_a, a = product_a.times(inputs[a][1]), a + 1
            elif b < len(outputs):
                product_b, b = product_b.times(outputs[b][1]), b + 1
            else:
                return None
        _reshape_run(ev, inputs[begin_a:a], outputs[begin_b:b], index, result)
    return tuple(result)


def _reshape_run(ev: Evaluator, inputs: list[Any], outputs: list[Any], index: Index, result: list[Any]) -> None:
    """Fill `result` for one run of input axes that covers one run of output axes."""
    if len(inputs) == 1 and len(outputs) == 1:
        result[inputs[0][0]] = index[outputs[0][0]]
        return
    flat = int_imm(0)
    for axis, dim in outputs:
        flat = flat * dim + index[axis]
    flat = ev.simplify(flat)
    stride = int_imm(1)
    for position, (axis, dim) in enumerate(reversed(inputs)):
        quotient = tirx.floordiv(flat, stride)
        is_leading = position == len(inputs) - 1
        result[axis] = ev.simplify(quotient if is_leading else tirx.floormod(quotient, dim))
        stride = ev.simplify(stride * dim)


# ---- operators with a value: (evaluator, call, index) -> scalar expression, or None


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[Evaluator, Any, Index], Any]:
    def rule(ev: Evaluator, call: Any, index: Index) -> Any:
        a = ev._element(call.args[0], broadcast_index(call.args[0], index))
        b = ev._element(call.args[1], broadcast_index(call.args[1], index))
        return function(a, b)

    return rule


def _unary(function: Callable[[Any], Any]) -> Callable[[Evaluator, Any, Index], Any]:
    return lambda ev, call, index: function(ev._element(call.args[0], index))


def _logical(for_bool: Callable[..., Any]) -> Callable[..., Any]:
    """Bitwise operators on booleans are the logical ones; on integers they have no use here."""

    def apply(*operands: Any) -> Any:
        return for_bool(*operands) if all(str(x.ty) == "bool" for x in operands) else None

    return apply


def _divide(a: Any, b: Any) -> Any:
    return tirx.Div(a, b) if dtype_class(str(a.ty)) == "float" else None


def _where(ev: Evaluator, call: Any, index: Index) -> Any:
    parts = [ev._element(argument, broadcast_index(argument, index)) for argument in call.args]
    return tirx.Select(*parts)


def _astype(ev: Evaluator, call: Any, index: Index) -> Any:
    value = ev._element(call.args[0], index)
    dtype = dtype_of(call)
    if str(value.ty) == dtype:
        return value
    if dtype == "bool":
        return tirx.NE(value, literal(0, str(value.ty)))
    return tirx.Cast(dtype, value)


def _full(ev: Evaluator, call: Any, index: Index) -> Any:
    fill = call.args[1]
    value = ev._element(fill, tuple(int_imm(0) for _ in known_shape(fill) or ()))
    dtype = dtype_of(call)
    return value if str(value.ty) == dtype else tirx.Cast(dtype, value)


def _filled(number: int) -> Callable[[Evaluator, Any, Index], Any]:
    return lambda ev, call, index: literal(number, dtype_of(call))


def _arange(ev: Evaluator, call: Any, index: Index) -> Any:
    if len(call.args) < 3 or any(dtype_class(str(argument.ty)) != "int" for argument in call.args[:3]):
        return None
    start, _, step = (tirx.Cast("int64", x) if str(x.ty) != "int64" else x for x in call.args[:3])
    value = ev.simplify(start + index[0] * step)
    dtype = dtype_of(call)
    return value if dtype == "int64" else tirx.Cast(dtype, value)


def _triangle(keep_upper: bool) -> Callable[[Evaluator, Any, Index], Any]:
    def rule(ev: Evaluator, call: Any, index: Index) -> Any:
        row, column = index[-2], index[-1]
        diagonal = as_expr(call.args[1])
        if str(diagonal.ty) != "int64":
            diagonal = tirx.Cast("int64", diagonal)
        keep = tirx.GE(column - row, diagonal) if keep_upper else tirx.LE(column - row, diagonal)
        value = ev._element(call.args[0], index)
        return tirx.Select(ev.simplify(keep), value, literal(0, str(value.ty)))

    return rule


def _concat(ev: Evaluator, call: Any, index: Index) -> Any:
    parts = ev.definition(call.args[0])
    if not isinstance(parts, relax.Tuple):
        return None
    axis = int(call.attrs.axis) % len(index)
    offset: Any = int_imm(0)
    pieces: list[tuple[Any, Any]] = []  # (end of the piece along the axis, its element)
    for part in parts.fields:
        shape = known_shape(part)
        if shape is None:
            return None
        source = list(index)
        source[axis] = ev.simplify(index[axis] - offset)
        offset = ev.simplify(offset + shape[axis])
        pieces.append((offset, ev._element(part, tuple(source))))
    result = pieces[-1][1]
    for end, value in reversed(pieces[:-1]):
        result = tirx.Select(tirx.LT(index[axis], end), value, result)
    return result


def _clip(ev: Evaluator, call: Any, index: Index) -> Any:
    value = ev._element(call.args[0], index)
    low, high = (constant_value(argument) for argument in call.args[1:3])
    if low is None or high is None:
        return None
    dtype = str(value.ty)
    return tirx.Min(tirx.Max(value, literal(low, dtype)), literal(high, dtype))


_ELEMENT_RULES: dict[str, Callable[[Evaluator, Any, Index], Any]] = {
    "relax.add": _binary(tirx.Add),
    "relax.subtract": _binary(tirx.Sub),
    "relax.multiply": _binary(tirx.Mul),
    "relax.divide": _binary(_divide),
    "relax.maximum": _binary(tirx.Max),
    "relax.minimum": _binary(tirx.Min),
    "relax.power": _binary(lambda a, b: tirx.power(a, b) if dtype_class(str(a.ty)) == "float" else None),
    "relax.less": _binary(tirx.LT),
    "relax.less_equal": _binary(tirx.LE),
    "relax.greater": _binary(tirx.GT),
    "relax.greater_equal": _binary(tirx.GE),
    "relax.equal": _binary(tirx.EQ),
    "relax.not_equal": _binary(tirx.NE),
    "relax.logical_and": _binary(_logical(tirx.And)),
    "relax.logical_or": _binary(_logical(tirx.Or)),
    "relax.bitwise_and": _binary(_logical(tirx.And)),
    "relax.bitwise_or": _binary(_logical(tirx.Or)),
    "relax.logical_not": _unary(_logical(tirx.Not)),
    "relax.bitwise_not": _unary(_logical(tirx.Not)),
    "relax.negative": _unary(lambda a: tirx.Mul(a, literal(-1, str(a.ty)))),
    "relax.abs": _unary(tirx.abs),
    "relax.exp": _unary(tirx.exp),
    "relax.log": _unary(tirx.log),
    "relax.sqrt": _unary(tirx.sqrt),
    "relax.rsqrt": _unary(tirx.rsqrt),
    "relax.tanh": _unary(tirx.tanh),
    "relax.sigmoid": _unary(tirx.sigmoid),
    "relax.floor": _unary(tirx.floor),
    "relax.where": _where,
    "relax.astype": _astype,
    "relax.full": _full,
    "relax.full_like": _full,
    "relax.zeros": _filled(0),
    "relax.zeros_like": _filled(0),
    "relax.ones": _filled(1),
    "relax.ones_like": _filled(1),
    "relax.arange": _arange,
    "relax.triu": _triangle(keep_upper=True),
    "relax.tril": _triangle(keep_upper=False),
    "relax.concat": _concat,
    "relax.clip": _clip,
}
