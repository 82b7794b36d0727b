"""Every operation of a variant's expressions, one row each: its TIR node, how it prints, its C++ and its meaning in numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

FLOAT, INT, BOOL = "float32", "int32", "bool"
_KINDS = {"f": FLOAT, "i": INT, "b": BOOL}
# Precedence of Python's operators: a printed expression, traced again, gives the same one.
_COMPARE, _OR, _XOR, _AND, _SHIFT, _SUM, _PRODUCT, _UNARY, ATOM = range(1, 10)


@dataclass(frozen=True)
class Operation:
    """One operation.

    tir : the class of tvm.tirx, or the function that makes a call to "tirx.<tir>" or "prim.<tir>". signatures : kinds of the
    operands -> kind of the result. text, cpp : with a pair of braces for each operand. numpy : on float64, int64 and bool arrays.
    """

    name: str
    tir: str
    signatures: dict[tuple[str, ...], str]
    text: str
    precedence: int
    cpp: str
    numpy: Callable[..., Any]

    @property
    def arity(self) -> int:
        """Number of operands."""
        return self.text.count("{}")


def _signatures(text: str) -> dict[tuple[str, ...], str]:
    """ "ff f, ii i" -> {(FLOAT, FLOAT): FLOAT, (INT, INT): INT}."""
    pairs = (part.split() for part in text.split(","))
    return {tuple(_KINDS[k] for k in operands): _KINDS[result] for operands, result in pairs}


# A divisor that is not known at bind counts as 1 where it is below 1, as the generated code has it.
def _floor_divide(x: Any, y: Any) -> Any:
    return np.floor_divide(x, np.maximum(y, 1))


def _floor_modulo(x: Any, y: Any) -> Any:
    return np.mod(x, np.maximum(y, 1))


def _wrap(x: Any) -> Any:
    """int64 -> the int32 of its low 32 bits, as int64."""
    return np.asarray(x, np.int64).astype(np.int32).astype(np.int64)


def _to_int(x: Any) -> Any:
    return np.trunc(x).astype(np.int64) if np.asarray(x).dtype.kind == "f" else np.asarray(x).astype(np.int64)


def _rows() -> list[Operation]:
    arithmetic, compare, equal = "ff f, ii i", "ff b, ii b", "ff b, ii b, bb b"
    rows: list[tuple[str, str, str, str, int, str, Callable[..., Any]]] = [
        ("add", "Add", arithmetic, "{} + {}", _SUM, "{} + {}", np.add),
        ("sub", "Sub", arithmetic, "{} - {}", _SUM, "{} - {}", np.subtract),
        ("mul", "Mul", arithmetic, "{} * {}", _PRODUCT, "{} * {}", np.multiply),
        ("div", "Div", "ff f", "{} / {}", _PRODUCT, "Divide({}, {})", np.divide),
        ("floordiv", "FloorDiv", "ii i", "{} // {}", _PRODUCT, "FloorDivide({}, {})", _floor_divide),
        ("mod", "FloorMod", "ii i", "{} % {}", _PRODUCT, "FloorModulo({}, {})", _floor_modulo),
        ("min", "Min", arithmetic, "minimum({}, {})", ATOM, "Min({}, {})", np.fmin),
        ("max", "Max", arithmetic, "maximum({}, {})", ATOM, "Max({}, {})", np.fmax),
        ("eq", "EQ", equal, "{} == {}", _COMPARE, "{} == {}", np.equal),
        ("ne", "NE", equal, "{} != {}", _COMPARE, "{} != {}", np.not_equal),
        ("lt", "LT", compare, "{} < {}", _COMPARE, "{} < {}", np.less),
        ("le", "LE", compare, "{} <= {}", _COMPARE, "{} <= {}", np.less_equal),
        ("gt", "GT", compare, "{} > {}", _COMPARE, "{} > {}", np.greater),
        ("ge", "GE", compare, "{} >= {}", _COMPARE, "{} >= {}", np.greater_equal),
        ("and", "And", "bb b", "{} & {}", _AND, "{} && {}", np.logical_and),
        ("or", "Or", "bb b", "{} | {}", _OR, "{} || {}", np.logical_or),
        ("not", "Not", "b b", "~{}", _UNARY, "!{}", np.logical_not),
        ("bit_and", "BitwiseAnd", "ii i", "{} & {}", _AND, "{} & {}", np.bitwise_and),
        ("bit_or", "BitwiseOr", "ii i", "{} | {}", _OR, "{} | {}", np.bitwise_or),
        ("bit_xor", "BitwiseXor", "ii i", "{} ^ {}", _XOR, "{} ^ {}", np.bitwise_xor),
        ("bit_not", "BitwiseNot", "i i", "~{}", _UNARY, "~{}", np.invert),
        # The low five bits of a distance count: C++ leaves the others undefined, and processors differ.
        (
            "shl",
            "LShift",
            "ii i",
            "{} << {}",
            _SHIFT,
            "static_cast<int32_t>(static_cast<uint32_t>({}) << ({} & 31))",
            lambda x, n: _wrap(np.left_shift(x, np.bitwise_and(n, 31))),
        ),
        (
            "shr",
            "RShift",
            "ii i",
            "{} >> {}",
            _SHIFT,
            "{} >> ({} & 31)",
            lambda x, n: np.right_shift(x, np.bitwise_and(n, 31)),
        ),
        ("select", "Select", "bff f, bii i, bbb b", "where({}, {}, {})", ATOM, "{} ? {} : {}", np.where),
        ("to_float", "Cast", "i f, b f", "to_float({})", ATOM, "static_cast<float>({})", np.float64),
        ("to_int", "Cast", "f i, b i", "to_int({})", ATOM, "static_cast<int32_t>({})", _to_int),
        ("abs", "abs", "f f", "abs({})", ATOM, "Abs({})", np.abs),
        ("tanh", "tanh", "f f", "tanh({})", ATOM, "Tanh({})", np.tanh),
        ("exp", "exp", "f f", "exp({})", ATOM, "Exp({})", np.exp),
        ("exp2", "exp2", "f f", "exp2({})", ATOM, "Exp2({})", np.exp2),
        ("log", "log", "f f", "log({})", ATOM, "Log({})", np.log),
        ("log2", "log2", "f f", "log2({})", ATOM, "Log2({})", np.log2),
        ("sqrt", "sqrt", "f f", "sqrt({})", ATOM, "Sqrt({})", np.sqrt),
        (
            "sigmoid",
            "sigmoid",
            "f f",
            "sigmoid({})",
            ATOM,
            "Sigmoid({})",
            lambda x: 1 / (1 + np.exp(-np.asarray(x, np.float64))),
        ),
        ("cos", "cos", "f f", "cos({})", ATOM, "Cos({})", np.cos),
        ("sin", "sin", "f f", "sin({})", ATOM, "Sin({})", np.sin),
    ]
    return [
        Operation(name, tir, _signatures(kinds), text, precedence, cpp, function)
        for name, tir, kinds, text, precedence, cpp, function in rows
    ]


OPERATIONS = {row.name: row for row in _rows()}
# TIR node or call -> operation. A float's abs is a call to fabs.
OF_TIR = {row.tir: row for row in OPERATIONS.values() if row.tir != "Cast"} | {"fabs": OPERATIONS["abs"]}
