"""SampledRows: the logits are computed only for the tokens that sample.

A prompt of 1000 tokens needs one row of logits. For a vocabulary of 49,152 the other rows would cost as much as 5 layers of a 135 M
model each.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx

from tvm_infer.errors import ModelError

from .nodes import bindings_of, known_shape, op_name, same, shape_of, static_int

LOGIT_INDICES = "logit_indices"
_UNARY = ("relax.astype", "relax.tanh", "relax.negative", "relax.nn.log_softmax", "relax.nn.softmax")
_BINARY = ("relax.add", "relax.subtract", "relax.multiply", "relax.divide")


class SampledRows:
    """Give the function an input `logit_indices [num_logits]` int64: the rows of the step whose logits it returns, in that order.

    The function's first output must be the logits: a product of rows [..., num_tokens, k] with a matrix, after it only reshapes, casts
    and elementwise operators. A function that has the input already is left alone. Otherwise ModelError says what stands in the way.

    Attributes
    ----------
    report : what the last call did, in a line.
    """

    def __init__(self, function: str = "main") -> None:
        self.function = function
        self.report = ""

    def __call__(self, mod: tvm.IRModule) -> tvm.IRModule:
        """The rewritten module; `mod` is unchanged."""
        func = mod[self.function]
        names = [str(param.name) for param in func.params]
        if LOGIT_INDICES in names:
            self.report = f"{self.function} takes {LOGIT_INDICES} itself"
            return mod
        num_tokens = shape_of(func.params[names.index("input_ids")])[1]
        rewriter = _Rewriter(func, num_tokens)
        updated = mod.clone()
        updated.update_func(mod.get_global_var(self.function), rewriter.rewrite())
        self.report = f"rows are taken before the product {rewriter.product}"
        return relax.transform.DeadCodeElimination()(updated)


class _Rewriter:
    def __init__(self, func: Any, num_tokens: Any) -> None:
        self.func = func
        self.num_tokens = num_tokens
        self.num_logits = tirx.Var("num_logits", "int64")
        self.indices = relax.Var(LOGIT_INDICES, relax.TensorType([self.num_logits], "int64"))
        self.definitions = {binding.var: binding.value for binding in bindings_of(func)}
        self.builder = relax.BlockBuilder()
        self.product = ""

    def rewrite(self) -> Any:
        func = self.func
        result = func.body.body
        outputs = self._fields(result)
        chain, product = self._walk(outputs[0])
        num_input = int(func.attrs["num_input"]) if func.attrs and "num_input" in func.attrs else len(func.params)
        blocks = []
        last = func.body.blocks[-1]
        for block in func.body.blocks:
            bindings = list(block.bindings)
            is_dataflow = isinstance(block, relax.DataflowBlock)
            if block.same_as(last):
                new_result = self._replay(bindings, chain, product, outputs, is_dataflow)
            blocks.append(relax.DataflowBlock(bindings) if is_dataflow else relax.BindingBlock(bindings))
        params = [*func.params[:num_input], self.indices, *func.params[num_input:]]
        body = relax.SeqExpr(blocks, new_result)
        function = relax.Function(params, body, new_result.ty, func.is_pure, func.attrs, func.span)
        return function.with_attr("num_input", num_input + 1)

    def _fields(self, result: Any) -> list[Any]:
        value = self.definitions.get(result, result)
        return list(value.fields) if isinstance(value, relax.Tuple) else [result]

    def _walk(self, logits: Any) -> tuple[list[tuple[Any, int]], Any]:
        """From the logits back to their product: what stands between, as (call, operand to follow), last first."""
        chain: list[tuple[Any, int]] = []
        var = logits
        while True:
            value: Any = self.definitions.get(var)
            name = op_name(value)
            if name == "relax.matmul" and len(known_shape(value.args[1]) or ()) == 2:
                self.product = str(var.name)
                return chain, value
            operand = self._operand(value, name)
            if operand is None:
                what = name or ("a parameter" if value is None else type(value).__name__)
                raise ModelError(
                    f"the first output of the function must be logits, a product with a matrix [k, vocab]; looking back from it, "
                    f"{what} ({getattr(var, 'name', '')}) stands in the way: return the logits first, or give the function an "
                    f"input {LOGIT_INDICES} that selects rows"
                )
            chain.append((value, operand))
            var = value.args[operand]

    def _operand(self, value: Any, name: str) -> int | None:
        if name == "relax.reshape" or name in _UNARY:
            return 0
        if name in _BINARY:
            on_tokens = [self._has_tokens(arg) for arg in value.args]
            return on_tokens.index(True) if on_tokens.count(True) == 1 else None
        return None

    def _has_tokens(self, x: Any) -> bool:
        shape = known_shape(x)
        return shape is None or any(static_int(dim) is None for dim in shape)

    def _replay(self, bindings: list[Any], chain: Any, product: Any, outputs: list[Any], is_dataflow: bool) -> Any:
        """Append the same operators on the chosen rows; returns the new result."""

        def emit(value: Any, name: str, output: bool = False) -> Any:
            value = self.builder.normalize(value)
            var = (relax.DataflowVar if is_dataflow and not output else relax.Var)(name, value.ty)
            bindings.append(relax.VarBinding(var, value))
            return var

        rows, weight = product.args
        axes = [axis for axis, dim in enumerate(shape_of(rows)) if same(dim, self.num_tokens)]
        if len(axes) != 1 or axes[0] == len(shape_of(rows)) - 1:
            raise ModelError(f"the product {self.product} has no single axis of num_tokens rows: {shape_of(rows)}")
        x = emit(relax.op.take(rows, self.indices, axis=axes[0], mode="fast"), "sampled_rows")
        x = emit(relax.op.matmul(x, weight, out_dtype=product.attrs.out_dtype), "sampled_product")
        for value, operand in reversed(chain):
            if op_name(value) == "relax.reshape":
                dims = [self.num_logits if same(dim, self.num_tokens) else dim for dim in shape_of(value)]
                x = emit(relax.op.reshape(x, dims), "sampled_logits")
            else:
                args = [x if i == operand else arg for i, arg in enumerate(value.args)]
                x = emit(relax.Call(value.op, args, value.attrs), "sampled_logits")
        return emit(relax.Tuple([x, *outputs[1:]]), "sampled_outputs", output=True)
