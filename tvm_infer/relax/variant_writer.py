"""From a scalar expression of (head, query, key) to an expression of an attention variant, with the parameters that it reads.

Positions become q_pos and kv_pos, elements of weights and constants become parameters (variant_tables.py). What has no counterpart
there is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import ir, relax, tirx

from tvm_infer.errors import VariantError
from tvm_infer.variant import functions
from tvm_infer.variant.expression import Expr, lift, to_float, to_int
from tvm_infer.variant.trace import variable

from .conditions import COMPARISONS
from .nodes import same, static_int
from .prove import Refusal
from .scalars import constant_value
from .symbolic import Evaluator
from .terms import factors, is_float, terms
from .variant_tables import KEEP_VARIANT, VariantTables

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
    tables : the parameters of the variant so far.
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
        self._score, self._scale = score, scale
        self._variables: dict[str, Expr] = {}
        self.tables = VariantTables(evaluator, h, (i, j), heads, inputs, seen)

    # ---- leaves

    def name(self, name: str) -> Expr:
        """A variable of variants: "value", "lse", "q_pos", …"""
        if name not in self._variables:
            self._variables[name] = variable(name, "float32" if name in ("value", "lse") else "int32")
        return self._variables[name]

    def number(self, role: str, number: float) -> Expr:
        """A scalar parameter."""
        name = self.tables.number(role, number)
        if name not in self._variables:
            self._variables[name] = variable(name, "float32")
        return self._variables[name]

    def refuse(self, expr: Any, why: str, fix: str = KEEP_VARIANT) -> Refusal:
        """The refusal of a part of the expression."""
        return self.tables.refuse(expr, why, fix)

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
        if type(expr) in COMPARISONS:
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
            return COMPARISONS[type(expr)](self.condition(expr.a), self.condition(expr.b))
        a, b = self.number_of(expr.a), self.number_of(expr.b)
        return COMPARISONS[type(expr)](a, b)

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
        return self.tables.element(var, atom, self.name, self.integer)


def _negated(expr: Any) -> Any | None:
    """The x of 0 - x and x * -1, None for anything else."""
    if isinstance(expr, tirx.Sub) and static_int(expr.a) == 0:
        return expr.b
    if isinstance(expr, tirx.Mul) and static_int(expr.b) == -1:
        return expr.a
    return None
