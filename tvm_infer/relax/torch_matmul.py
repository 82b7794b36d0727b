"""Matrix products of PyTorch programs in torch's own types.

TVM's importer gives every product the type float32, whatever its operands: a bfloat16 model then runs in float32 from its first layer
on. In torch a product has the type of its operands; these converters say so. (How it is summed: wide_sums.py.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tvm import relax


def _matmul(node: Any, importer: Any) -> Any:
    lhs, rhs = (importer.env[arg] for arg in node.args[:2])
    return importer.block_builder.emit(relax.op.matmul(lhs, rhs, out_dtype=str(lhs.ty.dtype)))


def _linear(node: Any, importer: Any) -> Any:
    emit = importer.block_builder.emit
    x, weight = (importer.env[arg] for arg in node.args[:2])
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    weight = emit(relax.op.permute_dims(weight))
    product = emit(relax.op.matmul(x, weight, out_dtype=str(x.ty.dtype)))
    return product if bias is None else emit(relax.op.add(product, importer.env[bias]))


def _addmm(node: Any, importer: Any) -> Any:
    """beta * bias + alpha * (lhs @ rhs)."""
    emit = importer.block_builder.emit
    bias, lhs, rhs = (importer.env[arg] for arg in node.args[:3])
    dtype = str(lhs.ty.dtype)
    terms = []
    for factor, term in (
        (node.kwargs.get("beta", 1), lambda: bias),
        (node.kwargs.get("alpha", 1), lambda: emit(relax.op.matmul(lhs, rhs, out_dtype=dtype))),
    ):
        if factor != 0:
            terms.append(term() if factor == 1 else emit(relax.op.multiply(term(), relax.const(factor, dtype))))
    if len(terms) == 2:
        return emit(relax.op.add(*terms))
    shape = [lhs.ty.shape.values[0], rhs.ty.shape.values[1]]
    if not terms:
        return emit(relax.op.zeros(shape, dtype))
    # the bias alone may be a row: the result is a matrix all the same
    return emit(relax.op.broadcast_to(terms[0], shape)) if node.kwargs.get("alpha", 1) == 0 else terms[0]


# aten operator -> converter (node, importer) -> relax.Var, for from_exported_program's custom_convert_map
CONVERTERS: Mapping[str, Callable[[Any, Any], Any]] = {
    "matmul.default": _matmul,
    "mm.default": _matmul,
    "bmm.default": _matmul,
    "linear.default": _linear,
    "addmm.default": _addmm,
}
