"""Transposes that meet elementwise code move through it.

A model that applies rotary embeddings in [heads, tokens, head_dim] transposes the projection before and the rewritten attention
transposes back after: permute, elementwise and slices, permute. Written in the order of the last permute, both disappear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import ir, relax

from .nodes import bindings_of, known_shape, op_name, shape_of, static_int, used_vars

_ELEMENTWISE = {
    f"relax.{name}"
    for name in (
        "add subtract multiply divide power maximum minimum negative abs exp log sqrt rsqrt tanh sigmoid "
        "sin cos astype where nn.silu nn.gelu nn.relu"
    ).split()
}


def hoist_permutes(func: Any) -> Any:
    """Replace every permute of an elementwise computation by the same computation on operands that need no transpose.

    Done only where every operand then is a plain reshape of what is there (a permute that cancels, a tensor whose permuted axes have
    length 1, a scalar) and where nothing else reads the intermediate results, so that no work is done twice.
    """
    hoister = _Hoister(func)
    blocks = []
    for block in func.body.blocks:
        bindings: list[Any] = []
        hoister.enter_block()
        for binding in block.bindings:
            value = binding.value
            if op_name(value) == "relax.permute_dims":
                axes = permute_axes(value)
                if hoister.is_profitable(binding.var, value.args[0], axes):
                    value = hoister.permuted(value.args[0], axes, bindings, isinstance(block, relax.DataflowBlock))
            bindings.append(relax.VarBinding(binding.var, value))
        is_dataflow = isinstance(block, relax.DataflowBlock)
        blocks.append(relax.DataflowBlock(bindings) if is_dataflow else relax.BindingBlock(bindings))
    body = relax.SeqExpr(blocks, func.body.body)
    return relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs, func.span)


def permute_axes(call: Any) -> tuple[int, ...]:
    """Axes of a permute_dims, written out and non-negative."""
    rank = len(shape_of(call.args[0]))
    if call.attrs.axes is None:
        return tuple(range(rank))[::-1]
    return tuple(int(axis) % rank for axis in call.attrs.axes)


def _keeps_order(shape: Sequence[Any], axes: Sequence[int]) -> bool:
    """Whether a permute moves axes of length 1 alone, and so is a reshape."""
    moved = [axis for axis in axes if static_int(shape[axis]) != 1]
    return moved == sorted(moved)


class _Hoister:
    """Rewrites expressions of one function in a permuted order of axes."""

    def __init__(self, func: Any) -> None:
        self._definitions = {binding.var: binding.value for binding in bindings_of(func)}
        self._users: dict[Any, list[Any]] = {}
        for var, value in self._definitions.items():
            for used in used_vars(value):
                self._users.setdefault(used, []).append(var)
        self._returned = set(used_vars(func.body.body))
        self._done: dict[tuple[Any, tuple[int, ...]], Any] = {}
        self._builder = relax.BlockBuilder()

    def enter_block(self) -> None:
        """Forget what earlier blocks computed: their dataflow variables are out of reach."""
        self._done.clear()

    def is_profitable(self, result: Any, source: Any, axes: tuple[int, ...]) -> bool:
        """Whether `permute(source, axes)`, bound to `result`, can be computed without a transpose and without repeated work."""
        inner: set[Any] = set()
        if not self._collect(source, axes, inner) or not inner:
            return False
        twins = {
            user for user in self._users.get(source, []) if self._is_permute(user, axes)
        }  # they share the new result
        inside = inner | {result} | twins
        return all(var not in self._returned and set(self._users.get(var, [])) <= inside for var in inner)

    def _is_permute(self, var: Any, axes: tuple[int, ...]) -> bool:
        value = self._definitions[var]
        return op_name(value) == "relax.permute_dims" and permute_axes(value) == axes

    def _collect(self, expr: Any, axes: tuple[int, ...], inner: set[Any]) -> bool:
        """Gather the intermediate results that would be computed in the new order; False where a transpose would stay."""
        shape = known_shape(expr)
        if shape is None or len(shape) > len(axes):
            return False
        value: Any = self._definitions.get(expr) if isinstance(expr, ir.Var) else None
        name = op_name(value)
        if name == "relax.permute_dims" and len(shape) == len(axes):
            before = permute_axes(value)
            composed = [before[axis] for axis in axes]
            if _keeps_order(shape_of(value.args[0]), composed):
                return True
        if name in _ELEMENTWISE and len(shape) == len(axes):
            inner.add(expr)
            return all(self._collect(argument, axes, inner) for argument in value.args)
        if name == "relax.strided_slice" and len(shape) == len(axes) and len(value.args) == 5:
            inner.add(expr)
            return self._collect(value.args[0], axes, inner)
        if name == "relax.concat" and isinstance(value.args[0], relax.Tuple):
            inner.add(expr)
            return all(self._collect(part, axes, inner) for part in value.args[0].fields)
        padding = len(axes) - len(shape)
        return _keeps_order([1] * padding + list(shape), axes)

    def permuted(self, expr: Any, axes: tuple[int, ...], bindings: list[Any], is_dataflow: bool) -> Any:
        """A variable that holds `permute(expr, axes)`; emits what computes it. Only after is_profitable."""
        key = (expr, axes)
        if key in self._done:
            return self._done[key]
        shape = shape_of(expr)
        if not shape:
            return expr
        value: Any = self._definitions.get(expr) if isinstance(expr, ir.Var) else None
        name = op_name(value)
        is_full = len(shape) == len(axes)

        def recurse(part: Any) -> Any:
            return self.permuted(part, axes, bindings, is_dataflow)

        if name == "relax.permute_dims" and is_full and self._cancels(value, axes):
            new = relax.op.reshape(value.args[0], [shape[axis] for axis in axes])
        elif name in _ELEMENTWISE and is_full:
            new = relax.Call(value.op, [recurse(argument) for argument in value.args], value.attrs)
        elif name == "relax.strided_slice" and is_full:
            new = self._slice(value, axes, recurse(value.args[0]))
        elif name == "relax.concat" and isinstance(value.args[0], relax.Tuple):
            axis = axes.index(int(value.attrs.axis) % len(axes))
            new = relax.op.concat([recurse(part) for part in value.args[0].fields], axis=axis)
        else:
            padded = [1] * (len(axes) - len(shape)) + list(shape)
            new = relax.op.reshape(expr, [padded[axis] for axis in axes])
        new = self._builder.normalize(new)
        kind = relax.DataflowVar if is_dataflow else relax.Var
        var = kind(f"{expr.name}_packed" if isinstance(expr, ir.Var) else "constant_packed", new.ty)
        bindings.append(relax.VarBinding(var, new))
        self._done[key] = var
        return var

    def _cancels(self, call: Any, axes: tuple[int, ...]) -> bool:
        before = permute_axes(call)
        return _keeps_order(shape_of(call.args[0]), [before[axis] for axis in axes])

    def _slice(self, call: Any, axes: tuple[int, ...], source: Any) -> Any:
        """strided_slice of the permuted source: the same ranges on the axes' new places."""
        sliced, *ranges = call.args[1:]
        places = [axes.index(static_int(axis) or 0) for axis in sliced.fields]
        begin, end, strides = (list(part.fields) for part in ranges)
        return relax.op.strided_slice(source, places, begin, end, strides, call.attrs.assume_inbound)
