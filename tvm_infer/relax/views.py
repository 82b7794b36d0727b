"""Data movement that cancels: a chain of reshapes and permutes that keeps the elements in order is one reshape.

A rewritten attention takes and gives [tokens, heads, head_dim], the layout that projections produce; the transposes to and from
[heads, tokens, head_dim] that models write around attention then meet their inverses, and this pass removes them.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from .nodes import bindings_of, dtype_of, known_shape, op_name, same, shape_of, static_int
from .symbolic import Evaluator

_ORDER_PRESERVING = ("relax.reshape", "relax.squeeze", "relax.expand_dims")
_MOVES = (*_ORDER_PRESERVING, "relax.permute_dims")


def simplify_views(func: Any) -> Any:
    """Replace every reshape or permute whose elements stand in the order of an earlier tensor by one reshape of that tensor.

    A reshape to the shape that the tensor has already becomes the tensor itself.
    """
    definitions = {binding.var: binding.value for binding in bindings_of(func)}
    roots: dict[Any, Any] = {}  # variable -> the earliest tensor with the same elements in the same order
    builder = relax.BlockBuilder()
    blocks = []
    for block in func.body.blocks:
        bindings = []
        for binding in block.bindings:
            value = binding.value
            if op_name(value) in _MOVES and known_shape(value) is not None:
                root = _root(definitions, roots, binding.var)
                if root is not None:
                    roots[binding.var] = root
                    value = root if _same_shape(root, value) else relax.op.reshape(root, list(shape_of(value)))
                    value = builder.normalize(value)
            bindings.append(relax.VarBinding(binding.var, value))
        is_dataflow = isinstance(block, relax.DataflowBlock)
        blocks.append(relax.DataflowBlock(bindings) if is_dataflow else relax.BindingBlock(bindings))
    body = relax.SeqExpr(blocks, func.body.body)
    return relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs, func.span)


def _root(definitions: Any, roots: Any, var: Any) -> Any | None:
    """The earliest tensor whose elements in row-major order are those of `var`; None where there is none."""
    value = definitions[var]
    if op_name(value) in _ORDER_PRESERVING:
        source = value.args[0]
        return roots.get(source, source)
    evaluator = Evaluator(definitions)
    shape = shape_of(value)
    index = [evaluator.bind(f"x{axis}", dim) for axis, dim in enumerate(shape)]
    own = [(x, dim) for x, dim in zip(index, shape, strict=True) if static_int(dim) != 1]
    found = None
    for view in evaluator.views(var, index):
        source_shape = known_shape(view.tensor)
        if (
            view.factor != 1.0
            or source_shape is None
            or same(view.tensor, var)
            or dtype_of(view.tensor) != dtype_of(value)
        ):
            continue
        parts = [(part, dim) for part, dim in zip(view.index, source_shape, strict=True) if static_int(dim) != 1]
        if len(parts) == len(own) and all(
            same(part, x) and evaluator.equal(dim, extent) for (part, dim), (x, extent) in zip(parts, own, strict=True)
        ):
            found = roots.get(view.tensor, view.tensor)
    return found


def _same_shape(tensor: Any, other: Any) -> bool:
    a, b = known_shape(tensor), known_shape(other)
    return (
        a is not None
        and b is not None
        and len(a) == len(b)
        and all(
            same(x, y) or (static_int(x) is not None and static_int(x) == static_int(y))
            for x, y in zip(a, b, strict=True)
        )
    )
