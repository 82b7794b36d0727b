"""DispatchKVCacheCreation: before / expected modules, and what it refuses."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.llm import kv_cache as tvm_cache
from tvm.script import ir as I
from tvm.script import relax as R

from tvm_infer import _ffi, blas
from tvm_infer.bench.serve_models import TINY
from tvm_infer.errors import ArgumentError, MatchError
from tvm_infer.models.mlc_llama import export_llama
from tvm_infer.relax import DispatchKVCacheCreation, pipeline
from tvm_infer.runtime import mlc_names

TARGET = {"kind": "llvm"}
max_batch, max_total, chunk, page, window, n = (
    TypeVar(name) for name in ("max_batch", "max_total", "chunk", "page", "window", "n")
)
SIZES = ("max_batch_size", "max_total_seq_len", "prefill_chunk_size", "page_size", "support_sliding_window")


def check(before, expected, **options) -> DispatchKVCacheCreation:
    original = before.clone()
    dispatch = DispatchKVCacheCreation(TARGET, **options)
    tvm.ir.assert_structural_equal(dispatch(before), expected, map_free_vars=True)
    tvm.ir.assert_structural_equal(before, original)
    return dispatch


@I.ir_module
class Generic:
    """MLC's creation call and a layer of attention."""

    @R.function
    def create(
        a: R.Shape([max_batch]), b: R.Shape([max_total]), c: R.Shape([chunk]), d: R.Shape([page]), e: R.Shape([window])
    ) -> R.Any:
        R.func_attr({"num_input": 5})
        with R.dataflow():
            kv = R.call_pure_packed(
                "mlc.create_paged_kv_cache_generic",
                R.str("mha"),
                R.shape([max_batch, max_total, chunk, page, window]),
                R.shape([0, 1]),
                R.prim_value(1),
                R.prim_value(4),
                R.prim_value(2),
                R.prim_value(16),
                R.prim_value(16),
                R.prim_value(0),
                R.prim_value(0),
                R.prim_value(1),
                R.prim_value(1),
                R.prim_value(10000),
                R.str("{}"),
                R.prim_value(0),
                R.prim_value(16),
                R.prim_value(0),
                R.str("float16"),
                ty_args=R.Any,
            )
            R.output(kv)
        return kv

    @R.function
    def decode(qkv: R.Tensor((n, 8, 16), "float16"), kv_cache: R.Any, w: R.Tensor((16,), "float16")) -> R.Tuple(
        R.Tensor((n, 4, 16), "float16"), R.Any
    ):
        R.func_attr({"num_input": 2})
        with R.dataflow():
            positions = R.call_pure_packed(
                "vm.builtin.attention_kv_cache_get_query_positions", kv_cache, ty_args=R.Tensor((n,), "int32")
            )
            o = R.call_dps_packed(
                "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
                (kv_cache, R.prim_value(0), R.prim_value(0.25), qkv),
                out_ty=R.Tensor((n, 4, 16), "float16"),
            )
            scaled = R.multiply(o, w)
            y = R.multiply(scaled, R.reshape(R.astype(positions, "float16"), R.shape([n, 1, 1])))
            out = (y, kv_cache)
            R.output(out)
        return out

    @R.function
    def other(x: R.Tensor((n,), "float32"), state: R.Any) -> R.Tensor((n,), "float32"):
        R.func_attr({"num_input": 2})
        with R.dataflow():
            y = R.add(x, x)
            R.output(y)
        return y


