"""FuseRMSNorm: a root-mean-square norm that is written out in primitives becomes one operator, `R.nn.rms_norm`.

torch.export writes Llama's norm as seven operators. TVM's fusion makes two kernels of them (it does not fuse past a reduction), both of
which read x: a decode step of 30 layers launches 122 kernels for 61 norms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import ir, relax

from .nodes import bindings_of, dtype_of, is_widening, known_shape, op_name, same, shape_of, static_int
from .printer import format_expr
from .report import Location, Reason

_MEAN, _ADD, _MULTIPLY, _DIVIDE = "relax.mean", "relax.add", "relax.multiply", "relax.divide"
_SQRT, _RSQRT, _POWER, _SQUARE, _CAST = "relax.sqrt", "relax.rsqrt", "relax.power", "relax.square", "relax.astype"
_TYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class FusedNorm:
    """One norm over the last axis of x [.., width].

    location : of its result; dtype : of x, weight and result; weight : name of the tensor [width].
    """

    location: Location
    width: str
    epsilon: float
    dtype: str
    weight: str


@dataclass
class NormReport:
    """What one run of FuseRMSNorm did, over all functions."""

    fused: list[FusedNorm] = field(default_factory=list)
    left: list[Reason] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} RMSNorm(s) to nn.rms_norm, {len(self.left)} left as written"]
        kinds: dict[tuple[str, str, float], int] = {}
        for norm in self.fused:
            key = (norm.width, norm.dtype, norm.epsilon)
            kinds[key] = kinds.get(key, 0) + 1
        lines += [f"  {n:4d} x  [.., {width}] {dtype}, epsilon {eps:.3g}" for (width, dtype, eps), n in kinds.items()]
        lines += [f"left as written: {reason}" for reason in self.left]
        return "\n".join(lines)


class FuseRMSNorm:
    """Replace `x * rsqrt(mean(x^2, -1) + epsilon) * weight` by `R.nn.rms_norm(x, weight, axes=[-1], epsilon=epsilon)`.

    x [.., width] and weight [width] have one floating type, or float32 after a cast. The square may be a power, a product or R.square,
    the root rsqrt, 1 / sqrt or a division by sqrt, the factors in either order. The arithmetic is float32, with casts before it and
    before or after the weight. A match is proven: the mean is over the last axis alone, epsilon a positive constant, what is scaled is
    what was squared, and nothing else reads what lies between. Any other mean of a square stays, with the reason in the report.

    Rounding: R.nn.rms_norm computes in float32 and rounds once, at the end. Hugging Face's norm rounds a 16-bit result before it
    multiplies with the weight and again after it, so results differ from it in the last bit and are nearer to the exact value.

    Attributes
    ----------
    report : NormReport of the last call.
    """

    def __init__(self) -> None:
        self.report = NormReport()

    def __call__(self, mod: tvm.IRModule) -> tvm.IRModule:
        """The rewritten module; `mod` is unchanged."""
        self.report = NormReport()
        updated = mod.clone()
        for var, func in mod.functions_items():
            if isinstance(func, relax.Function) and isinstance(func.body, relax.SeqExpr):
                updated.update_func(var, self._rewrite(str(var.name_hint), func))
        return relax.transform.DeadCodeElimination()(updated) if self.report.fused else mod

    def _rewrite(self, name: str, func: Any) -> Any:
        values = _Values(func)
        norms: dict[Any, Any] = {}
        for var, value in values.definitions.items():
            if op_name(value) != _MEAN or values.squared(value.args[0]) is None:
                continue
            location = Location(name, str(var.name), _MEAN)
            try:
                norm = _match(values, var)
            except _LeftError as left:
                self.report.left.append(Reason(location, left.seen, left.why, left.fix))
                continue
            norms[norm.result] = relax.op.nn.rms_norm(norm.data, norm.weight, axes=[-1], epsilon=norm.epsilon)
            fused = Location(name, str(norm.result.name), op_name(values.definitions[norm.result]))
            width = format_expr(shape_of(norm.data)[-1])
            self.report.fused.append(FusedNorm(fused, width, norm.epsilon, dtype_of(norm.data), _name(norm.weight)))
        return _with_values(func, norms) if norms else func


def _with_values(func: Any, values: Mapping[Any, Any]) -> Any:
    """The function with other values bound to some of its variables."""
    builder = relax.BlockBuilder()
    blocks = []
    for block in func.body.blocks:
        bindings = []
        for binding in block.bindings:
            if binding.var in values:
                binding = relax.VarBinding(binding.var, builder.normalize(values[binding.var]))
            bindings.append(binding)
        is_dataflow = isinstance(block, relax.DataflowBlock)
        blocks.append(relax.DataflowBlock(bindings) if is_dataflow else relax.BindingBlock(bindings))
    body = relax.SeqExpr(blocks, func.body.body)
    return relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs, func.span)


@dataclass(frozen=True)
class _Norm:
    """result : the variable that the norm of data [.., width] with weight [width] is bound to."""

    result: Any
    data: Any
    weight: Any
    epsilon: float


class _LeftError(Exception):
    """A mean of a square that is no norm we replace."""

    def __init__(self, seen: str, why: str, fix: str) -> None:
        super().__init__(why)
        self.seen, self.why, self.fix = seen, why, fix


class _Values:
    """A function's variables: what they are, and who reads them."""

    def __init__(self, func: Any) -> None:
        self.definitions = {binding.var: binding.value for binding in bindings_of(func)}
        self.readers: dict[Any, list[Any]] = {}  # a variable -> those computed from it; None for the function's result
        for binding in bindings_of(func):
            self._read(binding.value, binding.var)
        self._read(func.body.body, None)

    def _read(self, expr: Any, reader: Any) -> None:
        read: list[Any] = []  # branches of an If included

        def visit(node: Any) -> None:
            if isinstance(node, ir.Var) and not any(same(node, var) for var in read):
                read.append(node)

        relax.analysis.post_order_visit(expr, visit)
        for var in read:
            self.readers.setdefault(var, []).append(reader)

    def definition(self, x: Any) -> Any:
        """The expression that a variable is bound to; None for parameters and constants."""
        return self.definitions.get(x) if isinstance(x, ir.Var) else None

    def only_reader(self, var: Any) -> Any:
        """The one variable computed from `var`. Another reader would keep what leads up to it alive beside the norm."""
        readers = self.readers.get(var, [])
        if len(readers) == 1 and readers[0] is not None:
            return readers[0]
        names = ["the function's result" if reader is None else _name(reader) for reader in readers]
        raise _LeftError(
            _describe(var),
            f"{_name(var)} lies inside the norm and is read by {', '.join(names) or 'nothing'}; only the norm may read it",
            "compute the other value from the norm's input or result",
        )

    def squared(self, x: Any) -> Any:
        """What x is the square of, None if it is none."""
        value = self.definition(x)
        name = op_name(value)
        if name == _SQUARE or (name == _POWER and _number(value.args[1]) == 2):
            return value.args[0]
        return value.args[0] if name == _MULTIPLY and same(*value.args) else None

    def before_widening(self, x: Any) -> Any:
        """The tensor that x holds in a wider type, or x. Never one that is local to a block which x has left."""
        value = self.definition(x)
        if op_name(value) != _CAST or not is_widening(dtype_of(value.args[0]), dtype_of(x)):
            return x
        source = value.args[0]
        return x if isinstance(source, relax.DataflowVar) and not isinstance(x, relax.DataflowVar) else source


