"""Scalar expressions as a reader writes them: `where(j <= i, 0.125*score, -inf)`."""

from __future__ import annotations

from typing import Any

from tvm import ir, relax, tirx

from .symbolic import Evaluator

_INFIX: list[tuple[Any, str, int]] = [
    (tirx.Or, "or", 1),
    (tirx.And, "and", 2),
    (tirx.EQ, "==", 3),
    (tirx.NE, "!=", 3),
    (tirx.LT, "<", 3),
    (tirx.LE, "<=", 3),
    (tirx.GT, ">", 3),
    (tirx.GE, ">=", 3),
    (tirx.Add, "+", 4),
    (tirx.Sub, "-", 4),
    (tirx.Mul, "*", 5),
    (tirx.Div, "/", 5),
    (tirx.FloorDiv, "//", 5),
    (tirx.FloorMod, "%", 5),
]
_MAX_CHARACTERS = 600


def format_expr(expr: Any, evaluator: Evaluator | None = None) -> str:
    """The expression in a line; an atom of `evaluator` as `tensor[index]`, casts left out, the middle of a long text cut."""
    text = _format(expr, evaluator, 0)
    if len(text) > _MAX_CHARACTERS:
        half = _MAX_CHARACTERS // 2
        text = f"{text[:half]} … {text[-half:]}"
    return text


def _format(expr: Any, evaluator: Evaluator | None, binding: int) -> str:
    if isinstance(expr, ir.Var):
        return _variable(expr, evaluator)
    if isinstance(expr, tirx.IntImm):
        return ("False", "True")[int(expr.value)] if str(expr.ty) == "bool" else str(int(expr.value))
    if isinstance(expr, tirx.FloatImm):
        return f"{float(expr.value):.7g}"
    if isinstance(expr, tirx.Cast):
        return _format(expr.value, evaluator, binding)
    if isinstance(expr, tirx.Not):
        return f"not {_format(expr.a, evaluator, 6)}"
    if isinstance(expr, tirx.Select):
        parts = ", ".join(_format(part, evaluator, 0) for part in (expr.condition, expr.true_value, expr.false_value))
        return f"where({parts})"
    if isinstance(expr, tirx.Max | tirx.Min):
        name = "max" if isinstance(expr, tirx.Max) else "min"
        return f"{name}({_format(expr.a, evaluator, 0)}, {_format(expr.b, evaluator, 0)})"
    for kind, sign, strength in _INFIX:
        if isinstance(expr, kind):
            text = f"{_format(expr.a, evaluator, strength)} {sign} {_format(expr.b, evaluator, strength + 1)}"
            return f"({text})" if strength < binding else text
    if isinstance(expr, relax.Call) and isinstance(expr.op, ir.Op):
        name = str(expr.op.name).rsplit(".", 1)[-1]
        return f"{name}({', '.join(_format(argument, evaluator, 0) for argument in expr.args)})"
    return str(expr)


def _variable(var: Any, evaluator: Evaluator | None) -> str:
    atom = evaluator.atoms.get(var) if evaluator is not None else None
    if atom is None or atom.kind == "dot":
        return "score" if atom is not None else str(var.name)
    index = ", ".join("…" if part is None else _format(part, evaluator, 0) for part in atom.index)
    if atom.kind == "reduce":
        return f"{atom.reducer}({getattr(atom.operand, 'name', 'constant')}[{index}])"
    return f"{atom.name}[{index}]"
