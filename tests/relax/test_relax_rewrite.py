"""Before / expected modules of RewritePagedAttention, one for each form that importers and frontends produce."""

from __future__ import annotations

import subprocess
import sys
from typing import TypeVar

import pytest
import tvm
from tvm.script import ir as I
from tvm.script import relax as R

from tvm_infer.errors import ArgumentError, MissingDependencyError, ModelError
from tvm_infer.relax import RewritePagedAttention, export_hf
from tvm_infer.spec import AttentionSpec

n = TypeVar("n")


def check(before, expected, **options) -> RewritePagedAttention:
    original = before.clone()
    rewrite = RewritePagedAttention(**options)
    tvm.ir.assert_structural_equal(rewrite(before), expected, map_free_vars=True)
    tvm.ir.assert_structural_equal(before, original)
    return rewrite


@I.ir_module
class Expected:
    """What every form of causal attention, 4 / 2 heads of 8, becomes: three reshapes and a call."""

    @R.function
    def main(
        input_ids: R.Tensor((1, n), "int64"),
        position_ids: R.Tensor((1, n), "int64"),
        x: R.Tensor((1, n, 64), "float32"),
        kv_cache: R.Any,
        w: R.Tensor((32, 8), "float32"),
    ) -> R.Tensor((1, n, 8), "float32"):
        R.func_attr({"num_input": 3})
        with R.dataflow():
            qkv = R.split(x, [32, 48], axis=-1)
            q_flat: R.Tensor((1, n, 32), "float32") = qkv[0]
            k_flat: R.Tensor((1, n, 16), "float32") = qkv[1]
            v_flat: R.Tensor((1, n, 16), "float32") = qkv[2]
            q = R.reshape(q_flat, R.shape([n, 4, 8]))
            k = R.reshape(k_flat, R.shape([n, 2, 8]))
            v = R.reshape(v_flat, R.shape([n, 2, 8]))
            o = R.call_dps_packed(
                "tvm_infer.attention_with_kv_cache",
                (kv_cache, R.prim_value(0), q, k, v, R.prim_value(0.5), R.prim_value(1)),
                out_ty=R.Tensor((n, 4, 8), "float32"),
            )
            flat = R.reshape(o, R.shape([1, n, 32]))
            y = R.matmul(flat, w)
            R.output(y)
        return y


@I.ir_module
class Spelled:
    """Multiply, causal mask by comparison, softmax; KV heads repeated by broadcast and reshape."""

    @R.function
    def main(
        input_ids: R.Tensor((1, n), "int64"),
        position_ids: R.Tensor((1, n), "int64"),
        x: R.Tensor((1, n, 64), "float32"),
        w: R.Tensor((32, 8), "float32"),
    ) -> R.Tensor((1, n, 8), "float32"):
        R.func_attr({"num_input": 3})
        with R.dataflow():
            qkv = R.split(x, [32, 48], axis=-1)
            q = R.permute_dims(R.reshape(qkv[0], R.shape([1, n, 4, 8])), [0, 2, 1, 3])
            k = R.permute_dims(R.reshape(qkv[1], R.shape([1, n, 2, 8])), [0, 2, 1, 3])
            v = R.permute_dims(R.reshape(qkv[2], R.shape([1, n, 2, 8])), [0, 2, 1, 3])
            k5 = R.broadcast_to(R.expand_dims(k, [2]), R.shape([1, 2, 2, n, 8]))
            v5 = R.broadcast_to(R.expand_dims(v, [2]), R.shape([1, 2, 2, n, 8]))
            k4 = R.reshape(k5, R.shape([1, 4, n, 8]))
            v4 = R.reshape(v5, R.shape([1, 4, n, 8]))
            scores = R.matmul(q, R.permute_dims(k4, [0, 1, 3, 2]))
            scaled = R.multiply(scores, R.const(0.5, "float32"))
            i = R.expand_dims(R.arange(0, n, 1, "int64"), [1])
            j = R.expand_dims(R.arange(0, n, 1, "int64"), [0])
            masked = R.where(R.less_equal(j, i), scaled, R.const(float("-inf"), "float32"))
            p = R.nn.softmax(masked, axis=-1)
            o = R.permute_dims(R.matmul(p, v4), [0, 2, 1, 3])
            flat = R.reshape(o, R.shape([1, n, 32]))
            y = R.matmul(flat, w)
            R.output(y)
        return y


