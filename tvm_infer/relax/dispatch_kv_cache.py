"""DispatchKVCacheCreation: a model written against TVM's or MLC's KV cache runs on ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.ir import StringImm

from tvm_infer.errors import ArgumentError, MatchError

from . import extern_calls
from .cache_creation import ROPE_INLINE, ROPE_NONE, CacheArguments
from .kv_cache import is_absent, rope_of
from .nodes import bindings_of
from .report import Location, Reason
from .written import lift_cache, packed_arguments, packed_callee, scalar

GENERIC = "mlc.create_paged_kv_cache_generic"
BUILTIN = "vm.builtin.paged_attention_kv_cache_create"
_CALLS = "vm.builtin.attention_kv_cache_"
_KINDS = {0: "mha", 1: "mla", 2: "linear", 3: "mha_sliding"}  # tvm.relax.frontend.nn.llm.kv_cache.AttnKind
# Where the call has the kernel that splits and rotates q, k and v; after it come those that copy a page, show pages, compact
_SPLIT_ROTARY = -4
_RENAMED = frozenset(("attention_with_fused_qkv",))
# They make their plans or positions within the step, which a replayed graph would not: under TVM's names they stay out of graphs.
_KEPT = frozenset(("self_attention", "cross_attention", "merge_attn_output_inplace", "get_query_positions"))


@dataclass(frozen=True)
class Creation:
    """One creation call that now makes our cache. form : which call it was."""

    location: Location
    form: str
    arguments: CacheArguments


@dataclass
class CacheReport:
    """What one run of DispatchKVCacheCreation did.

    creations : rewritten. renamed : attention calls by location, with their new names. lifted : functions whose cache parameter now
        stands after their inputs. refused : arguments and calls that cannot be served, each with the reason.
    """

    creations: list[Creation] = field(default_factory=list)
    renamed: list[tuple[Location, str]] = field(default_factory=list)
    lifted: list[str] = field(default_factory=list)
    refused: list[Reason] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{len(self.creations)} cache creation(s), {len(self.renamed)} attention call(s), {len(self.refused)} refused"
        ]
        for creation in self.creations:
            a = creation.arguments
            inline = "inline " if a.rope_mode == ROPE_INLINE else ""
            rope = "no rope" if a.rope_mode == ROPE_NONE else f"{inline}rope theta {a.rope_theta:g}"
            lines.append(
                f"  {creation.location}: {creation.form}, {a.num_hidden_layers} layers, {a.num_attention_heads}/"
                f"{a.num_key_value_heads} heads of {a.qk_head_dim}, {a.dtype}, {rope}"
            )
        counts: dict[tuple[str, str], int] = {}
        for location, name in self.renamed:
            counts[location.function, name] = counts.get((location.function, name), 0) + 1
        lines += [f"  {count:4d} x  {name} in {function}" for (function, name), count in counts.items()]
        if self.lifted:
            lines.append(f"  cache after the inputs, so that a CUDA graph can hold its calls: {', '.join(self.lifted)}")
        lines += [f"refused: {reason}" for reason in self.refused]
        return "\n".join(lines)


class _Refused(Exception):
    """(what was seen, why, fix)."""


class DispatchKVCacheCreation:
    """Put our cache in the place of TVM's or MLC's, in a module that was written for theirs.

    Creations (MLC's `mlc.create_paged_kv_cache_generic`; TVM's `vm.builtin.paged_attention_kv_cache_create`, which `TIRPagedKVCache`
    and `FlashInferPagedKVCache` emit) become `tvm_infer.mlc_kv_cache_create`: an object that TVM's `vm.builtin.kv_state_*` take as
    they take their own. Calls of `vm.builtin.attention_kv_cache_attention_with_fused_qkv` get a name of ours, because RewriteCUDAGraph
    leaves out every call whose name starts with `vm.builtin` (attention in parts and query positions keep theirs: they may not be
    captured); and the cache parameter moves behind the inputs (attribute `num_input` one less), so that it
    counts as fixed. TVM's kernels, which nothing calls any more, are removed. Load `tvm_infer.runtime.mlc_library` before the module
    runs.

    TVM's creation call does not say the rotary scaling: it is inside the kernel that the call names. The pass makes that kernel again
    from `rope_scaling` and `rotary_dim` and compares: what differs is refused.

    Parameters
    ----------
    target : what the module is compiled for; kinds llvm and cuda. rope_scaling, rotary_dim : of models whose cache TVM's call
        creates; default: no scaling, whole heads. on_unsupported : "error" raises MatchError with all reasons; "keep" leaves a module
        with anything unsupported as it is, and reports it.

    Attributes
    ----------
    report : CacheReport of the last call.

    Raises
    ------
    ArgumentError : a target of another kind, another on_unsupported. MatchError : see there.
    """

    def __init__(
        self,
        target: Any,
        *,
        rope_scaling: Mapping[str, Any] | None = None,
        rotary_dim: int | None = None,
        on_unsupported: str = "error",
    ) -> None:
        kind = tvm.target.Target(target).kind.name if not hasattr(target, "kind") else target.kind.name
        if kind not in ("llvm", "cuda"):
            raise ArgumentError(f"target is of kind {kind!r}; our cache has executors for llvm and cuda")
        if on_unsupported not in ("error", "keep"):
            raise ArgumentError(f'on_unsupported is {on_unsupported!r}; it must be "error" or "keep"')
        self.rope_scaling, self.rotary_dim = dict(rope_scaling or {}), rotary_dim
        self.on_unsupported = on_unsupported
        self.report = CacheReport()
        self._kernels: set[Any] = set()  # that the replaced creations named

    def __call__(self, mod: tvm.IRModule) -> tvm.IRModule:
        """The rewritten module; `mod` is unchanged."""
        self.report, self._kernels = CacheReport(), set()
        updated = mod.clone()
        for var, func in mod.functions_items():
            if isinstance(func, relax.Function) and isinstance(func.body, relax.SeqExpr):
                updated.update_func(var, self._rewrite(mod, str(var.name_hint), func))
        if self.report.refused:
            if self.on_unsupported == "error":
                reasons = "\n".join(f"  {reason}" for reason in self.report.refused)
                raise MatchError(
                    f"{len(self.report.refused)} argument(s) or call(s) of a KV cache are not supported:\n{reasons}"
                )
            return mod
        unused = self._kernels - _named_in(updated)
        kept = {var: func for var, func in updated.functions_items() if var not in unused}
        return relax.transform.Normalize()(tvm.IRModule(kept, attrs=updated.attrs))

    def _rewrite(self, mod: tvm.IRModule, name: str, func: Any) -> Any:
        builder = relax.BlockBuilder()
        blocks, touched = [], False
        for block in func.body.blocks:
            bindings: list[Any] = []
            for binding in block.bindings:
                value = self._replacement(mod, name, binding, bindings, isinstance(block, relax.DataflowBlock))
                if value is not None:
                    touched = True
                    binding = relax.VarBinding(binding.var, builder.normalize(value))
                bindings.append(binding)
            is_dataflow = isinstance(block, relax.DataflowBlock)
            blocks.append(relax.DataflowBlock(bindings) if is_dataflow else relax.BindingBlock(bindings))
        if not touched:
            return func
        body = relax.SeqExpr(blocks, func.body.body)
        rewritten = relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs, func.span)
        lifted = lift_cache(rewritten)
        if lifted is not rewritten:
            self.report.lifted.append(name)
        return lifted

    def _replacement(
        self, mod: tvm.IRModule, name: str, binding: Any, bindings: list[Any], dataflow: bool
    ) -> Any | None:
        """What the binding's value becomes, None if it stays; a tensor that it needs is bound before it."""
        callee = packed_callee(binding.value)
        location = Location(name, str(getattr(binding.var, "name", "")), callee)
        if callee.startswith(_CALLS):
            return self._renamed(location, binding.value, callee.removeprefix(_CALLS))
        if callee not in (GENERIC, BUILTIN):
            return None
        given = packed_arguments(binding.value)
        try:
            arguments = _generic(given) if callee == GENERIC else self._builtin(mod, given)
        except _Refused as refused:
            self.report.refused.append(Reason(location, *refused.args))
            return None
        problems = arguments.unsupported(has_windows=True)
        if problems:
            self.report.refused += [Reason(location, f"{p.name} = {p.value}", p.why, p.fix) for p in problems]
            return None
        try:
            rope_of(arguments)
        except ArgumentError as error:
            scaling = f"rope_scaling = {dict(arguments.rope_scaling)}"
            self.report.refused.append(Reason(location, scaling, str(error), "keep TVM's cache for this model"))
            return None
        self.report.creations.append(Creation(location, callee, arguments))
        self._kernels |= _globals_of(binding.value)
        if callee == BUILTIN:
            return extern_calls.mlc_kv_cache_create(arguments, given[12])
        zeros = relax.BlockBuilder().normalize(relax.op.zeros((), arguments.dtype))
        like = (relax.DataflowVar if dataflow else relax.Var)("cache_like", zeros.ty)
        bindings.append(relax.VarBinding(like, zeros))
        return extern_calls.mlc_kv_cache_create(arguments, like)

    def _renamed(self, location: Location, value: Any, call: str) -> Any | None:
        if call in _KEPT:
            return None
        if call not in _RENAMED:
            why = "our cache has no such operation"
            fix = "keep TVM's cache for this model"
            self.report.refused.append(Reason(location, f"{_CALLS}{call}", why, fix))
            return None
        name = f"{extern_calls.MLC_PREFIX}{call}"
        self.report.renamed.append((location, name))
        arguments = [relax.ExternFunc(name), *value.args[1:]]
        return relax.Call(value.op, arguments, value.attrs, value.ty_args, value.span)

    def _builtin(self, mod: tvm.IRModule, given: list[Any]) -> CacheArguments:
        """The arguments of TVM's creation call: 28, or 29 with a kernel for latent attention's pages."""
        if len(given) not in (28, 29):
            raise _Refused(
                f"{len(given)} arguments", "TVM 0.27 creates its cache with 28 or 29", "compile with TVM 0.27"
            )
        kinds, head_dim = tuple(_KINDS.get(int(k), str(k)) for k in given[6].values), int(scalar(given[4]))
        arguments = CacheArguments(
            attn_kind=kinds,
            **_sizes(given[0]),
            layer_partition=tuple(given[1].values),
            num_hidden_layers=len(kinds),
            num_attention_heads=int(scalar(given[2])),
            num_key_value_heads=int(scalar(given[3])),
            qk_head_dim=head_dim,
            v_head_dim=int(scalar(given[5])),
            enable_disaggregation=bool(scalar(given[7])),
            rope_mode=int(scalar(given[8])),
            rope_scale=float(scalar(given[9])),
            rope_theta=float(scalar(given[10])),
            rope_ext_factors=None if is_absent(given[11]) else given[11],
            dtype=str(given[12].ty.dtype),
            rotary_dim=head_dim if self.rotary_dim is None else self.rotary_dim,
            rope_scaling=self.rope_scaling,
        )
        if arguments.rope_mode != ROPE_NONE and not arguments.unsupported(has_windows=True):
            self._check_rotary_kernel(mod, given[_SPLIT_ROTARY], arguments)
        return arguments

    def _check_rotary_kernel(self, mod: tvm.IRModule, kernel: Any, arguments: CacheArguments) -> None:
        from tvm.relax.frontend.nn.llm.position_embedding import llama_rope_with_position_map

        a = arguments
        for number in (float, int):  # a base of 10000 and one of 10000.0 print differently, and both are common
            expected = llama_rope_with_position_map(
                number(a.rope_theta),
                number(a.rope_scale),
                a.qk_head_dim,
                a.num_attention_heads,
                a.num_key_value_heads,
                a.dtype,
                dict(a.rope_scaling),
                a.rotary_dim,
            )
            if _same_body(mod[kernel], expected):
                return
        raise _Refused(
            f"{kernel.name_hint}, rope_scaling = {dict(a.rope_scaling)}, rotary_dim = {a.rotary_dim}",
            "the kernel that rotates q and k is another than these settings give",
            "pass the model's rope_scaling and rotary_dim to DispatchKVCacheCreation",
        )


