"""DispatchMatmul for CUDA: which products are called how, which stay with TVM and why, as before / expected modules."""

from __future__ import annotations

import re

import pytest
import tvm
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from tvm_infer import errors
from tvm_infer.relax.dispatch_matmul import DispatchMatmul


@I.ir_module
class Products:
    @R.function
    def main(
        x: R.Tensor((1, "n", 8), "bfloat16"),
        w: R.Tensor((5, 8), "bfloat16"),
        h: R.Tensor((3, 8), "float16"),
        v: R.Tensor((8, 6), "float16"),
        f: R.Tensor((2, 8), "float32"),
        u: R.Tensor((8, 6), "float32"),
        bias: R.Tensor((5,), "bfloat16"),
        residual: R.Tensor((1, "n", 5), "bfloat16"),
    ):
        with R.dataflow():
            wt = R.permute_dims(w)
            y = R.matmul(x, wt)
            biased = R.add(y, bias)
            summed = R.add(biased, residual)
            logits = R.matmul(x, wt, out_dtype="float32")
            half = R.matmul(h, v)
            single = R.matmul(f, u)
            out = (summed, logits, half, single)
            R.output(out)
        return out


@I.ir_module
class Expected:
    @R.function
    def main(
        x: R.Tensor((1, "n", 8), "bfloat16"),
        w: R.Tensor((5, 8), "bfloat16"),
        h: R.Tensor((3, 8), "float16"),
        v: R.Tensor((8, 6), "float16"),
        f: R.Tensor((2, 8), "float32"),
        u: R.Tensor((8, 6), "float32"),
        bias: R.Tensor((5,), "bfloat16"),
        residual: R.Tensor((1, "n", 5), "bfloat16"),
    ):
        n = T.int64()
        with R.dataflow():
            y = R.call_dps_packed("tvm_infer.matmul", (x, w, R.prim_value(1)), out_ty=R.Tensor((1, n, 5), "bfloat16"))
            biased = R.add(y, bias)
            summed = R.add(biased, residual)
            logits = R.call_dps_packed(
                "tvm_infer.matmul", (x, w, R.prim_value(1)), out_ty=R.Tensor((1, n, 5), "float32")
            )
            half = R.call_dps_packed("tvm_infer.matmul", (h, v, R.prim_value(0)), out_ty=R.Tensor((3, 6), "float16"))
            single = R.call_dps_packed("tvm_infer.matmul", (f, u, R.prim_value(0)), out_ty=R.Tensor((2, 6), "float32"))
            out = (summed, logits, half, single)
            R.output(out)
        return out


def test_before_and_after():
    """All three types, float32 logits of bfloat16, weights as they are stored; bias and residual stay additions."""
    dispatch = DispatchMatmul("cuda")
    tvm.ir.assert_structural_equal(dispatch(Products), Expected)
    assert dispatch.report.left == []
    assert "4 matmul(s) to tvm_infer.matmul, 0 left to TVM (cuBLASLt)" in str(dispatch.report)


@I.ir_module
class Weights:
    """Three inputs, then weights. A product with a weight, its sum, one in float32; with an input; with what is computed; as [k, n]."""

    @R.function
    def main(
        x: R.Tensor((1, "n", 8), "bfloat16"),
        table: R.Tensor((5, 8), "bfloat16"),
        residual: R.Tensor((1, "n", 5), "bfloat16"),
        w: R.Tensor((5, 8), "bfloat16"),
        v: R.Tensor((8, 5), "bfloat16"),
    ):
        R.func_attr({"num_input": 3})
        with R.dataflow():
            wt = R.permute_dims(w)
            y = R.matmul(x, wt)
            product = R.matmul(x, wt)
            summed = R.add(residual, product)
            wide = R.matmul(x, wt, out_dtype="float32")
            looked_up = R.matmul(x, R.permute_dims(table))
            scaled = R.add(w, w)
            computed = R.matmul(x, R.permute_dims(scaled))
            plain = R.matmul(x, v)
            out = (y, summed, wide, looked_up, computed, plain)
            R.output(out)
        return out


