"""From a Relax module with attention over packed tokens to a VM executable: our passes, then TVM's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import relax
from tvm.relax.backend.cpu_generic import pipeline as cpu_generic
from tvm.s_tir import dlight

from tvm_infer.errors import ModelError

from . import decode_graph, extern_calls
from .decode_graph import DECODE, CaptureReport
from .dispatch_matmul import DispatchMatmul, MatmulReport
from .fuse_norm import FuseRMSNorm, NormReport
from .nodes import op_name, shape_of, static_int
from .norm_schedule import RowNorm
from .programmatic_launch import TIR_PIPELINE
from .report import RewriteReport
from .rewrite import RewritePagedAttention
from .sampled_rows import SampledRows
from .wide_sums import sum_in_float32
from .written import lift_cache, written_attentions, written_rope


@dataclass
class PassReports:
    """What each of our passes saw and did."""

    attention: RewriteReport = field(default_factory=RewriteReport)
    sampled_rows: str = ""
    norm: NormReport = field(default_factory=NormReport)
    matmul: MatmulReport = field(default_factory=MatmulReport)
    capture: CaptureReport | None = None  # of CUDA targets

    def __str__(self) -> str:
        parts = [
            f"Attention\n{self.attention}",
            f"Logits\n  {self.sampled_rows}",
            f"Norms\n{self.norm}",
            f"Matrix products\n{self.matmul}",
        ]
        if self.capture is not None:
            parts.append(f"CUDA graphs\n{self.capture}")
        return "\n\n".join(parts)


def prepare(
    mod: tvm.IRModule,
    *,
    function: str = "main",
    max_tokens: int,
    decode_rows: int = 0,
    on_unmatched: str = "error",
    assume_full: Sequence[str] = (),
    target_kind: str = "llvm",
) -> tuple[tvm.IRModule, PassReports]:
    """Our passes in their order: paged attention, logits of sampled rows only, norms as one operator, matrix products to the BLAS.

    max_tokens : upper bound of a step's tokens, by which TVM plans memory ahead. decode_rows : above 0, on CUDA, the module gets a
    function `decode` for steps of up to so many rows, in which every row samples. Raises ModelError, MatchError.
    """
    reports = PassReports()
    device = "cuda" if target_kind == "cuda" else "cpu"
    mod, reports.attention = _paged_attention(mod, function, on_unmatched, assume_full, device)
    has_decode = decode_rows > 0
    if has_decode:
        mod = decode_graph.add_decode_function(mod, function)
    rows = SampledRows(function)
    mod = rows(mod)
    reports.sampled_rows = rows.report
    if has_decode:
        mod = _with_greedy_tokens(mod, function)
    norms = FuseRMSNorm()
    mod = norms(mod)
    reports.norm = norms.report
    dispatch = DispatchMatmul(device)
    mod = dispatch(mod)
    reports.matmul = dispatch.report
    mod = _bound_tokens(_CheckedTakes(sum_in_float32(mod)).apply(), function, max_tokens)
    if has_decode:
        mod = _bound_tokens(mod, DECODE, decode_rows)
    return mod, reports


def _with_greedy_tokens(mod: tvm.IRModule, function: str) -> tvm.IRModule:
    updated = mod.clone()
    for name in (function, DECODE):
        updated.update_func(mod.get_global_var(name), decode_graph.with_greedy_tokens(mod[name]))
    return updated


def prepare_unpaged(mod: tvm.IRModule, bounds: Mapping[str, int], device: str = "cpu") -> tvm.IRModule:
    """The passes of :func:`prepare` that are not about attention, for a model that keeps another cache: norms as one operator,
    matrix products to the BLAS, checked lookups. bounds : upper bounds of symbolic sizes by name, for every function; device : "cpu" or
    "cuda"."""
    mod = _CheckedTakes(sum_in_float32(DispatchMatmul(device)(FuseRMSNorm()(mod)))).apply()
    updated = mod.clone()
    for var, func in mod.functions_items():
        if isinstance(func, relax.Function):
            updated.update_func(var, func.with_attr("tir_var_upper_bound", dict(bounds)))
    return updated


def _paged_attention(
    mod: tvm.IRModule, function: str, on_unmatched: str, assume_full: Sequence[str], device: str
) -> tuple[tvm.IRModule, RewriteReport]:
    """Attention through a cache: written so by the model's author (`relax.PagedKVCache`), or by our pass."""
    names = [str(var.name_hint) for var, func in mod.functions_items() if isinstance(func, relax.Function)]
    written = written_attentions(function, mod[function]) if function in names else []
    fused = extern_calls.ATTENTION_WITH_KV_CACHE_FUSED_QKV
    if written_rope(mod) is None and any(match.location.operator == fused for match in written):
        raise ModelError(
            f"function {function!r} leaves the rotation of q and k to its cache, and no function of the module makes one: export the "
            "model's create_paged_kv_cache beside it"
        )
    if not written:
        rewrite = RewritePagedAttention(
            function, on_unmatched=on_unmatched, assume_full=assume_full, target_kind=device
        )
        return rewrite(mod), rewrite.report
    # what else the module has (a function that makes the cache) belongs to other ways of running it
    alone = tvm.IRModule({var: func for var, func in mod.functions_items() if not isinstance(func, relax.Function)})
    alone[function] = lift_cache(mod[function])
    return relax.transform.DeadCodeElimination([function])(alone), RewriteReport(matched=written)