def _same_body(a: Any, b: Any) -> bool:
    plain = tirx.PrimFunc
    first, second = (plain(f.params, f.body, f.ret_type) for f in (a, b))
    return bool(tvm_ffi.structural_equal(first, second, map_free_vars=True))


def _generic(given: list[Any]) -> CacheArguments:
    """The 18 arguments of MLC's creation call."""
    if len(given) != 18:
        raise _Refused(
            f"{len(given)} arguments", "MLC creates its cache with 18", "compile with an MLC of TVM 0.27's time"
        )
    kinds, num_layers = given[0], int(scalar(given[3]))
    single = not isinstance(kinds, relax.Tuple)
    return CacheArguments(
        attn_kind=(str(kinds.value),) * num_layers if single else tuple(str(k.value) for k in kinds.fields),
        **_sizes(given[1]),
        layer_partition=tuple(given[2].values),
        num_hidden_layers=num_layers,
        num_attention_heads=int(scalar(given[4])),
        num_key_value_heads=int(scalar(given[5])),
        qk_head_dim=int(scalar(given[6])),
        v_head_dim=int(scalar(given[7])),
        mla_original_qk_head_dim=int(scalar(given[8])),
        mla_original_v_head_dim=int(scalar(given[9])),
        rope_mode=int(scalar(given[10])),
        rope_scale=float(scalar(given[11])),
        rope_theta=float(scalar(given[12])),
        rope_scaling=json.loads(given[13].value) if isinstance(given[13], StringImm) else {},
        rope_ext_factors=None if is_absent(given[14]) else given[14],
        rotary_dim=int(scalar(given[15])),
        enable_disaggregation=bool(scalar(given[16])),
        dtype=str(given[17].value),
    )


def _sizes(shape: Any) -> dict[str, Any]:
    """The five sizes with which both calls begin; TVM's goes on with the window of sliding layers, which MLC's may leave out."""
    names = ("max_batch_size", "max_total_seq_len", "prefill_chunk_size", "page_size", "support_sliding_window")
    return dict(zip((*names, "layer_sliding_window_size"), shape.values, strict=False))


def _globals_of(value: Any) -> set[Any]:
    """Functions of the module that an expression names."""
    if isinstance(value, tvm.ir.GlobalVar):
        return {value}
    parts = value.fields if isinstance(value, relax.Tuple) else getattr(value, "args", ())
    inside = {value.op} if isinstance(getattr(value, "op", None), tvm.ir.GlobalVar) else set()
    return inside.union(*(_globals_of(part) for part in parts))


def _named_in(mod: tvm.IRModule) -> set[Any]:
    """Functions that the Relax functions of a module name."""
    functions = [f for _, f in mod.functions_items() if isinstance(f, relax.Function)]
    return set().union(*(_globals_of(b.value) for f in functions for b in bindings_of(f)))