@I.ir_module
class Expected:
    @R.function
    def create(
        a: R.Shape([max_batch]), b: R.Shape([max_total]), c: R.Shape([chunk]), d: R.Shape([page]), e: R.Shape([window])
    ) -> R.Any:
        R.func_attr({"num_input": 5})
        with R.dataflow():
            like = R.zeros(R.shape([]), "float16")
            kv = R.call_pure_packed(
                "tvm_infer.mlc_kv_cache_create",
                R.shape([max_batch, max_total, chunk, page, window]),
                R.shape([0, 1]),
                R.prim_value(1),
                R.prim_value(4),
                R.prim_value(2),
                R.prim_value(16),
                R.prim_value(16),
                R.shape([0]),
                R.prim_value(0),
                R.prim_value(0),
                R.prim_value(1),
                R.prim_value(1.0),
                R.prim_value(10000.0),
                R.str(""),
                R.prim_value(0),
                R.prim_value(16),
                R.prim_value(0),
                like,
                ty_args=R.Any,
            )
            R.output(kv)
        return kv

    @R.function
    def decode(qkv: R.Tensor((n, 8, 16), "float16"), kv_cache: R.Any, w: R.Tensor((16,), "float16")) -> R.Tuple(
        R.Tensor((n, 4, 16), "float16"), R.Any
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            positions = R.call_pure_packed(
                "vm.builtin.attention_kv_cache_get_query_positions", kv_cache, ty_args=R.Tensor((n,), "int32")
            )
            o = R.call_dps_packed(
                "tvm_infer.mlc_attention_with_fused_qkv",
                (kv_cache, R.prim_value(0), R.prim_value(0.25), qkv),
                out_ty=R.Tensor((n, 4, 16), "float16"),
            )
            scaled = R.multiply(o, w)
            y = R.multiply(scaled, R.reshape(R.astype(positions, "float16"), R.shape([n, 1, 1])))
            out = (y, kv_cache)
            R.output(out)
        return out

    @R.function
    def other(x: R.Tensor((n,), "float32"), state: R.Any) -> R.Tensor((n,), "float32"):
        R.func_attr({"num_input": 2})
        with R.dataflow():
            y = R.add(x, x)
            R.output(y)
        return y


def test_mlc_creation_and_calls():
    report = check(Generic, Expected).report
    assert len(report.creations) == 1 and report.lifted == ["decode"] and not report.refused
    assert [name for _, name in report.renamed] == [
        "tvm_infer.mlc_attention_with_fused_qkv",
    ]
    assert "1 layers, 4/2 heads of 16, float16, rope theta 10000" in str(report)


def test_a_second_run_changes_nothing():
    dispatch = check(Expected, Expected)
    assert str(dispatch.report) == "0 cache creation(s), 0 attention call(s), 0 refused"


def relax_functions(mod):
    return sorted(str(v.name_hint) for v, f in mod.functions_items() if isinstance(f, relax.Function))


def test_tvm_creation_gives_the_same_cache_as_mlcs():
    """TIRPagedKVCache and MLC's call of the same model end as one module, TVM's kernels gone."""
    target = tvm.target.Target(TARGET)
    tir, generic = (
        DispatchKVCacheCreation(target)(export_llama(TINY, cache=kind, target=target).mod)
        for kind in ("tir", "generic")
    )
    tvm.ir.assert_structural_equal(tir["create_paged_kv_cache"], generic["create_paged_kv_cache"], map_free_vars=True)
    names = [sorted(str(v.name_hint) for v, _ in mod.functions_items()) for mod in (tir, generic)]
    assert names[0] == names[1]
    assert "batch_decode" in names[0] and not any("paged_kv_cpu" in name for name in names[0])
    text = tir.script()
    assert "vm.builtin" not in text


def create_tir(constructor=tvm_cache.TIRPagedKVCache, **changes):
    class Creator(nn.Module):
        def create(self, max_batch_size, max_total_seq_len, prefill_chunk_size, page_size, support_sliding_window):
            sizes = (max_batch_size, max_total_seq_len, prefill_chunk_size, page_size, support_sliding_window)
            arguments = {
                "layer_partition": relax.ShapeExpr([0, 2]),
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "qk_head_dim": 16,
                "v_head_dim": 16,
                "mla_original_qk_head_dim": 0,
                "mla_original_v_head_dim": 0,
                "rope_mode": tvm_cache.RopeMode.NORMAL,
                "rope_scale": 1,
                "rope_theta": 10000,
                "rope_scaling": {},
                "rope_ext_factors": relax.prim_value(0),
                "rotary_dim": 16,
                "enable_disaggregation": False,
                "dtype": "float32",
                "target": tvm.target.Target(TARGET),
            }
            attn_kind = changes.pop("attn_kind", "mha")
            return constructor(attn_kind, *sizes, **{**arguments, **changes})

    spec = {**dict.fromkeys(SIZES, int), "$": {"param_mode": "none", "effect_mode": "none"}}
    return Creator().export_tvm({"create": spec})[0]


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("theta", [10000, 500000.0])
def test_the_base_of_the_frequencies_is_read(theta):
    dispatch = DispatchKVCacheCreation(TARGET)
    dispatch(create_tir(rope_theta=theta))
    assert dispatch.report.creations[0].arguments.rope_theta == theta


def test_rope_scaling_that_the_call_does_not_say_must_be_given():
    before = create_tir(rope_scaling=LLAMA3)
    with pytest.raises(
        MatchError, match=r"fused_rope, rope_scaling = \{\}, rotary_dim = 16[\s\S]*pass the model's rope_scaling"
    ):
        DispatchKVCacheCreation(TARGET)(before)
    dispatch = DispatchKVCacheCreation(TARGET, rope_scaling=LLAMA3)
    after = dispatch(before)
    assert dict(dispatch.report.creations[0].arguments.rope_scaling) == LLAMA3
    assert '"rope_type": "llama3"' in after.script().replace('\\"', '"')
    with pytest.raises(MatchError, match="another than these settings give"):
        DispatchKVCacheCreation(TARGET, rope_scaling=LLAMA3)(create_tir())


def test_partial_rotation_must_be_given():
    before = create_tir(rotary_dim=8)
    with pytest.raises(MatchError, match="rotary_dim = 16"):
        DispatchKVCacheCreation(TARGET)(before)
    dispatch = DispatchKVCacheCreation(TARGET, rotary_dim=8)
    dispatch(before)
    assert dispatch.report.creations[0].arguments.rotary_dim == 8


def test_without_rope_the_kernel_does_not_matter():
    dispatch = DispatchKVCacheCreation(TARGET)
    dispatch(create_tir(rope_mode=tvm_cache.RopeMode.NONE, rope_scaling=LLAMA3))
    assert dispatch.report.creations[0].arguments.rope_mode == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_mode": 7}, r"no such mode[\s\S]*rope_mode = 7"),
        ({"layer_partition": relax.ShapeExpr([0, 1, 2])}, r"layer_partition = \[0, 1, 2\]"),
        ({"enable_disaggregation": True}, r"enable_disaggregation = True"),
        ({"v_head_dim": 32}, r"v_head_dim = 32"),
    ],
)
def test_unsupported_arguments_are_refused_by_name(changes, message):
    before = create_tir(**changes)
    with pytest.raises(MatchError, match=message):
        DispatchKVCacheCreation(TARGET)(before)
    keep = DispatchKVCacheCreation(TARGET, on_unsupported="keep")
    assert keep(before) is before
    assert len(keep.report.refused) == 1
    assert str(keep.report.refused[0].location).startswith("create/")