@relax.expr_functor.mutator
class _CheckedTakes(relax.PyExprMutator):
    """Lookups stay inside their table: TVM's default mode reads past it for an index out of range (and warns so on stderr)."""

    def apply(self) -> tvm.IRModule:
        for var, func in self.builder_.get().functions_items():
            if isinstance(func, relax.Function):
                self.builder_.update_func(var, self.visit_expr(func))
        return self.builder_.get()

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if op_name(call) == "relax.take" and str(call.attrs.mode) == "fast":
            axis = None if call.attrs.axis is None else int(call.attrs.axis)
            return relax.op.take(call.args[0], call.args[1], axis=axis, mode="clip")
        return call


def _bound_tokens(mod: tvm.IRModule, function: str, max_tokens: int) -> tvm.IRModule:
    func = mod[function]
    ids = next(param for param in func.params if param.name == "input_ids")
    length = shape_of(ids)[1]
    if static_int(length) is not None:
        return mod
    func = func.with_attr("tir_var_upper_bound", {str(length.name): max_tokens})
    updated = mod.clone()
    updated.update_func(mod.get_global_var(function), func)
    return updated


@dataclass(frozen=True)
class Lowered:
    """A compiled module. executable : tvm.relax.VMExecutable. The rest is of the captured function, if any (runtime.Manifest)."""

    executable: Any
    logits_dtype: str = "float32"
    decode_function: str = ""
    logits_rank: int = 2


def lower(
    mod: tvm.IRModule, target: Any, reports: PassReports, function: str = "main", *, programmatic_launch: bool = True
) -> Lowered:
    """TVM's pipeline for the target (legalise, fuse, plan memory, code). Adds to `reports` what is captured. programmatic_launch : of
    CUDA kernels (ProgrammaticLaunch)."""
    if str(target.kind.name) == "cuda":
        return _lower_cuda(mod, target, reports, function, TIR_PIPELINE if programmatic_launch else "default")
    return Lowered(lower_cpu(mod, target))


def lower_cpu(mod: tvm.IRModule, target: Any) -> Any:
    """TVM's pipeline for processors: a `tvm.relax.VMExecutable`.

    Fusion makes one kernel each of RMSNorm, rope and the gated activation, and a rope's transposes part of it, so that what is left
    of a step is its matmuls and attentions.
    """
    passes = [
        *cpu_generic.library_dispatch_passes(target),
        *cpu_generic.legalize_passes(target),
        *cpu_generic.dataflow_lower_passes(target),
        *cpu_generic.finalize_passes(target),
    ]
    with target, tvm.transform.PassContext(opt_level=3):
        return tvm.compile(mod, target=target, relax_pipeline=tvm.transform.Sequential(passes))


def lower_unpaged(mod: tvm.IRModule, target: Any, *, use_cuda_graph: bool = False) -> Any:
    """The same for a model of :func:`prepare_unpaged`, on either kind of target. use_cuda_graph : let TVM capture what it can (of
    functions whose symbolic sizes the attribute relax.rewrite_cuda_graph.capture_symbolic_vars names)."""
    if str(target.kind.name) != "cuda":
        return lower_cpu(mod, target)
    from tvm.relax.backend.cuda import pipeline as cuda

    passes = [
        *cuda.library_dispatch_passes(target),
        *legalize_for_cuda(target),
        *cuda.dataflow_lower_passes(target),
        *cuda.finalize_passes(target),
    ]
    config = {"relax.backend.use_cuda_graph": use_cuda_graph}
    with target, tvm.transform.PassContext(opt_level=3, config=config):
        return tvm.compile(mod, target=target, relax_pipeline=tvm.transform.Sequential(passes))