@I.ir_module
class SafeSoftmax:
    """torch's decomposition of scaled_dot_product_attention: 3-D matmuls, additive mask, rows that are all masked set to 0."""

    @R.function
    def main(
        input_ids: R.Tensor((1, n), "int64"),
        position_ids: R.Tensor((1, n), "int64"),
        x: R.Tensor((1, n, 64), "float32"),
        w: R.Tensor((32, 8), "float32"),
    ) -> R.Tensor((1, n, 8), "float32"):
        R.func_attr({"num_input": 3})
        with R.dataflow():
            qkv = R.split(x, [32, 48], axis=-1)
            q = R.permute_dims(R.reshape(qkv[0], R.shape([1, n, 4, 8])), [0, 2, 1, 3])
            k = R.permute_dims(R.reshape(qkv[1], R.shape([1, n, 2, 8])), [0, 2, 1, 3])
            v = R.permute_dims(R.reshape(qkv[2], R.shape([1, n, 2, 8])), [0, 2, 1, 3])
            q_scaled = R.multiply(q, R.const(0.70710678, "float32"))
            j = R.expand_dims(R.arange(0, n, 1, "int64"), [-2])
            i = R.expand_dims(R.arange(0, n, 1, "int64"), [-1])
            keep = R.logical_and(
                R.less_equal(R.subtract(j, i), R.const(0, "int64")),
                R.full(R.shape([n, n]), R.const(True, "bool"), "bool"),
            )
            bias = R.where(keep, R.const(0.0, "float32"), R.const(float("-inf"), "float32"))
            k4 = R.repeat(k, 2, axis=1)
            v4 = R.repeat(v, 2, axis=1)
            kt = R.multiply(R.permute_dims(k4, [0, 1, 3, 2]), R.const(0.70710678, "float32"))
            s3 = R.matmul(R.reshape(q_scaled, R.shape([4, n, 8])), R.reshape(kt, R.shape([4, 8, n])))
            scores = R.add(R.reshape(s3, R.shape([1, 4, n, n])), bias)
            p = R.nn.softmax(scores, axis=-1)
            seen = R.logical_not(R.equal(scores, R.const(float("-inf"), "float32")))
            some = R.max(R.astype(seen, "int8"), axis=[-1], keepdims=True)
            none = R.logical_not(R.astype(some, "bool"))
            safe = R.where(none, R.full_like(p, R.const(0.0, "float32")), p)
            o3 = R.matmul(R.reshape(safe, R.shape([4, n, n])), R.reshape(v4, R.shape([4, n, 8])))
            o = R.permute_dims(R.reshape(o3, R.shape([1, 4, n, 8])), [0, 2, 1, 3])
            flat = R.reshape(o, R.shape([1, n, 32]))
            y = R.matmul(flat, w)
            R.output(y)
        return y


def fused(mask: str):
    """R.nn.attention of the nn.Module frontend, with unequal head numbers."""

    @I.ir_module
    class Fused:
        @R.function
        def main(
            input_ids: R.Tensor((1, n), "int64"),
            position_ids: R.Tensor((1, n), "int64"),
            x: R.Tensor((1, n, 64), "float32"),
            w: R.Tensor((32, 8), "float32"),
        ) -> R.Tensor((1, n, 8), "float32"):
            R.func_attr({"num_input": 3})
            with R.dataflow():
                qkv = R.split(x, [32, 48], axis=-1)
                q = R.reshape(qkv[0], R.shape([1, n, 4, 8]))
                k = R.reshape(qkv[1], R.shape([1, n, 2, 8]))
                v = R.reshape(qkv[2], R.shape([1, n, 2, 8]))
                o = R.nn.attention(q, k, v, scale=0.5, causal_mask=mask)
                flat = R.reshape(o, R.shape([1, n, 32]))
                y = R.matmul(flat, w)
                R.output(y)
            return y

    return Fused


