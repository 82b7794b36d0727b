"""RewritePagedAttention: attention over the current tokens becomes attention through a paged KV cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_infer.errors import ArgumentError, MatchError, ModelError

from . import extern_calls
from .layout import hoist_permutes
from .match import Attention, Matcher, Operand, format_shape
from .mixing import mixing_operators
from .nodes import dtype_of, known_shape, same, shape_of, static_int
from .report import Match, NotAttention, RewriteReport
from .views import simplify_views

PACKED_INPUTS = ("input_ids", "position_ids")
_ROTARY_MULTIPLES = {"cpu": 2, "cuda": 16}  # elements of a head that kernels turn at once


class RewritePagedAttention:
    """Replace attention over packed tokens by append + attend through a PagedKVCache parameter.

    The function takes the tokens of all sequences of a step in one row: `input_ids [1, n]` and `position_ids [1, n]` with a symbolic
    n, the sequences one after the other. It is exported as if the row were one sequence; after the rewrite every token attends to the
    keys of *its* sequence, which the cache knows from `begin_forward`, old and new ones alike. docs/relax.md has the details.

    The new parameter is opaque (R.Any) and stands after the first `num_input` parameters (attribute of the function; without it all
    parameters count as inputs) and before the weights. So TVM's RewriteCUDAGraph takes it for static.

    Parameters
    ----------
    function : name of the Relax function to rewrite, or None for every one that takes packed tokens.
    on_unmatched : "error" raises MatchError with all reasons if an attention cannot be proven; "keep" leaves it as it is (it then
        attends to the tokens of the step alone) and reports it.
    assume_full : names of parameters that are masks and hide nothing but what the causal mask hides.
    kv_param_name : name of the new parameter.
    lift_rope : let the attention call turn q and k where the pass can prove that this is what the model does (docs/relax.md); False
        leaves that to the model's own operators, whose position_ids then need not be the positions that the cache gives its tokens.
    target_kind : "cpu" or "cuda", for which the call turns multiples of 16 elements of a head.

    Attributes
    ----------
    report : RewriteReport of the last call.

    Raises
    ------
    ArgumentError : an option with another value. ModelError : no function takes packed tokens. MatchError : see on_unmatched.
    """

    def __init__(
        self,
        function: str | None = "main",
        on_unmatched: str = "error",
        assume_full: Sequence[str] = (),
        kv_param_name: str = "kv_cache",
        lift_rope: bool = True,
        target_kind: str = "cpu",
    ) -> None:
        if target_kind not in _ROTARY_MULTIPLES:
            raise ArgumentError(f'target_kind is {target_kind!r}; it must be "cpu" or "cuda"')
        if on_unmatched not in ("error", "keep"):
            raise ArgumentError(f'on_unmatched is {on_unmatched!r}; it must be "error" or "keep"')
        if isinstance(assume_full, str):
            raise ArgumentError(f"assume_full is the string {assume_full!r}; pass a list of parameter names")
        self.function = function
        self.on_unmatched = on_unmatched
        self.assume_full = tuple(assume_full)
        self.kv_param_name = kv_param_name
        self._rotary_multiple = _ROTARY_MULTIPLES[target_kind] if lift_rope else 0
        self.report = RewriteReport()

    def __call__(self, mod: tvm.IRModule) -> tvm.IRModule:
        """The rewritten module; `mod` is unchanged."""
        self.report = RewriteReport()
        original = mod
        names = self._functions(mod)
        transform = relax.transform
        # a dataflow variable ends with its block: where there are several, all variables become ordinary ones for the time being
        has_blocks = any(len(mod[name].body.blocks) > 1 for name in names)
        before = [transform.ToNonDataflow()] if has_blocks else []
        middle = [transform.ConvertToDataflow()] if has_blocks else []
        mod = tvm.transform.Sequential(before)(mod)
        rewritten = {name: self._rewrite(mod, name) for name in names}
        self._raise_refused()
        if not self.report.matched:
            return original
        mod = _updated(mod, rewritten)
        # what fed the old scores goes first: hoist_permutes leaves alone what has other readers
        mod = tvm.transform.Sequential([*middle, transform.DeadCodeElimination(), *before])(mod)
        mod = _updated(mod, {name: simplify_views(hoist_permutes(mod[name])) for name in names})
        cleanup = [*middle, transform.CanonicalizeBindings(), transform.DeadCodeElimination()]
        mod = tvm.transform.Sequential(cleanup)(mod)
        if not self.report.refused:  # an attention that is kept mixes tokens, of course
            self._check_mixing(mod, names)
        return mod

    def _raise_refused(self) -> None:
        if self.report.refused and self.on_unmatched == "error":
            reasons = "\n".join(f"  {reason}" for reason in self.report.refused)
            raise MatchError(f"{len(self.report.refused)} operator(s) cannot be rewritten:\n{reasons}")

    def _check_mixing(self, mod: tvm.IRModule, names: Sequence[str]) -> None:
        """Refuse what still computes across the tokens of a function that now serves several sequences."""
        for name in names:
            if not any(match.location.function == name for match in self.report.matched):
                continue
            reasons, notes = mixing_operators(name, mod[name], _num_tokens(mod[name]))
            self.report.refused += reasons
            self.report.assumptions += notes
        self._raise_refused()

    def _functions(self, mod: tvm.IRModule) -> list[str]:
        available = [str(var.name_hint) for var, func in mod.functions_items() if isinstance(func, relax.Function)]
        if self.function is None:
            names = [name for name in available if _packed_problem(mod[name]) is None]
            if not names:
                raise ModelError(f"none of the functions {available} takes packed tokens: {_packed_fix()}")
            return names
        if self.function not in available:
            raise ModelError(f"the module has no Relax function {self.function!r}; it has {available}: pass function=…")
        problem = _packed_problem(mod[self.function])
        if problem is not None:
            raise ModelError(f"function {self.function!r} does not take packed tokens: {problem}; {_packed_fix()}")
        return [self.function]

    def _rewrite(self, mod: tvm.IRModule, name: str) -> Any:
        func = mod[name]
        num_input = int(func.attrs["num_input"]) if func.attrs and "num_input" in func.attrs else len(func.params)
        names = [str(param.name) for param in func.params]
        unknown = [mask for mask in self.assume_full if mask not in names]
        if unknown:
            raise ArgumentError(
                f"assume_full names {unknown}, which are no parameters of {name!r}; it has {names[:num_input]}"
            )
        if self.kv_param_name in names:
            raise ArgumentError(
                f"kv_param_name {self.kv_param_name!r} is a parameter of {name!r} already; choose another name"
            )
        num_tokens = _num_tokens(func)
        positions = next(param for param in func.params if str(param.name) == PACKED_INPUTS[1])
        inputs, assume_full = func.params[:num_input], set(self.assume_full)
        found = Matcher(mod, name, num_tokens, inputs, positions, assume_full, self._rotary_multiple).run()
        attentions: list[Attention] = []
        for item in found:
            if isinstance(item, Attention):
                self.report.matched.append(
                    Match(len(attentions), item.spec, item.form, item.location, item.assumptions, item.rope)
                )
                attentions.append(item)
            elif isinstance(item, NotAttention):
                self.report.not_attention.append(item)
            else:
                self.report.refused.append(item)
        if not attentions:
            return func
        cache = relax.Var(self.kv_param_name, relax.AnyType())
        params = [*func.params[:num_input], cache, *func.params[num_input:]]
        body = _replace(func.body, attentions, cache, num_tokens)
        return relax.Function(params, body, func.ret_ty, func.is_pure, func.attrs, func.span)


def _updated(mod: tvm.IRModule, functions: Mapping[str, Any]) -> tvm.IRModule:
    """The module with some functions replaced."""
    updated = mod.clone()
    for name, func in functions.items():
        updated.update_func(mod.get_global_var(name), func)
    return updated


def _num_tokens(func: Any) -> Any:
    """The symbolic n of input_ids [1, n]."""
    return next(shape_of(param)[1] for param in func.params if str(param.name) == PACKED_INPUTS[0])


def _packed_fix() -> str:
    return (
        "it needs integer parameters input_ids [1, n] and position_ids [1, n] with one symbolic n (torch.export with a dynamic "
        "dimension; tvm_infer.relax.export_hf does so)"
    )


def _packed_problem(func: Any) -> str | None:
    """Why a function does not take packed tokens, None where it does."""
    params = {str(param.name): param for param in func.params}
    lengths = []
    for name in PACKED_INPUTS:
        if name not in params:
            return f"it has no parameter {name} (its parameters: {', '.join(list(params)[:8])}{', …' if len(params) > 8 else ''})"
        shape = known_shape(params[name])
        if shape is None or len(shape) != 2 or static_int(shape[0]) != 1:
            return f"{name} has shape {format_shape(shape)}, not [1, n]"
        if not dtype_of(params[name]).startswith("int"):
            return f"{name} is {dtype_of(params[name])}, not an integer"
        if static_int(shape[1]) is not None:
            return f"{name} has the fixed length {static_int(shape[1])}, n must be symbolic"
        lengths.append(shape[1])
    if not same(lengths[0], lengths[1]):
        return f"input_ids has length {lengths[0]}, position_ids {lengths[1]}: they must be one symbolic n"
    if not isinstance(func.body, relax.SeqExpr):
        return "its body is not a sequence of bindings (run relax.transform.Normalize first)"
    return None


def _replace(body: Any, attentions: Sequence[Attention], cache: Any, num_tokens: Any) -> Any:
    """The body with every attention's output bound to a call; what it made of its scores is left to dead-code elimination."""
    by_output = {attention.output: (layer, attention) for layer, attention in enumerate(attentions)}
    rotations = {attention.rotation for attention in attentions if attention.rotation is not None}
    frequencies = {rotation: relax.const(np.array(rotation.inv_freq, "float32")) for rotation in rotations}
    builder = relax.BlockBuilder()
    blocks = []
    for block in body.blocks:
        bindings: list[Any] = []

        def emit(value: Any, name: str, bindings: list[Any] = bindings, block: Any = block) -> Any:
            value = builder.normalize(value)
            kind = relax.DataflowVar if isinstance(block, relax.DataflowBlock) else relax.Var
            var = kind(name, value.ty)
            bindings.append(relax.VarBinding(var, value))
            return var

        for binding in block.bindings:
            entry = by_output.get(binding.var)
            if entry is None:
                bindings.append(binding)
                continue
            layer, attention = entry
            inv_freq = None if attention.rotation is None else frequencies[attention.rotation]
            call = _call(builder, emit, layer, attention, cache, num_tokens, inv_freq)
            bindings.append(relax.VarBinding(binding.var, call))
        is_dataflow = isinstance(block, relax.DataflowBlock)
        blocks.append(relax.DataflowBlock(bindings) if is_dataflow else relax.BindingBlock(bindings))
    return relax.SeqExpr(blocks, body.body)