@I.ir_module
class WeightsExpected:
    @R.function
    def main(
        x: R.Tensor((1, "n", 8), "bfloat16"),
        table: R.Tensor((5, 8), "bfloat16"),
        residual: R.Tensor((1, "n", 5), "bfloat16"),
        w: R.Tensor((5, 8), "bfloat16"),
        v: R.Tensor((8, 5), "bfloat16"),
    ):
        R.func_attr({"num_input": 3})
        n = T.int64()
        with R.dataflow():
            y = R.call_dps_packed("tvm_infer.linear", (x, w), out_ty=R.Tensor((1, n, 5), "bfloat16"))
            summed = R.call_dps_packed("tvm_infer.linear_add", (x, w, residual), out_ty=R.Tensor((1, n, 5), "bfloat16"))
            wide = R.call_dps_packed("tvm_infer.linear", (x, w), out_ty=R.Tensor((1, n, 5), "float32"))
            looked_up = R.call_dps_packed(
                "tvm_infer.matmul", (x, table, R.prim_value(1)), out_ty=R.Tensor((1, n, 5), "bfloat16")
            )
            scaled = R.add(w, w)
            computed = R.call_dps_packed(
                "tvm_infer.matmul", (x, scaled, R.prim_value(1)), out_ty=R.Tensor((1, n, 5), "bfloat16")
            )
            plain = R.call_dps_packed(
                "tvm_infer.matmul", (x, v, R.prim_value(0)), out_ty=R.Tensor((1, n, 5), "bfloat16")
            )
            out = (y, summed, wide, looked_up, computed, plain)
            R.output(out)
        return out


def packed_calls(mod):
    """The packed functions that `main` calls, in order, without their prefix."""
    return re.findall(r'call_dps_packed\("tvm_infer\.(\w+)"', mod["main"].script())


def test_a_product_with_a_weight_is_a_linear():
    """What is in the function behind num_input inputs is the same at every call: it may be read early. Nothing else may."""
    dispatch = DispatchMatmul("cuda")
    tvm.ir.assert_structural_equal(dispatch(Weights), WeightsExpected)
    assert dispatch.report.left == [] and [d.folded for d in dispatch.report.dispatched] == ["", "add", "", "", "", ""]


def test_without_num_input_nothing_is_known_to_be_a_weight():
    mod = Weights.clone()
    mod.update_func(mod.get_global_var("main"), mod["main"].without_attr("num_input"))
    assert packed_calls(DispatchMatmul("cuda")(mod)) == ["matmul", "matmul_add", *["matmul"] * 4]


@pytest.mark.parametrize(
    ("num_input", "expected"),
    [
        (0, ["linear", "linear_add", "linear", "linear", "matmul", "matmul"]),  # all is static, the table too
        (2, ["linear", "linear_add", "linear", "matmul", "matmul", "matmul"]),
        (4, ["matmul", "matmul_add", "matmul", "matmul", "matmul", "matmul"]),
    ],
)
def test_num_input_says_where_weights_begin(num_input, expected):
    mod = Weights.clone()
    mod.update_func(mod.get_global_var("main"), mod["main"].with_attr("num_input", num_input))
    assert packed_calls(DispatchMatmul("cuda")(mod)) == expected


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(("target", "name"), [("cuda", "linear"), ("cpu", "matmul")])
def test_the_cpu_has_no_use_for_constant_weights(target, name, fold):
    """In float32, which both take."""
    builder = tvm.relax.BlockBuilder()
    shapes = {"x": (3, 8), "c": (3, 5), "w": (5, 8)}
    x, c, w = (tvm.relax.Var(name, tvm.relax.TensorType(shape, FP32)) for name, shape in shapes.items())
    with builder.function("main", [x, c, w], attrs={"num_input": 2}):
        with builder.dataflow():
            product = builder.emit(tvm.relax.op.matmul(x, builder.emit(tvm.relax.op.permute_dims(w))))
            y = builder.emit_output(builder.emit(tvm.relax.op.add(product, c)))
        builder.emit_func_output(y)
    assert packed_calls(DispatchMatmul(target, fold=fold)(builder.finalize())) == [f"{name}_add" if fold else name]


