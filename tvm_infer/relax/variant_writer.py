"""From a scalar expression of (head, query, key) to an expression of an attention variant, with the parameters that it reads.

Positions become q_pos and kv_pos, elements of weights and constants become parameters. What has no counterpart there is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import ir, relax, tirx

from tvm_infer.errors import VariantError
from tvm_infer.variant import functions
from tvm_infer.variant.expression import Expr, lift, to_float, to_int
from tvm_infer.variant.layer import Constant, Value, Weight
from tvm_infer.variant.parameters import MAX_RANK, TABLE_KINDS, Parameter, per_head, scalar, tensor
from tvm_infer.variant.table import Table
from tvm_infer.variant.trace import variable

from .nodes import known_shape, same, static_int
from .printer import format_expr
from .prove import Refusal, input_refusal
from .scalars import constant_value, free_vars
from .symbolic import Atom, Evaluator
from .terms import factors, is_float, terms

KEEP_VARIANT = (
    'keep this attention with on_unmatched="keep", or export the model without it and give the cache a variant of your own '
    "(PagedKVCache.set_variant)"
)
MAX_CONSTANT_BYTES = 1 << 20  # of an array that goes into the manifest
_MAX_MULTIPLE = 1024  # of a position: sequences are shorter than 2^21 tokens
_SAME_FACTOR = 1e-6  # products of float32 constants differ by so much
_CALLS: dict[str, Callable[..., Expr]] = {
    "tanh": functions.tanh,
    "exp": functions.exp,
    "exp2": functions.exp2,
    "log": functions.log,
    "log2": functions.log2,
    "sigmoid": functions.sigmoid,
    "cos": functions.cos,
    "sin": functions.sin,
    "sqrt": functions.sqrt,
    "rsqrt": lambda x: 1.0 / functions.sqrt(x),
    "fabs": functions.absolute,
    "abs": functions.absolute,
}
_COMPARE: dict[type, Callable[[Any, Any], Expr]] = {
    tirx.LT: lambda a, b: a < b,
    tirx.LE: lambda a, b: a <= b,
    tirx.GT: lambda a, b: a > b,
    tirx.GE: lambda a, b: a >= b,
    tirx.EQ: lambda a, b: a == b,
    tirx.NE: lambda a, b: a != b,
}
_ARITHMETIC: dict[type, Callable[[Any, Any], Expr]] = {
    tirx.Add: lambda a, b: a + b,
    tirx.Sub: lambda a, b: a - b,
    tirx.Mul: lambda a, b: a * b,
    tirx.Div: lambda a, b: a / b,
    tirx.Max: functions.maximum,
    tirx.Min: functions.minimum,
}


class VariantWriter:
    """Writes the expressions of one variant.

    Parameters
    ----------
    h, i, j : index variables of heads, queries and keys; heads : query heads. score : the atom that is q . k; scale : of `value`,
        which is scale * score. inputs : parameters of the function that change with every call. seen : for refusals.

    Attributes
    ----------
    parameters, values : of the variant so far. assumptions : about positions and tables.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        h: Any,
        i: Any,
        j: Any,
        heads: int,
        score: Any,
        scale: float,
        inputs: Sequence[Any],
        seen: str,
    ) -> None:
        self._evaluator = evaluator
        self._indices = [(h, "qo_head"), (i, "q_pos"), (j, "kv_pos")]
        self._h, self._heads, self._score, self._scale = h, heads, score, scale
        self._inputs = inputs
        self._seen = seen
        self._variables: dict[str, Expr] = {}
        self._tables: dict[str, Table] = {}
        self._names: dict[Any, str] = {}  # what a parameter is made of -> its name
        self.parameters: dict[str, Parameter] = {}
        self.values: dict[str, Value] = {}
        self.assumptions: list[str] = []
        self.role = "bias"  # what parameters that come are called

    # ---- leaves

    def name(self, name: str) -> Expr:
        """A variable of variants: "value", "lse", "q_pos", …"""
        if name not in self._variables:
            self._variables[name] = variable(name, "float32" if name in ("value", "lse") else "int32")
        return self._variables[name]

    def number(self, role: str, number: float) -> Expr:
        """A scalar parameter."""
        name = self._declare(("number", role, number), scalar(), number, role)
        if name not in self._variables:
            self._variables[name] = variable(name, "float32")
        return self._variables[name]

    def _declare(self, key: Any, parameter: Parameter, value: Value, role: str) -> str:
        if key not in self._names:
            count = sum(name.rstrip("0123456789_") == role for name in self.parameters)
            self._names[key] = name = role if count == 0 else f"{role}_{count + 1}"
            self.parameters[name], self.values[name] = parameter, value
        return self._names[key]

    def refuse(self, expr: Any, why: str, fix: str = KEEP_VARIANT) -> Refusal:
        """The refusal of a part of the expression."""
        return Refusal(self._seen, f"`{format_expr(expr, self._evaluator)}` {why}", fix)

    # ---- expressions

    def floating(self, expr: Any) -> Expr:
        """An expression of a floating type, as float32."""
        parts = terms(expr)
        return self.sum([self.term(factor, part) for factor, part in parts])

    def sum(self, parts: Sequence[Expr]) -> Expr:
        """Expressions added up in order; 0 of none."""
        if not parts:
            return lift(0.0)
        result = parts[0]
        for part in parts[1:]:
            result = result + part
        return result

    def term(self, factor: float, part: Any) -> Expr:
        """factor * part; factor alone where the part is None."""
        return lift(factor) if part is None else self._product(part, factor)

    def times(self, factor: float, x: Expr) -> Expr:
        """factor * x, for factors near 1 and -1 without a product."""
        if abs(factor - 1.0) < _SAME_FACTOR:
            return x
        return -x if abs(factor + 1.0) < _SAME_FACTOR else factor * x

    def _is_score(self, expr: Any) -> bool:
        return isinstance(expr, ir.Var) and same(expr, self._score)

    def _product(self, expr: Any, factor: float = 1.0) -> Expr:
        """factor times a term that is no sum."""
        constant, parts = factors(expr)
        factor *= constant
        result: Expr | None = None
        for part in parts:
            if self._is_score(part):
                factor /= self._scale
                written = self.name("value")
            else:
                written = self._float_atom(part) if len(parts) == 1 else self.floating(part)
            result = written if result is None else result * written
        assert result is not None, "a product of something"
        return self.times(factor, result)

    def _float_atom(self, expr: Any) -> Expr:
        if isinstance(expr, ir.Var):
            return to_float(self._variable(expr))
        if isinstance(expr, tirx.Cast):
            return to_float(self.condition(expr.value) if str(expr.value.ty) == "bool" else self.number_of(expr.value))
        if isinstance(expr, tirx.Select):
            return functions.where(
                self.condition(expr.condition), self.floating(expr.true_value), self.floating(expr.false_value)
            )
        if type(expr) in _ARITHMETIC:
            return _ARITHMETIC[type(expr)](self.floating(expr.a), self.floating(expr.b))
        if isinstance(expr, relax.Call) and isinstance(expr.op, ir.Op):
            return self._call(expr)
        raise self.refuse(expr, "has no counterpart in an attention variant")

    def _call(self, expr: Any) -> Expr:
        name = str(expr.op.name).rsplit(".", 1)[-1]
        if name in _CALLS:
            return _CALLS[name](self.floating(expr.args[0]))
        power = constant_value(expr.args[1]) if name == "pow" else None
        if power is not None:
            try:
                return self.floating(expr.args[0]) ** power
            except VariantError:
                pass
        raise self.refuse(expr, f"needs `{name}`, which attention variants do not have (they have {', '.join(_CALLS)})")

    def number_of(self, expr: Any) -> Expr:
        """An expression of a floating or integer type."""
        return self.floating(expr) if is_float(expr) else self.integer(expr)

    def integer(self, expr: Any) -> Expr:
        """An expression of an integer type, as int32."""
        return self._integer(self._evaluator.simplify(expr))

    def _integer(self, expr: Any) -> Expr:
        number = static_int(expr)
        if number is not None:
            if not -(2**31) <= number < 2**31:
                raise self.refuse(expr, "is no int32, which positions of attention variants are")
            return lift(number)
        if isinstance(expr, ir.Var):
            return to_int(self._variable(expr))
        if isinstance(expr, tirx.Cast):
            return self._integer_cast(expr)
        if isinstance(expr, tirx.Select):
            return functions.where(
                self.condition(expr.condition), self._integer(expr.true_value), self._integer(expr.false_value)
            )
        if isinstance(expr, tirx.FloorDiv | tirx.FloorMod):
            divisor = static_int(expr.b)
            if divisor is None or divisor < 1:
                raise self.refuse(expr, "divides by what is no positive number")
            dividend = self._integer(expr.a)
            return dividend // divisor if isinstance(expr, tirx.FloorDiv) else dividend % divisor
        if type(expr) in _ARITHMETIC and not isinstance(expr, tirx.Div):
            return self._integer_arithmetic(expr)
        raise self.refuse(expr, "has no counterpart in an attention variant")

    def _integer_arithmetic(self, expr: Any) -> Expr:
        a, b = expr.a, expr.b
        if isinstance(expr, tirx.Add):  # `0 - i + j`, as the simplifier writes it, is j - i
            for x, y in ((a, b), (b, a)):
                negated = _negated(x)
                if negated is not None:
                    return self._integer(y) - self._integer(negated)
        if isinstance(expr, tirx.Mul) and not any(
            abs(static_int(x) or _MAX_MULTIPLE + 1) <= _MAX_MULTIPLE for x in (a, b)
        ):
            why = (
                f"is a product that may exceed int32, which positions are; a factor of at most {_MAX_MULTIPLE} does not"
            )
            raise self.refuse(expr, why)
        return _ARITHMETIC[type(expr)](self._integer(a), self._integer(b))

    def _integer_cast(self, expr: Any) -> Expr:
        source, target = str(expr.value.ty), str(expr.ty)
        if source == "bool":
            return to_int(self.condition(expr.value))
        if target not in ("int32", "int64"):
            raise self.refuse(expr, f"is a cast to {target}, which attention variants do not have")
        if source.startswith(("int", "uint")):
            return self._integer(expr.value)
        if isinstance(expr.value, tirx.Cast) and str(expr.value.value.ty).startswith("int"):
            return self._integer(expr.value.value)
        raise self.refuse(
            expr,
            "rounds a floating-point number to an integer, which comes out differently in another precision",
            (
                "compute it with integers, or make a table of its values a parameter of the model that is indexed by positions"
            ),
        )

    def condition(self, expr: Any) -> Expr:
        """A boolean expression."""
        if isinstance(expr, bool):
            return lift(expr)
        number = static_int(expr)
        if number is not None:
            return lift(bool(number))
        if isinstance(expr, tirx.Not):
            return ~self.condition(expr.a)
        if isinstance(expr, tirx.And):
            return self.condition(expr.a) & self.condition(expr.b)
        if isinstance(expr, tirx.Or):
            return self.condition(expr.a) | self.condition(expr.b)
        if type(expr) in _COMPARE:
            return self._comparison(expr)
        if isinstance(expr, tirx.Select):
            return functions.where(
                self.condition(expr.condition), self.condition(expr.true_value), self.condition(expr.false_value)
            )
        if isinstance(expr, ir.Var):
            found = self._variable(expr)
            return found if found.kind == "bool" else found != 0
        raise self.refuse(expr, "has no counterpart in an attention variant")

    def _comparison(self, expr: Any) -> Expr:
        if str(expr.a.ty) == "bool":
            return _COMPARE[type(expr)](self.condition(expr.a), self.condition(expr.b))
        a, b = self.number_of(expr.a), self.number_of(expr.b)
        return _COMPARE[type(expr)](a, b)

    # ---- variables and tables

    def _variable(self, var: Any) -> Expr:
        for index, name in self._indices:
            if same(var, index):
                return self.name(name)
        atom = self._evaluator.atoms.get(var)
        if atom is None:
            raise self.refuse(var, "is the number of tokens of the row: after the rewrite there is no such number")
        if self._is_score(var):
            raise self.refuse(var, "is read where an attention variant has no score (in a mask, an index or a sink)")
        if atom.kind != "load":
            what = {"reduce": "taken over a whole row", "dot": "another product", "softmax": "another softmax"}[
                atom.kind
            ]
            raise self.refuse(var, f"is {what}, which no attention variant reads")
        return self._load(var, atom)

    def _load(self, var: Any, atom: Atom) -> Expr:
        source = self._evaluator.definition(atom.source)
        if isinstance(source, ir.GenericConst):
            return self._constant(var, atom, source.value.numpy())
        if not isinstance(source, ir.Var):
            why = "is computed by the model, by an operator that is not written out here"
            raise self.refuse(
                var, why, "make it a parameter of the model, or elementwise arithmetic of parameters and positions"
            )
        if any(same(source, parameter) for parameter in self._inputs):
            raise input_refusal(atom, self._seen)
        shape, dtype = known_shape(source) or (), str(source.ty.dtype)
        sizes = [static_int(dim) for dim in shape]
        if dtype not in TABLE_KINDS:
            raise self.refuse(
                var, f"is {dtype}; tables of attention variants are {', '.join(TABLE_KINDS)}", "convert the weight"
            )
        if any(size is None for size in sizes) or not 1 <= len(sizes) <= MAX_RANK:
            raise self.refuse(
                var, f"is of a weight of rank {len(sizes)}; tables of attention variants have rank 1 to {MAX_RANK}"
            )
        key = ("weight", str(source.name))
        return self._element(key, Weight(str(source.name)), dtype, [size or 0 for size in sizes], atom.index, atom.name)

    def _constant(self, var: Any, atom: Atom, data: np.ndarray) -> Expr:
        kept = [axis for axis, size in enumerate(data.shape) if size != 1] or [data.ndim - 1]
        array = self._converted(var, data).reshape([data.shape[axis] for axis in kept])
        if array.ndim > MAX_RANK:
            raise self.refuse(
                var, f"is of a constant of rank {array.ndim}; tables of attention variants have rank 1 to {MAX_RANK}"
            )
        if array.nbytes > MAX_CONSTANT_BYTES:
            why = (
                f"is of a constant of {array.nbytes} bytes; constants of at most {MAX_CONSTANT_BYTES} go into a variant"
            )
            raise self.refuse(var, why, "register it as a parameter of the model, or compute it from positions")
        value = Constant.of(np.ascontiguousarray(array))
        index = [atom.index[axis] for axis in kept]
        return self._element(("constant", value), value, value.dtype, list(array.shape), index, "a constant")

    def _converted(self, var: Any, data: np.ndarray) -> np.ndarray:
        if data.dtype == np.bool_:
            return data
        if data.dtype.kind in "iu":
            if data.size and (data.min() < -(2**31) or data.max() >= 2**31):
                raise self.refuse(var, "is of a constant that is no int32")
            return data.astype(np.int32)
        return data.astype(np.float32)

    def _element(self, key: Any, value: Value, dtype: str, shape: list[int], index: Sequence[Any], name: str) -> Expr:
        role = self.role if TABLE_KINDS[dtype] == "float32" else "table"
        if len(shape) == 1 and shape[0] == self._heads and same(index[0], self._h):
            parameter = self._declare((*key, "per_head"), per_head(dtype), value, role)
            return self._table(parameter)[self.name("qo_head")]
        parameter = self._declare((*key, "tensor"), tensor(len(shape), dtype), value, role)
        places = [self._place(part, size, name, shape) for part, size in zip(index, shape, strict=True)]
        return self._table(parameter)[tuple(places)]

    def _table(self, parameter: str) -> Table:
        if parameter not in self._tables:
            self._tables[parameter] = Table(parameter, self.parameters[parameter])
        return self._tables[parameter]

    def _place(self, index: Any, size: int, name: str, shape: list[int]) -> Expr:
        """An index, held inside the table: expressions are computed for keys that the mask hides, too."""
        if size == 1:
            return lift(0)
        index = self._evaluator.simplify(index)
        bound = self._evaluator.analyzer.const_int_bound(index)
        place = self.integer(index)
        if int(bound.max_value) >= size:
            place = functions.minimum(place, size - 1)
            if any(same(var, x) for var in free_vars(index) for x, _ in self._indices[1:]):
                note = f"positions stay within `{name}` {shape}, whose last entry counts for those beyond"
                if note not in self.assumptions:
                    self.assumptions.append(note)
        return place if int(bound.min_value) >= 0 else functions.maximum(place, 0)


def _negated(expr: Any) -> Any | None:
    """The x of 0 - x and x * -1, None for anything else."""
    if isinstance(expr, tirx.Sub) and static_int(expr.a) == 0:
        return expr.b
    if isinstance(expr, tirx.Mul) and static_int(expr.b) == -1:
        return expr.a
    return None