def test_layers_with_windows_are_passed_on():
    dispatch = DispatchKVCacheCreation(TARGET)
    after = dispatch(create_tir(attn_kind=["mha", "mha_sliding"], layer_sliding_window_size=48))
    assert dispatch.report.creations[0].arguments.attn_kind == ("mha", "mha_sliding")
    text = after.script()
    assert "support_sliding_window, 48])" in text and "R.shape([0, 3])" in text
    plain = DispatchKVCacheCreation(TARGET)(create_tir(layer_sliding_window_size=48)).script()
    assert "support_sliding_window])" in plain and "R.shape([0, 0])" in plain


def test_rotation_inline_is_passed_on():
    dispatch = DispatchKVCacheCreation(TARGET)
    dispatch(create_tir(rope_mode=tvm_cache.RopeMode.INLINE))
    assert dispatch.report.creations[0].arguments.rope_mode == 2
    assert "float32, inline rope theta 10000" in str(dispatch.report)
    with pytest.raises(MatchError, match=r"a multiple of 16[\s\S]*rotary_dim = 8[\s\S]*use RopeMode.NORMAL"):
        DispatchKVCacheCreation(TARGET, rotary_dim=8)(create_tir(rope_mode=tvm_cache.RopeMode.INLINE, rotary_dim=8))


def test_windows_of_sequences_are_passed_on_with_a_rotation():
    """Which is inline then: what cannot be is refused."""
    text = Generic.script()
    assert "chunk, page, window])" in text
    text = text.replace("chunk, page, window])", "chunk, page, 1])")
    after = DispatchKVCacheCreation(TARGET)(tvm.script.from_source(text))
    assert "mlc_kv_cache_create" in after.script()
    widths = "1, 4, 2, 16, 16, 0, 0, 1,"  # layers, heads, key and value widths …
    assert widths in text
    with pytest.raises(MatchError, match=r"multiple of 16[\s\S]*head_dim = 24[\s\S]*without windows of sequences"):
        DispatchKVCacheCreation(TARGET)(tvm.script.from_source(text.replace(widths, "1, 4, 2, 24, 24, 0, 0, 1,")))


def test_mlc_arguments_are_refused_by_name():
    text = Generic.script()
    for old, new, message in (
        ('R.str("mha")', 'R.str("mla")', "attn_kind = 'mla'"),
        ('R.str("float16")', 'R.str("int8")', "dtype = 'int8'"),
        ('R.str("{}")', 'R.str(\'{"rope_type": "su"}\')', "rope_scaling"),
    ):
        assert old in text
        before = tvm.script.from_source(text.replace(old, new))
        with pytest.raises(MatchError, match=message):
            DispatchKVCacheCreation(TARGET)(before)


def test_calls_that_our_cache_has_not_are_refused():
    @I.ir_module
    class Before:
        @R.function
        def f(q: R.Tensor((n, 4, 16), "float16"), kv_cache: R.Any) -> R.Tensor((n, 4, 16), "float16"):
            with R.dataflow():
                o = R.call_dps_packed(
                    "vm.builtin.attention_kv_cache_attention_with_shared_kv",
                    (kv_cache, R.prim_value(0), R.prim_value(0.25), q, q, q),
                    out_ty=R.Tensor((n, 4, 16), "float16"),
                )
                R.output(o)
            return o

    with pytest.raises(MatchError, match=r"f/o .*no such operation[\s\S]*attention_with_shared_kv"):
        DispatchKVCacheCreation(TARGET)(Before)


