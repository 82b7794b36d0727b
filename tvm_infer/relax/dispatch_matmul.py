"""DispatchMatmul: matrix products with a matrix on the right go to the packed function `tvm_infer.matmul`.

TVM's own CPU matmuls are 30 to 150 times slower than a BLAS here, and a transposed weight would be transposed again at every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import relax

from . import extern_calls
from .nodes import bindings_of, dtype_of, known_shape, op_name, shape_of
from .printer import format_expr
from .report import Location, Reason

_MATMUL, _PERMUTE = "relax.matmul", "relax.permute_dims"


@dataclass(frozen=True)
class Dispatched:
    """One product that goes to tvm_infer.matmul: [m, k] x [k, n], where m may be symbolic and leading dimensions count as rows.

    weight : name of the right-hand matrix; transpose_b : it is stored [n, k] and used as it is.
    """

    location: Location
    m: str
    k: str
    n: str
    weight: str
    transpose_b: bool


@dataclass
class MatmulReport:
    """What one run of DispatchMatmul did, over all functions."""

    dispatched: list[Dispatched] = field(default_factory=list)
    left: list[Reason] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.dispatched)} matmul(s) to tvm_infer.matmul, {len(self.left)} left to TVM"]
        shapes: dict[tuple[str, str, str, bool], int] = {}
        for item in self.dispatched:
            key = (item.m, item.k, item.n, item.transpose_b)
            shapes[key] = shapes.get(key, 0) + 1
        for (m, k, n, transpose_b), count in shapes.items():
            weight = f"[{n}, {k}]^T" if transpose_b else f"[{k}, {n}]"
            lines.append(f"  {count:4d} x  [{m}, {k}] x {weight}")
        lines += [f"left to TVM: {reason}" for reason in self.left]
        return "\n".join(lines)


class DispatchMatmul:
    """Send `R.matmul(a [..., m, k], b [k, n])` in float32 to `tvm_infer.matmul`.

    `b = R.permute_dims(w)` of a matrix w [n, k] (what a linear layer exports to) is folded into the call: w is read as it is stored,
    and the permute goes if nothing else uses it. A bias stays an addition of its own, which TVM fuses with what follows. What is not
    dispatched (another dtype, a batched right-hand side, vectors) stays as it is, with the reason in the report.

    Attributes
    ----------
    report : MatmulReport of the last call.
    """

    def __init__(self) -> None:
        self.report = MatmulReport()

    def __call__(self, mod: tvm.IRModule) -> tvm.IRModule:
        """The rewritten module; `mod` is unchanged."""
        self.report = MatmulReport()
        updated = mod.clone()
        for var, func in mod.functions_items():
            if isinstance(func, relax.Function) and isinstance(func.body, relax.SeqExpr):
                updated.update_func(var, self._rewrite(str(var.name_hint), func))
        return relax.transform.DeadCodeElimination()(updated)

    def _rewrite(self, name: str, func: Any) -> Any:
        definitions = {binding.var: binding.value for binding in bindings_of(func)}
        builder = relax.BlockBuilder()
        blocks = []
        for block in func.body.blocks:
            bindings = []
            for binding in block.bindings:
                if op_name(binding.value) == _MATMUL:
                    location = Location(name, str(binding.var.name), _MATMUL)
                    call = self._dispatch(location, binding.value, definitions)
                    if call is not None:
                        binding = relax.VarBinding(binding.var, builder.normalize(call))
                bindings.append(binding)
            is_dataflow = isinstance(block, relax.DataflowBlock)
            blocks.append(relax.DataflowBlock(bindings) if is_dataflow else relax.BindingBlock(bindings))
        body = relax.SeqExpr(blocks, func.body.body)
        return relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs, func.span)

    def _dispatch(self, location: Location, value: Any, definitions: Mapping[Any, Any]) -> Any | None:
        """The packed call for a product, or None with the reason in the report."""
        a, b = value.args
        problem = _problem(a, b, value)
        if problem is not None:
            why, fix = problem
            self.report.left.append(Reason(location, f"{_describe(a)} x {_describe(b)}", why, fix))
            return None
        stored = _transposed(b, definitions)
        *rows, k = shape_of(a)
        self.report.dispatched.append(
            Dispatched(
                location,
                " * ".join(format_expr(dim) for dim in rows if format_expr(dim) != "1") or "1",
                format_expr(k),
                format_expr(shape_of(b)[1]),
                _name(b if stored is None else stored),
                stored is not None,
            )
        )
        return extern_calls.matmul(a, b if stored is None else stored, transpose_b=stored is not None, out_ty=value.ty)


def _problem(a: Any, b: Any, value: Any) -> tuple[str, str] | None:
    """Why a product stays with TVM and what would change that, or None."""
    if known_shape(a) is None or known_shape(b) is None:
        return "the shape of an operand is not known", "give the operand a shape with R.match_cast"
    if len(shape_of(b)) != 2:
        return (
            f"the right-hand side has rank {len(shape_of(b))}; only matrices [k, n] are dispatched",
            "reshape to a product with a matrix if one operand is shared by the batch",
        )
    if len(shape_of(a)) < 2:
        return "the left-hand side is a vector", "give it a row dimension"
    for side, operand in (("left", a), ("right", b), ("result", value)):
        if dtype_of(operand) != "float32":
            return f"the {side} is {dtype_of(operand)}; the BLAS computes in float32", "cast the model to float32"
    return None


def _transposed(b: Any, definitions: Mapping[Any, Any]) -> Any | None:
    """The matrix [n, k] whose transpose `b` is, or None."""
    value: Any = definitions.get(b)
    if op_name(value) != _PERMUTE or len(shape_of(value)) != 2:
        return None
    axes = value.attrs.axes
    return value.args[0] if axes is None or [int(axis) % 2 for axis in axes] == [1, 0] else None


def _name(x: Any) -> str:
    return str(x.name) if hasattr(x, "name") else "constant"


def _describe(x: Any) -> str:
    shape = known_shape(x)
    dims = "unknown shape" if shape is None else ", ".join(format_expr(dim) for dim in shape)
    return f"{_name(x)} [{dims}] {dtype_of(x)}"