@pytest.mark.parametrize(
    "before, form",
    [
        (Spelled, "matmul, softmax, matmul"),
        (SafeSoftmax, "matmul, safe softmax, matmul"),
        (fused("TopLeft"), "R.nn.attention"),
        (fused("BottomRight"), "R.nn.attention"),
    ],
    ids=["spelled", "safe-softmax", "nn.attention-TopLeft", "nn.attention-BottomRight"],
)
def test_every_form_becomes_the_same_module(before, form):
    rewrite = check(before, Expected)
    (match,) = rewrite.report.matched
    assert match.spec == AttentionSpec(4, 2, 8, "float32", True, pytest.approx(0.5, rel=1e-7))
    assert (match.layer, match.form, match.location.function) == (0, form, "main")
    assert not rewrite.report.refused and not rewrite.report.assumptions


@I.ir_module
class TriangularMask:
    """Additive mask from R.triu (diagonal 1) of a full matrix, as nn.Module models build it; multi-query; no num_input."""

    @R.function
    def main(
        input_ids: R.Tensor((1, n), "int64"),
        position_ids: R.Tensor((1, n), "int64"),
        q: R.Tensor((1, n, 3, 8), "float16"),
        k: R.Tensor((1, n, 1, 8), "float16"),
        v: R.Tensor((1, n, 1, 8), "float16"),
    ) -> R.Tensor((1, n, 3, 8), "float16"):
        with R.dataflow():
            qt = R.astype(R.permute_dims(q, [0, 2, 1, 3]), "float32")
            kt = R.astype(R.permute_dims(k, [0, 2, 3, 1]), "float32")
            scores = R.divide(R.matmul(qt, kt), R.const(4.0, "float32"))
            mask = R.triu(R.full(R.shape([n, n]), R.const(-3.4028235e38, "float32"), "float32"), 1)
            biased = R.maximum(R.add(scores, mask), R.const(-3.4028235e38, "float32"))
            p = R.astype(R.nn.softmax(biased, axis=-1), "float16")
            o = R.matmul(p, R.permute_dims(v, [0, 2, 1, 3]))
            y = R.permute_dims(o, [0, 2, 1, 3])
            R.output(y)
        return y


@I.ir_module
class TriangularExpected:
    @R.function
    def main(
        input_ids: R.Tensor((1, n), "int64"),
        position_ids: R.Tensor((1, n), "int64"),
        q: R.Tensor((1, n, 3, 8), "float16"),
        k: R.Tensor((1, n, 1, 8), "float16"),
        v: R.Tensor((1, n, 1, 8), "float16"),
        cache: R.Any,
    ) -> R.Tensor((1, n, 3, 8), "float16"):
        with R.dataflow():
            q0 = R.reshape(q, R.shape([n, 3, 8]))
            k0 = R.reshape(k, R.shape([n, 1, 8]))
            v0 = R.reshape(v, R.shape([n, 1, 8]))
            o = R.call_dps_packed(
                "tvm_infer.attention_with_kv_cache",
                (cache, R.prim_value(0), q0, k0, v0, R.prim_value(0.25), R.prim_value(1)),
                out_ty=R.Tensor((n, 3, 8), "float16"),
            )
            y = R.reshape(o, R.shape([1, n, 3, 8]))
            R.output(y)
        return y


def test_triangular_mask_float32_scores_of_float16_and_finite_masking():
    rewrite = check(TriangularMask, TriangularExpected, kv_param_name="cache")
    (match,) = rewrite.report.matched
    assert match.spec.dtype == "float16"
    assert match.assumptions == ("masked scores get -3.40282e+38, taken as -inf",)