def _match(values: _Values, mean: Any) -> _Norm:
    """The norm that has this mean of a square inside; raises _LeftError."""
    wide = _check_mean(values, mean)
    shifted = values.only_reader(mean)
    epsilon = _epsilon(values, mean, shifted)
    result = _scaled(values, shifted, wide)
    while op_name(values.definition(values.only_reader(result))) == _CAST:
        result = _floating_cast(values, result)
    return _weighted(values, wide, result, epsilon)


def _check_mean(values: _Values, mean: Any) -> Any:
    """What is squared: float32, its mean taken over the last axis, which stays with extent 1."""
    value = values.definitions[mean]
    wide = values.squared(value.args[0])
    shape = known_shape(wide)
    if shape is None:
        raise _LeftError(_name(wide), "the shape of what is normalised is not known", "give it one with R.match_cast")
    if len(shape) == 1:
        raise _LeftError(
            _describe(wide), "it is a vector, of which TVM cannot lower nn.rms_norm", "give it a row dimension"
        )
    axes = value.attrs.axis
    last = len(shape) - 1
    if axes is None or [int(axis) % len(shape) for axis in axes] != [last]:
        over = "all axes" if axes is None else f"axes {[int(axis) for axis in axes]}"
        raise _LeftError(
            _describe(wide),
            f"its mean is over {over}; a norm's is over the last ({last}) alone",
            "normalise the last axis",
        )
    if not value.attrs.keepdims:
        raise _LeftError(_describe(wide), "its mean drops the axis", "pass keepdims=True")
    if dtype_of(wide) != "float32":
        raise _LeftError(
            _describe(wide), f"it squares {dtype_of(wide)}; nn.rms_norm computes in float32", "cast to float32 before"
        )
    values.only_reader(value.args[0])
    return wide


def _epsilon(values: _Values, mean: Any, shifted: Any) -> float:
    value = values.definition(shifted)
    if op_name(value) != _ADD:
        raise _LeftError(
            _describe(shifted),
            f"{_operator(value)} follows the mean of squares; a norm adds epsilon",
            "add a positive epsilon",
        )
    constant = value.args[1] if same(value.args[0], mean) else value.args[0]
    epsilon = _number(constant)
    if epsilon is None:
        raise _LeftError(
            _describe(constant), "epsilon is not a constant scalar", "make epsilon a number of the model, not an input"
        )
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise _LeftError(
            f"epsilon {epsilon}", f"epsilon is {epsilon}; it must be positive and finite", "pass a positive epsilon"
        )
    return epsilon


