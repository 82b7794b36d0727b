"""Data movement as index arithmetic: which element of its operand an element of the result is.

A rule takes (evaluator, call, index of the result) and gives the index of `call.args[0]`, None where it has no closed form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm import ir, relax, sym, tirx

from .nodes import Index, dtype_class, int_imm, known_shape, op_name, static_int
from .scalars import free_vars

if TYPE_CHECKING:
    from .symbolic import Evaluator


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
        is_leading = position == len(inputs) - 1
        quotient = _divided(ev, flat, stride)[0]
        result[axis] = quotient if is_leading else _divided(ev, quotient, dim)[1]
        stride = ev.simplify(stride * dim)


def _divided(ev: Evaluator, number: Any, divisor: Any) -> tuple[Any, Any]:
    """(number // divisor, number % divisor). `a * n + b` is taken apart here where b is within n: the analyzer divides by constants."""
    if isinstance(divisor, ir.Var):
        linear = sym.detect_linear_equation(ev.simplify(number), [divisor])
        if len(linear) == 2:
            rest = ev.simplify(linear[1])
            if ev.analyzer.can_prove(tirx.And(rest >= 0, rest < divisor)):
                return ev.simplify(linear[0]), rest
    return ev.simplify(tirx.floordiv(number, divisor)), ev.simplify(tirx.floormod(number, divisor))
