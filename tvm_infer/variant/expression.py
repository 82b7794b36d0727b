"""Traced values: what a variant's functions compute with. Each operation on them makes a TIR expression instead of a number."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import numpy as np

from .location import error_here
from .operations import BOOL, FLOAT, INT, OPERATIONS

_INT32 = range(-(2**31), 2**31)
_MAX_POWER = 16


class Expr:
    """A traced value: float32, int32 or bool. ``tir`` is its TIR expression, ``kind`` its dtype.

    ``int / int`` is a true division, giving float32; an int beside a float becomes float32; ``//`` and ``%`` round towards minus
    infinity and take ints. Conditions combine with ``&``, ``|`` and ``~``.
    """

    __hash__ = None  # type: ignore[assignment]
    __slots__ = ("kind", "tir")

    def __init__(self, tir: Any, kind: str) -> None:
        self.tir = tir
        self.kind = kind

    def __repr__(self) -> str:
        return f"<traced {self.kind} {self.tir}>"

    def __add__(self, other: Any) -> Expr:
        return _arithmetic("add", self, other)

    def __radd__(self, other: Any) -> Expr:
        return _arithmetic("add", other, self)

    def __sub__(self, other: Any) -> Expr:
        return _arithmetic("sub", self, other)

    def __rsub__(self, other: Any) -> Expr:
        return _arithmetic("sub", other, self)

    def __mul__(self, other: Any) -> Expr:
        return _arithmetic("mul", self, other)

    def __rmul__(self, other: Any) -> Expr:
        return _arithmetic("mul", other, self)

    def __truediv__(self, other: Any) -> Expr:
        return apply("div", to_float(self), to_float(other))

    def __rtruediv__(self, other: Any) -> Expr:
        return apply("div", to_float(other), to_float(self))

    def __floordiv__(self, other: Any) -> Expr:
        return _divide("floordiv", self, other)

    def __rfloordiv__(self, other: Any) -> Expr:
        return _divide("floordiv", other, self)

    def __mod__(self, other: Any) -> Expr:
        return _divide("mod", self, other)

    def __rmod__(self, other: Any) -> Expr:
        return _divide("mod", other, self)

    def __neg__(self) -> Expr:
        return _arithmetic("sub", 0, self)

    def __pos__(self) -> Expr:
        return self

    def __abs__(self) -> Expr:
        return _arithmetic("max", self, -self) if self.kind == INT else apply("abs", self)

    def __pow__(self, power: Any) -> Expr:
        is_number = isinstance(power, (int, float, np.integer, np.floating))
        if is_number and power == 0.5:
            return apply("sqrt", to_float(self))
        if not is_number or power % 1 or abs(power) > _MAX_POWER:
            raise error_here(
                f"`**` with {power!r}: a power is a whole number of at most {_MAX_POWER}, or 0.5; others are "
                "variant.exp(y * variant.log(x))"
            )
        if power < 0:
            return 1 / self ** int(-power)
        result = lift(1 if self.kind == INT else 1.0)
        for i in range(int(power)):
            result = self if i == 0 else result * self
        return result

    def __rpow__(self, base: Any) -> Expr:
        raise error_here(f"{base!r} ** a traced value: use variant.exp2(x) or variant.exp(x * math.log(base))")

    def __lt__(self, other: Any) -> Expr:
        return _arithmetic("lt", self, other)

    def __le__(self, other: Any) -> Expr:
        return _arithmetic("le", self, other)

    def __gt__(self, other: Any) -> Expr:
        return _arithmetic("gt", self, other)

    def __ge__(self, other: Any) -> Expr:
        return _arithmetic("ge", self, other)

    def __eq__(self, other: Any) -> Expr:  # type: ignore[override]
        return _arithmetic("eq", self, other)

    def __ne__(self, other: Any) -> Expr:  # type: ignore[override]
        return _arithmetic("ne", self, other)

    def __and__(self, other: Any) -> Expr:
        return _bitwise("and", self, other)

    __rand__ = __and__

    def __or__(self, other: Any) -> Expr:
        return _bitwise("or", self, other)

    __ror__ = __or__

    def __xor__(self, other: Any) -> Expr:
        return _bitwise("xor", self, other)

    __rxor__ = __xor__

    def __invert__(self) -> Expr:
        return apply("not" if self.kind == BOOL else "bit_not", self)

    def __lshift__(self, other: Any) -> Expr:
        return apply("shl", self, lift(other))

    def __rlshift__(self, other: Any) -> Expr:
        return apply("shl", lift(other), self)

    def __rshift__(self, other: Any) -> Expr:
        return apply("shr", self, lift(other))

    def __rrshift__(self, other: Any) -> Expr:
        return apply("shr", lift(other), self)

    # What Python would do with a number in hand, which there is none yet.

    def __bool__(self) -> NoReturn:
        raise error_here(
            "a traced value has no truth value, so `if`, `and`, `or`, `not` and chained comparisons (a <= x < b) cannot use it: "
            "choose with variant.where(condition, a, b), and combine conditions with &, | and ~"
        )

    def __float__(self) -> NoReturn:
        raise error_here(
            "a traced value is no number yet, so math.tanh and the like cannot take it: use variant.tanh, …"
        )

    __complex__ = __float__

    def __int__(self) -> NoReturn:
        raise error_here("a traced value is no number yet: use variant.to_int(x)")

    __index__ = __trunc__ = __floor__ = __ceil__ = __round__ = __int__

    def __iter__(self) -> NoReturn:
        raise error_here("a traced value is one number: it cannot be iterated over or unpacked")

    def __contains__(self, item: Any) -> NoReturn:
        raise error_here("a traced value is one number: `in` cannot look into it")

    def __getitem__(self, index: Any) -> NoReturn:
        raise error_here(
            "a traced value is one number and cannot be indexed: per_head and per_request parameters come as the row's own element; "
            "declare variant.tensor(rank) to index a table yourself"
        )

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise error_here("a traced value is no array, so numpy cannot take it: use variant.where, variant.tanh, …")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Expr:
        from .ufuncs import apply_ufunc

        return apply_ufunc(ufunc, method, inputs, kwargs)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        name = getattr(function, "__name__", "a function")
        raise error_here(
            f"torch's {name} cannot take a traced value: use the functions of tvm_infer.variant, and declare tensors as parameters "
            "(variant.tensor, per_head, per_request)"
        )


def lift(x: Any) -> Expr:
    """A traced value, or a Python or numpy number as one. Raises VariantError for anything else."""
    from tvm import tirx

    if isinstance(x, Expr):
        return x
    if isinstance(x, np.generic):
        x = x.item()
    if isinstance(x, bool):
        return Expr(tirx.IntImm(BOOL, int(x)), BOOL)
    if isinstance(x, int):
        if x not in _INT32:
            raise error_here(f"the constant {x} is no int32: write it as a float, or make it smaller")
        return Expr(tirx.IntImm(INT, x), INT)
    if isinstance(x, float):
        return Expr(tirx.FloatImm(FLOAT, _rounded(x)), FLOAT)
    from .table import Table

    if isinstance(x, Table):
        raise error_here(
            f"table `{x.name}` is used as a number: index it, {x.name}[{', '.join(['…'] * x.parameter.rank)}]"
        )
    raise error_here(
        f"a {type(x).__name__} beside a traced value: expressions hold numbers, variables and parameters; declare a tensor with "
        "variant.tensor, per_head or per_request"
    )


def _rounded(x: float) -> float:
    """The float32 nearest to a constant."""
    with np.errstate(over="ignore"):
        single = float(np.float32(x))
    if math.isnan(x) or (math.isinf(single) and not math.isinf(x)):
        raise error_here(f"the constant {x} is no float32")
    return single


def apply(name: str, *operands: Expr) -> Expr:
    """The operation `name` of operands of the right kinds; VariantError where it does not take theirs."""
    from tvm import tirx

    row = OPERATIONS[name]
    kinds = tuple(x.kind for x in operands)
    if kinds not in row.signatures:
        takes = " or ".join("(" + ", ".join(signature) + ")" for signature in row.signatures)
        raise error_here(
            f"`{row.text.format(*kinds)}`: it takes {takes}. Convert with variant.to_float or variant.to_int, or use variant.where"
        )
    result = row.signatures[kinds]
    tir = [x.tir for x in operands]
    return Expr(tirx.Cast(result, *tir) if row.tir == "Cast" else getattr(tirx, row.tir)(*tir), result)


def _alike(*operands: Any) -> list[Expr]:
    """Operands lifted; those that are ints become float32 where another is one."""
    lifted = [lift(x) for x in operands]
    floats = any(x.kind == FLOAT for x in lifted)
    return [to_float(x) if floats and x.kind == INT else x for x in lifted]


def _arithmetic(name: str, x: Any, y: Any) -> Expr:
    return apply(name, *_alike(x, y))


def _bitwise(name: str, x: Any, y: Any) -> Expr:
    x, y = lift(x), lift(y)
    if x.kind == BOOL:
        return apply("ne" if name == "xor" else name, x, y)
    return apply(f"bit_{name}", x, y)


def _divide(name: str, x: Any, y: Any) -> Expr:
    if isinstance(y, (int, np.integer)) and y < 1:
        raise error_here(f"`//` and `%` by {y}: the divisor must be at least 1")
    return apply(name, lift(x), lift(y))


def to_float(x: Any) -> Expr:
    """x as float32; a condition becomes 1 or 0."""
    from tvm import tirx

    x = lift(x)
    if x.kind == INT and type(x.tir).__name__ == "IntImm":  # a constant is converted here
        return Expr(tirx.FloatImm(FLOAT, _rounded(float(x.tir.value))), FLOAT)
    return x if x.kind == FLOAT else apply("to_float", x)


def to_int(x: Any) -> Expr:
    """x as int32, rounded towards zero; a condition becomes 1 or 0."""
    x = lift(x)
    return x if x.kind == INT else apply("to_int", x)