def test_renamed_calls_are_tvms_under_other_names():
    """Dispatched functions run on any cache that TVM's builtins take, TVM's own too, with the same result."""
    _ffi.library()
    blas.ensure_blas()
    target = pipeline.host_target()
    functions = ("embed", "batch_prefill", "create_paged_kv_cache")
    before = export_llama(TINY, cache="tir", target=target, functions=functions)
    attend = export_llama(TINY, cache="tir", target=target, functions=functions[:2])  # creates nothing
    dispatch = DispatchKVCacheCreation(target)
    after = dispatch(attend.mod)
    assert not dispatch.report.creations and len(dispatch.report.renamed) == TINY.num_layers
    mlc_names.register_call_names()
    machines = [
        relax.VirtualMachine(pipeline.lower_cpu(pipeline.prepare_unpaged(mod, {"seq_len": 32}), target), tvm.cpu())
        for mod in (before.mod, after)
    ]
    weights = [
        tvm.runtime.tensor(np.random.default_rng(i).standard_normal(shape).astype(np.float32) * 0.2)
        for i, (_, shape, _) in enumerate(before.weights)
    ]
    logits = []
    for vm in machines:
        kv = machines[0]["create_paged_kv_cache"](*(tvm_ffi.Shape((x,)) for x in (2, 64, 32, 16, 0)))
        tvm.get_global_func("vm.builtin.kv_state_add_sequence")(kv, 0)
        tvm.get_global_func("vm.builtin.kv_state_begin_forward")(kv, tvm_ffi.Shape((0,)), tvm_ffi.Shape((7,)))
        rows = vm["embed"](tvm.runtime.tensor(np.arange(7, dtype=np.int32)), *weights)
        last = tvm.runtime.tensor(np.array([6], np.int32))
        result = vm["batch_prefill"](rows._create_view((1, 7, TINY.hidden_size)), last, kv, *weights)
        logits.append(result[0].numpy())
    np.testing.assert_array_equal(*logits)
    assert np.abs(logits[0]).max() > 0.1


@I.ir_module
class Decode:
    """Two layers of attention between elementwise operators, of 4 sequences."""

    @R.function
    def decode(x: R.Tensor((4, 8, 16), "float16"), kv_cache: R.Any, w: R.Tensor((4, 4, 16), "float16")) -> R.Tensor(
        (4, 4, 16), "float16"
    ):
        R.func_attr({"num_input": 2})
        with R.dataflow():
            qkv = R.add(x, x)
            o = R.call_dps_packed(
                "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
                (kv_cache, R.prim_value(0), R.prim_value(0.25), qkv),
                out_ty=R.Tensor((4, 4, 16), "float16"),
            )
            y = R.multiply(o, w)
            qkv1 = R.concat((y, y), axis=1)
            o1 = R.call_dps_packed(
                "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
                (kv_cache, R.prim_value(1), R.prim_value(0.25), qkv1),
                out_ty=R.Tensor((4, 4, 16), "float16"),
            )
            out = R.multiply(o1, w)
            R.output(out)
        return out


def captured_attentions(mod):
    """(functions that RewriteCUDAGraph captures, attention calls in them)."""
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_90"}, host={"kind": "llvm"})
    names = ("RewriteDataflowReshape", "ToNonDataflow", "RemovePurityChecking", "CallTIRRewrite")
    passes = [relax.transform.LegalizeOps(), *(getattr(relax.transform, name)() for name in names)]
    passes += [relax.transform.StaticPlanBlockMemory(), relax.transform.RewriteCUDAGraph()]
    with target, tvm.transform.PassContext(config={"relax.backend.use_cuda_graph": True}):
        after = tvm.transform.Sequential(passes)(mod)
    texts = [f.script() for v, f in after.functions_items() if "capture" in str(v.name_hint)]
    return len(texts), sum(text.count("attention_with_fused_qkv") for text in texts)


def test_tvms_graph_pass_captures_the_renamed_calls():
    """One region with all attention inside; before the pass every call stands outside."""
    assert captured_attentions(Decode)[1] == 0
    assert captured_attentions(DispatchKVCacheCreation({"kind": "cuda", "arch": "sm_90"})(Decode)) == (1, 2)


def test_the_names_are_those_that_the_runtime_registers():
    from tvm_infer.relax import dispatch_kv_cache

    assert set(mlc_names.CALLS) == dispatch_kv_cache._RENAMED


def test_options_are_checked():
    with pytest.raises(ArgumentError, match="kind 'c'"):
        DispatchKVCacheCreation({"kind": "c"})
    with pytest.raises(ArgumentError, match="on_unsupported is 'skip'"):
        DispatchKVCacheCreation(TARGET, on_unsupported="skip")