def test_the_cpu_takes_float32_alone():
    dispatch = DispatchMatmul()
    dispatch(Products)
    assert [d.location.variable for d in dispatch.report.dispatched] == ["single"]
    assert [reason.why.split(";")[0] for reason in dispatch.report.left] == [
        "the left is bfloat16",
        "the left is bfloat16",
        "the left is float16",
    ]
    assert "1 matmul(s) to tvm_infer.matmul, 3 left to TVM (a BLAS)" in str(dispatch.report)


def test_switched_off():
    dispatch = DispatchMatmul("cuda", enabled=False)
    tvm.ir.assert_structural_equal(dispatch(Products), Products)
    assert dispatch.report.dispatched == [] and len(dispatch.report.left) == 4
    assert all("switched off" in reason.why for reason in dispatch.report.left)


def single_product(a, b, result_dtype=None):
    """A module of one product; a, b: (shape, dtype)."""
    builder = tvm.relax.BlockBuilder()
    x, w = (tvm.relax.Var(n, tvm.relax.TensorType(s, d)) for n, (s, d) in zip("xw", (a, b), strict=True))
    with builder.function("main", [x, w]):
        with builder.dataflow():
            y = builder.emit_output(builder.emit(tvm.relax.op.matmul(x, w, out_dtype=result_dtype)))
        builder.emit_func_output(y)
    return builder.finalize()


N = tvm.tirx.Var("n", "int64")
BF16, FP16, FP32 = "bfloat16", "float16", "float32"
LEFT = [
    (((2, 3, 8), BF16), ((2, 8, 4), BF16), None, "the right-hand side has rank 3"),
    (((8,), BF16), ((8, 4), BF16), None, "the left-hand side is a vector"),
    (((3, 8), "int8"), ((8, 4), "int8"), "int32", "the left is int8; cuBLASLt takes float16, bfloat16, float32"),
    (((3, 8), "float64"), ((8, 4), "float64"), None, "the left is float64"),
    (((3, 8), BF16), ((8, 4), BF16), FP16, "the result is float16; cuBLASLt makes bfloat16 or float32 of bfloat16"),
]


@pytest.mark.parametrize(("a", "b", "result", "why"), LEFT, ids=[row[3] for row in LEFT])
def test_left_to_tvm(a, b, result, why):
    mod = single_product(a, b, result)
    dispatch = DispatchMatmul("cuda")
    tvm.ir.assert_structural_equal(dispatch(mod), mod)
    (reason,) = dispatch.report.left
    assert reason.why.startswith(why) and reason.fix


@pytest.mark.parametrize(
    ("rows", "dispatched"),
    [((1,), False), ((4,), False), ((2, 2), False), ((5,), True), ((2, 3), True), ((N,), True), ((1, N), True)],
)
def test_few_rows_stay_with_tvms_gemv(rows, dispatched):
    dispatch = DispatchMatmul("cuda", gemv_max_rows=4)
    dispatch(single_product(((*rows, 8), BF16), ((8, 4), BF16)))
    assert len(dispatch.report.dispatched) == dispatched
    if not dispatched:
        (reason,) = dispatch.report.left
        count = 1 if rows == (1,) else 4
        assert reason.why == f"it has {count} row(s), and up to 4 stay with TVM's GEMV"
        assert "gemv_max_rows" in reason.fix


def test_by_default_all_rows_are_dispatched():
    dispatch = DispatchMatmul("cuda")
    dispatch(single_product(((1, 8), BF16), ((8, 4), BF16)))
    assert len(dispatch.report.dispatched) == 1


def test_bad_settings():
    with pytest.raises(errors.ArgumentError, match=r"`target_kind` is 'rocm'.*cpu, cuda"):
        DispatchMatmul("rocm")
    with pytest.raises(errors.ArgumentError, match="`gemv_max_rows` is -1"):
        DispatchMatmul("cuda", gemv_max_rows=-1)
