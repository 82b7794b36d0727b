"""Functions that were written against a cache object: which attentions they have, and where the cache stands among their parameters."""

from __future__ import annotations

from typing import Any

from tvm import relax, tirx

from tvm_infer.errors import ModelError
from tvm_infer.spec import AttentionSpec

from . import extern_calls
from .nodes import bindings_of, op_name, shape_of, static_int
from .report import Location, Match

_FUSED_QKV = extern_calls.ATTENTION_WITH_KV_CACHE_FUSED_QKV
_CALLS = (extern_calls.ATTENTION_WITH_KV_CACHE, extern_calls.ATTENTION_WITH_KV_CACHE_ROPE, _FUSED_QKV)


def packed_callee(value: Any) -> str:
    """The packed function that a call_dps_packed or call_pure_packed names, "" for anything else."""
    if op_name(value) in ("relax.call_dps_packed", "relax.call_pure_packed") and isinstance(
        value.args[0], relax.ExternFunc
    ):
        return str(value.args[0].global_symbol)
    return ""


def packed_arguments(value: Any) -> list[Any]:
    """The arguments of such a call, outputs left out."""
    arguments = list(value.args[1:])
    if op_name(value) == "relax.call_dps_packed" and len(arguments) == 1 and isinstance(arguments[0], relax.Tuple):
        return list(arguments[0].fields)
    return arguments


def scalar(value: Any) -> Any:
    """The number of a literal argument. ModelError for what is none."""
    value = getattr(value, "value", value)
    if isinstance(value, (tirx.IntImm, tirx.FloatImm)):
        value = value.value
    if isinstance(value, (bool, int, float)):
        return value
    raise ModelError(f"an argument is {value}, which is not known when the model is compiled: it must be a number")


def written_attentions(name: str, func: Any) -> list[Match]:
    """The attentions of a function that calls ours already (of a `relax.PagedKVCache`, or rewritten before), in program order.

    Raises ModelError where layers are not numbered 0, 1, … in that order: one cache has one layer for each.
    """
    found = []
    for binding in bindings_of(func):
        callee = packed_callee(binding.value)
        if callee not in _CALLS:
            continue
        arguments = packed_arguments(binding.value)
        layer, sm_scale, causal = (scalar(arguments[i]) for i in (1, -2, -1))
        out = binding.var.ty
        out = out.fields[-1] if isinstance(out, relax.TupleType) else out
        _, num_qo_heads, head_dim = (static_int(dim) for dim in out.shape.values)
        heads = static_int(shape_of(arguments[2 if callee == _FUSED_QKV else 3])[1])
        if num_qo_heads is None or head_dim is None or heads is None:
            raise ModelError(f"{name}/{binding.var.name}: heads and head_dim must be numbers, not {binding.var.ty}")
        num_kv_heads = (heads - num_qo_heads) // 2 if callee == _FUSED_QKV else heads
        spec = AttentionSpec(num_qo_heads, num_kv_heads, head_dim, str(out.dtype), bool(causal), float(sm_scale))
        found.append(Match(int(layer), spec, "PagedKVCache", Location(name, str(binding.var.name), callee)))
    layers = [match.layer for match in found]
    if layers != list(range(len(layers))):
        raise ModelError(
            f"function {name!r} has its attentions at the layers {layers}; they must be 0, 1, … in this order"
        )
    return found


def written_rope(mod: Any) -> dict[str, Any] | None:
    """How the cache that a module makes rotates q and k of fused calls: its `inv_freq` (numbers), `interleaved`, `magnitude`; None
    where the module makes no cache."""
    for _, func in mod.functions_items():
        if not isinstance(func, relax.Function):
            continue
        for binding in bindings_of(func):
            if packed_callee(binding.value) == extern_calls.KV_CACHE_CREATE_LIKE:
                _, _, inv_freq, interleaved, magnitude = packed_arguments(binding.value)
                return {
                    "inv_freq": [float(scalar(x)) for x in inv_freq.fields],
                    "interleaved": bool(scalar(interleaved)),
                    "magnitude": float(scalar(magnitude)),
                }
    return None


def cache_parameter(func: Any) -> Any | None:
    """The one opaque parameter of a function, None without. ModelError for several: which is the cache?"""
    opaque = [param for param in func.params if isinstance(param.ty, relax.AnyType)]
    if len(opaque) > 1:
        raise ModelError(f"the parameters {[str(p.name) for p in opaque]} are all opaque; a function takes one cache")
    return opaque[0] if opaque else None


def lift_cache(func: Any) -> Any:
    """The function with its cache behind the inputs that change from call to call: attribute `num_input` one less, the order otherwise
    kept. RewriteCUDAGraph takes a parameter there for fixed, so that calls with the cache can be captured."""
    cache = cache_parameter(func)
    params = list(func.params)
    num_input = int(func.attrs["num_input"]) if func.attrs and "num_input" in func.attrs else len(params)
    index = next((i for i, p in enumerate(params) if cache is not None and p.same_as(cache)), len(params))
    if index >= num_input:
        return func
    params.insert(num_input - 1, params.pop(index))
    lifted = relax.Function(params, func.body, func.ret_ty, func.is_pure, func.attrs, func.span)
    return lifted.with_attr("num_input", num_input - 1)