def legalize_for_cuda(target: Any) -> list[Any]:
    """TVM's operators as scheduled kernels, norms by our schedule."""
    from tvm.relax.backend.cuda import pipeline as cuda

    passes = cuda.legalize_passes(target)
    schedules = [str(step.info.name) for step in passes].index("ApplyDefaultSchedule")
    return [*passes[:schedules], dlight.ApplyDefaultSchedule(RowNorm()), *passes[schedules:]]


def _lower_cuda(mod: tvm.IRModule, target: Any, reports: PassReports, function: str, tir_pipeline: str) -> Lowered:
    from tvm.relax.backend.cuda import pipeline as cuda

    # RewriteCUDAGraph looks at every function: one without num_input has inputs only, nothing static
    num_input = int(mod[function].attrs["num_input"])
    mod = _updated(mod, function, mod[function].without_attr("num_input"))
    mod = _updated(mod, DECODE, decode_graph.make_static(mod[DECODE]))
    finalize = cuda.finalize_passes(target)
    names = [str(step.info.name) for step in finalize]
    split = names.index("RewriteCUDAGraph") + 1
    config = {"relax.backend.use_cuda_graph": True}
    with target, tvm.transform.PassContext(opt_level=3, config=config):
        lowered = [
            *cuda.library_dispatch_passes(target),
            *legalize_for_cuda(target),
            *cuda.dataflow_lower_passes(target),
        ]
        mod = tvm.transform.Sequential(lowered)(mod)
        mod = decode_graph.OutputBuffers()(mod)
        logits = next(param for param in mod[DECODE].params if str(param.name) == decode_graph.DECODE_LOGITS)
        mod = tvm.transform.Sequential(finalize[:split])(mod)
        why_not = "its number of tokens changes from step to step"
        reports.capture = decode_graph.report_capture(mod, {function: why_not, DECODE: ""})
        reports.capture.starts_early = tir_pipeline == TIR_PIPELINE
        # VMShapeLower checks inputs at every call, and of parameters behind num_input only those of symbolic shapes: 2 calls less for
        # each weight. Their types and shapes are the executable's to check, once, when it is given them.
        mod = _updated(mod, function, mod[function].with_attr("num_input", num_input))
        executable = tvm.compile(
            mod, target=target, relax_pipeline=tvm.transform.Sequential(finalize[split:]), tir_pipeline=tir_pipeline
        )
    return Lowered(executable, str(logits.ty.dtype), DECODE, len(shape_of(logits)))


def _updated(mod: tvm.IRModule, name: str, func: Any) -> tvm.IRModule:
    updated = mod.clone()
    updated.update_func(mod.get_global_var(name), func)
    return updated


CUDA_ARCH = "sm_90"  # of TVM's own kernels


def cuda_target() -> Any:
    """A Hopper GPU."""
    return tvm.target.Target({"kind": "cuda", "arch": CUDA_ARCH})


def host_target() -> Any:
    """LLVM for this machine's processor."""
    return tvm.target.Target({"kind": "llvm", "mcpu": _host_cpu()})


def _host_cpu() -> str:
    return str(tvm.target.codegen.llvm_get_system_cpu())


def entry_signature(mod: tvm.IRModule, function: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]], int]:
    """(inputs as (name, dtype), weights as (name, "dtype [shape]"), vocabulary size) of a prepared function; the cache stands between
    inputs and weights."""
    func = mod[function]
    kv = next((i for i, p in enumerate(func.params) if isinstance(p.ty, relax.AnyType)), None)
    if kv is None:  # no attention was rewritten
        kv = len(func.params)
    inputs = [(str(p.name), str(p.ty.dtype)) for p in func.params[:kv]]
    weights = [(str(p.name), f"{p.ty.dtype} {[int(n) for n in p.ty.shape.values]}") for p in func.params[kv + 1 :]]
    ret = func.ret_ty
    logits = ret.fields[0] if isinstance(ret, relax.TupleType) else ret
    return inputs, weights, int(logits.shape.values[-1])
