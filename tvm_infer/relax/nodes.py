"""Reading Relax nodes: shapes, data types, operators, bindings."""

from __future__ import annotations

from typing import Any

from tvm import ir, relax, tirx

Index = tuple[Any, ...]  # one int64 expression per axis


class UnknownShapeError(Exception):
    """A tensor whose shape is needed and not known."""


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