@I.ir_module
class Rotary:
    """Rotary embedding in [heads, tokens, head_dim], full attention, one head a group."""

    @R.function
    def main(
        input_ids: R.Tensor((1, n), "int64"),
        position_ids: R.Tensor((1, n), "int64"),
        x: R.Tensor((n, 16), "float32"),
        cos: R.Tensor((1, n, 8), "float32"),
        sin: R.Tensor((1, n, 8), "float32"),
    ) -> R.Tensor((n, 16), "float32"):
        with R.dataflow():
            q = R.permute_dims(R.reshape(x, R.shape([1, n, 2, 8])), [0, 2, 1, 3])
            half = R.strided_slice(q, [3], [0], [4], [1])
            rest = R.strided_slice(q, [3], [4], [8], [1])
            turned = R.concat((R.negative(rest), half), axis=-1)
            rotated = R.add(R.multiply(q, R.expand_dims(cos, [1])), R.multiply(turned, R.expand_dims(sin, [1])))
            p = R.nn.softmax(R.matmul(rotated, R.permute_dims(rotated, [0, 1, 3, 2])), axis=-1)
            o = R.permute_dims(R.matmul(p, q), [0, 2, 1, 3])
            y = R.reshape(o, R.shape([n, 16]))
            R.output(y)
        return y


def operators(mod, name="main") -> list[str]:
    return [
        str(binding.value.op.name)
        for block in mod[name].body.blocks
        for binding in block.bindings
        if hasattr(binding.value, "op")
    ]


def test_transposes_around_rotary_embeddings_disappear():
    rewrite = RewritePagedAttention()
    before = operators(Rotary)
    after = operators(rewrite(Rotary))
    assert before.count("relax.permute_dims") == 3
    assert "relax.permute_dims" not in after and after.count("relax.concat") == 1
    assert rewrite.report.specs() == [AttentionSpec(2, 2, 8, "float32", False, 1.0)]


@I.ir_module
class Layers:
    """Two attentions, a router and a sampler."""

    @R.function
    def main(
        input_ids: R.Tensor((1, n), "int64"),
        position_ids: R.Tensor((1, n), "int64"),
        x: R.Tensor((1, n, 2, 8), "float32"),
        router: R.Tensor((16, 4), "float32"),
        experts: R.Tensor((4, 16), "float32"),
    ) -> R.Tensor((n, 16), "float32"):
        R.func_attr({"num_input": 3})
        with R.dataflow():
            a = R.nn.attention(x, x, x, causal_mask="TopLeft")
            b = R.nn.attention(a, x, x, scale=0.1, causal_mask=None)
            flat = R.reshape(b, R.shape([n, 16]))
            gates = R.nn.softmax(R.matmul(flat, router), axis=-1)
            mixed = R.matmul(gates, experts)
            y = R.nn.softmax(mixed, axis=-1)
            R.output(y)
        return y


def test_layers_are_numbered_in_program_order_and_other_softmaxes_left_alone():
    rewrite = RewritePagedAttention()
    after = rewrite(Layers)
    assert [(m.layer, m.spec.causal, round(m.spec.sm_scale, 4)) for m in rewrite.report.matched] == [
        (0, True, 0.3536),
        (1, False, 0.1),
    ]
    assert [item.location.variable for item in rewrite.report.not_attention] == ["gates", "y"]
    assert operators(after).count("relax.nn.softmax") == 2
    assert operators(after).count("relax.call_dps_packed") == 2


def test_report_is_a_table_a_reader_can_use():
    rewrite = RewritePagedAttention()
    rewrite(Layers)
    text = str(rewrite.report)
    lines = text.splitlines()
    assert lines[0] == "2 attention(s) rewritten, 0 refused, 2 softmax(es) left alone"
    assert lines[1].split() == ["layer", "heads", "head_dim", "dtype", "mask", "sm_scale", "form", "where"]
    assert lines[2].split()[:6] == ["0", "2/2", "8", "float32", "causal", "0.353553"]
    assert lines[3].split()[:6] == ["1", "2/2", "8", "float32", "full", "0.1"]
    assert "R.nn.attention" in lines[2] and "main/b (nn.attention)" in lines[3] and "test_relax_rewrite.py:" in lines[3]
    assert "not attention: main/gates (nn.softmax)" in text and "4 entries of a fixed axis" in text


