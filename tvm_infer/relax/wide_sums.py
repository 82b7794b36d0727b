"""Matrix products that TVM computes are summed in float32.

TVM sums a product in the type of its result: in bfloat16, whose 8 bits stand still from a few hundred terms on. Libraries, and torch,
sum 16-bit products in float32 and round once.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from .nodes import dtype_of, op_name

_NARROW = ("float16", "bfloat16")


@relax.expr_functor.mutator
class _WideSums(relax.PyExprMutator):
    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        if op_name(call) != "relax.matmul" or dtype_of(call) not in _NARROW:
            return call
        product = self.builder_.emit(relax.op.matmul(*call.args, out_dtype="float32"))
        return relax.op.astype(product, dtype_of(call))


def sum_in_float32(mod: tvm.IRModule) -> tvm.IRModule:
    """The module with every R.matmul of a 16-bit result computed in float32 and rounded; TVM fuses the cast.

    Comes after DispatchMatmul, whose products a library sums.
    """
    updated = mod.clone()
    for var, func in mod.functions_items():
        if isinstance(func, relax.Function):
            updated.update_func(var, _WideSums(updated).visit_expr(func))
    return updated