def _call(builder: Any, emit: Any, layer: int, attention: Attention, cache: Any, num_tokens: Any, inv_freq: Any) -> Any:
    """Emit the packed call of one attention; returns its output in the shape and data type of what it replaces. inv_freq : of its
    rotation, as a constant."""
    spec = attention.spec
    q, k, v = (
        _packed_operand(emit, operand, num_tokens, width, f"{name}{layer}")
        for name, operand, width in (
            ("q", attention.q, spec.head_dim),
            ("k", attention.k, spec.head_dim),
            ("v", attention.v, spec.width_vo),
        )
    )
    out_ty = relax.TensorType([num_tokens, spec.num_qo_heads, spec.width_vo], spec.dtype)
    settings: dict[str, Any] = {"sm_scale": spec.sm_scale, "causal": spec.causal, "out_ty": out_ty}
    if attention.rotation is None:
        call = extern_calls.attention_with_kv_cache(cache, layer, q, k, v, **settings)
    else:
        settings |= {"interleaved": attention.rotation.interleaved, "magnitude": attention.rotation.magnitude}
        call = extern_calls.attention_with_kv_cache_rope(cache, layer, q, k, v, inv_freq, **settings)
        call = relax.TupleGetItem(emit(call, f"turned{layer}"), 1)  # item 0 is the queries, turned
    output = emit(call, f"attention{layer}")
    shape, dtype = shape_of(attention.output), dtype_of(attention.output)
    parts = [num_tokens, *attention.head_extents, spec.width_vo]
    if len(parts) != 3:
        output = emit(relax.op.reshape(output, parts), f"attention{layer}_heads")
    if list(attention.output_axes) != sorted(attention.output_axes):
        output = emit(relax.op.permute_dims(output, list(attention.output_axes)), f"attention{layer}_permuted")
    if dtype != spec.dtype:
        output = emit(relax.op.astype(output, dtype), f"attention{layer}_cast")
    return builder.normalize(relax.op.reshape(output, list(shape)))


def _packed_operand(emit: Any, operand: Operand, num_tokens: Any, head_dim: int, name: str) -> Any:
    """The operand as [num_tokens, heads, head_dim]."""
    tensor = operand.tensor
    if list(operand.axes) != sorted(operand.axes):
        tensor = emit(relax.op.permute_dims(tensor, list(operand.axes)), f"{name}_permuted")
    return emit(relax.op.reshape(tensor, [num_tokens, operand.num_heads, head_dim]), name)