def test_several_functions_and_blocks():
    """function=None rewrites every function with packed tokens, whatever its blocks; others stay."""

    @I.ir_module
    class Mod:
        @R.function
        def prefill(
            input_ids: R.Tensor((1, n), "int32"),
            position_ids: R.Tensor((1, n), "int32"),
            x: R.Tensor((1, n, 2, 8), "float32"),
        ) -> R.Tensor((1, n, 2, 8), "float32"):
            with R.dataflow():
                t = R.permute_dims(x, [0, 2, 1, 3])
                u = R.permute_dims(t, [0, 2, 1, 3])
                R.output(t, u)
            with R.dataflow():
                a = R.nn.attention(u, u, R.permute_dims(t, [0, 2, 1, 3]), causal_mask="TopLeft")
                R.output(a)
            return a

        @R.function
        def embed(table: R.Tensor((9, 4), "float32"), ids: R.Tensor((n,), "int32")) -> R.Tensor((n, 4), "float32"):
            return R.take(table, ids, axis=0)

    rewrite = RewritePagedAttention(function=None)
    after = rewrite(Mod)
    assert [str(p.name) for p in after["prefill"].params] == ["input_ids", "position_ids", "x", "kv_cache"]
    assert operators(after, "prefill") == ["relax.reshape"] * 3 + ["relax.call_dps_packed", "relax.reshape"]
    tvm.ir.assert_structural_equal(after["embed"], Mod["embed"])
    tvm.relax.analysis.well_formed(after)  # raises


def without_packed_tokens(shape, dtype="int64"):
    """main(input_ids) with one parameter of the given type."""
    builder = tvm.relax.BlockBuilder()
    ids = tvm.relax.Var("input_ids", tvm.relax.TensorType(shape, dtype))
    with builder.function("main", [ids]):
        builder.emit_func_output(builder.emit(ids))
    return builder.get()


@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        (lambda v: [1, v], "int64", "no parameter position_ids"),
        (lambda v: [2, v], "int64", r"input_ids has shape \[2, n\], not \[1, n\]"),
        (lambda v: [v], "int64", r"input_ids has shape \[n\], not \[1, n\]"),
        (lambda v: [1, 16], "int64", "fixed length 16"),
        (lambda v: [1, v], "float32", "input_ids is float32, not an integer"),
    ],
    ids=["no-positions", "batch-2", "flat", "static", "float"],
)
def test_functions_without_packed_tokens_are_refused(shape, dtype, message):
    length = tvm.tirx.Var("n", "int64")
    with pytest.raises(ModelError, match=message):
        RewritePagedAttention()(without_packed_tokens(shape(length), dtype))


def test_missing_function_and_bad_options():
    with pytest.raises(ModelError, match=r"no Relax function 'decode'; it has \['main'\]"):
        RewritePagedAttention(function="decode")(Layers)
    with pytest.raises(ModelError, match="none of the functions"):
        RewritePagedAttention(function=None)(without_packed_tokens([1, 16]))
    with pytest.raises(ArgumentError, match=r"on_unmatched is 'warn'"):
        RewritePagedAttention(on_unmatched="warn")
    with pytest.raises(ArgumentError, match="pass a list"):
        RewritePagedAttention(assume_full="mask")
    with pytest.raises(ArgumentError, match=r"assume_full names \['mask'\]"):
        RewritePagedAttention(assume_full=["mask"])(Layers)
    with pytest.raises(ArgumentError, match="'x' is a parameter of 'main' already"):
        RewritePagedAttention(kv_param_name="x")(Layers)


@pytest.mark.parametrize("package, extra", [("torch", "torch"), ("transformers", "llm")])
def test_importers_name_the_missing_extra(monkeypatch, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"{package} is not installed.*tvm_infer\[{extra}\]"):
        export_hf(object())


def test_the_pass_needs_no_torch():
    """`import tvm_infer.relax` and a rewrite work where torch cannot be imported."""
    code = "import sys; sys.modules['torch'] = None; from tvm_infer.relax import RewritePagedAttention as P; P()"
    subprocess.run([sys.executable, "-c", code], check=True)