def _scaled(values: _Values, shifted: Any, wide: Any) -> Any:
    """The variable that holds x / sqrt(shifted)."""
    root = values.only_reader(shifted)
    name = op_name(values.definition(root))
    if name == _SQRT:
        inverse = values.only_reader(root)
        value = values.definition(inverse)
        if op_name(value) == _DIVIDE and same(value.args[1], root):
            if _number(value.args[0]) != 1:
                _check_same_input(values, value.args[0], wide)
                return inverse
            name, root = _RSQRT, inverse
    if name != _RSQRT:
        raise _LeftError(
            _describe(root),
            f"{_operator(values.definition(root))} follows the mean of squares; a norm divides by its root",
            "use rsqrt",
        )
    scaled = values.only_reader(root)
    value = values.definition(scaled)
    if op_name(value) != _MULTIPLY:
        raise _LeftError(
            _describe(scaled), f"{_operator(value)} follows the root; a norm multiplies by it", "multiply x by it"
        )
    _check_same_input(values, value.args[0] if same(value.args[1], root) else value.args[1], wide)
    return scaled


def _check_same_input(values: _Values, x: Any, wide: Any) -> None:
    if dtype_of(x) != "float32" or not same(values.before_widening(x), values.before_widening(wide)):
        raise _LeftError(
            f"{_describe(x)}, {_describe(wide)}",
            f"{_name(x)} is scaled, {_name(wide)} was squared; a norm scales what it squared",
            "scale the tensor whose squares are averaged",
        )


def _floating_cast(values: _Values, x: Any) -> Any:
    cast = values.only_reader(x)
    if dtype_of(cast) not in _TYPES:
        raise _LeftError(
            _describe(cast),
            f"it is cast to {dtype_of(cast)} before its weight, and that rounding would be lost",
            "cast after the weight",
        )
    return cast


def _weighted(values: _Values, wide: Any, scaled: Any, epsilon: float) -> _Norm:
    """The norm whose x / root is `scaled`: its weight, and the type that all of it has."""
    result = values.only_reader(scaled)
    value = values.definition(result)
    width = shape_of(wide)[-1]
    if op_name(value) != _MULTIPLY or same(*value.args):
        raise _LeftError(
            _describe(result),
            f"{_operator(value)} follows the norm where nn.rms_norm has a product with a weight",
            "give the norm a weight of ones, if it has none",
        )
    weight = value.args[1] if same(value.args[0], scaled) else value.args[0]
    shape = known_shape(weight)
    if shape is None or len(shape) != 1 or not _equal(shape[0], width):
        raise _LeftError(
            _describe(weight),
            f"the weight must be a vector [{format_expr(width)}]",
            "store one weight for each element of the last axis",
        )
    inputs, weights = (wide, values.before_widening(wide)), (weight, values.before_widening(weight))
    for last in _results(values, result):
        dtype = dtype_of(last)
        data = next((x for x in inputs if dtype_of(x) == dtype), None)
        scale = next((w for w in weights if dtype_of(w) == dtype), None)
        if data is not None and scale is not None:
            return _Norm(last, data, scale, epsilon)
    raise _LeftError(
        f"{_describe(inputs[1])}, {_describe(weights[1])}, {_describe(result)}",
        "input, weight and result have different types; nn.rms_norm has one",
        "cast the weight to the type of the input",
    )


def _results(values: _Values, product: Any) -> list[Any]:
    """Where the norm may end, farthest first: after a cast that is all that reads the product, or at the product."""
    readers = values.readers.get(product, [])
    if len(readers) == 1 and op_name(values.definition(readers[0])) == _CAST:
        return [readers[0], product]
    return [product]


def _number(x: Any) -> float | None:
    """The value of a constant with one element, else None."""
    if not isinstance(x, ir.GenericConst):
        return None
    data = x.value.numpy()
    return float(np.asarray(data, "float64").reshape(())) if data.ndim == 0 else None


def _equal(a: Any, b: Any) -> bool:
    left, right = static_int(a), static_int(b)
    return same(a, b) if left is None or right is None else left == right


def _operator(value: Any) -> str:
    return op_name(value).removeprefix("relax.") or type(value).__name__


def _name(x: Any) -> str:
    return str(x.name) if hasattr(x, "name") else "a constant"


def _describe(x: Any) -> str:
    if not isinstance(x.ty, relax.TensorType):
        return _name(x)
    shape = known_shape(x)
    dims = "unknown shape" if shape is None else ", ".join(format_expr(dim) for dim in shape)
    return f"{_name(x)} [{dims}] {dtype_of(x)}"
