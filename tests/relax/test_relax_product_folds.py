"""What follows a product and becomes part of its call, as before / expected modules; what does not, and numbers on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from tvm_infer import blas
from tvm_infer.relax import pipeline
from tvm_infer.relax.dispatch_matmul import DispatchMatmul


@I.ir_module
class Residual:
    """A layer's two residual additions and the logits' cast, in both orders and through reshapes."""

    @R.function
    def main(
        x: R.Tensor((1, "n", 8), "bfloat16"),
        w: R.Tensor((8, 8), "bfloat16"),
        v: R.Tensor((8, 5), "bfloat16"),
        bias: R.Tensor((8,), "bfloat16"),
    ):
        n = T.int64()
        with R.dataflow():
            wt = R.permute_dims(w)
            first = R.matmul(x, wt)
            h = R.add(x, first)
            flat = R.reshape(h, R.shape([n, 8]))
            second = R.matmul(flat, w)
            back = R.reshape(second, R.shape([1, n, 8]))
            g = R.add(back, h)
            third = R.matmul(g, wt)
            biased = R.add(third, bias)
            product = R.matmul(biased, v)
            rows = R.reshape(product, R.shape([n, 5]))
            logits = R.astype(rows, "float32")
            R.output(logits)
        return logits


@I.ir_module
class ResidualOnCuda:
    @R.function
    def main(
        x: R.Tensor((1, "n", 8), "bfloat16"),
        w: R.Tensor((8, 8), "bfloat16"),
        v: R.Tensor((8, 5), "bfloat16"),
        bias: R.Tensor((8,), "bfloat16"),
    ):
        n = T.int64()
        with R.dataflow():
            h = R.call_dps_packed(
                "tvm_infer.matmul_add", (x, w, R.prim_value(1), x), out_ty=R.Tensor((1, n, 8), "bfloat16")
            )
            flat = R.reshape(h, R.shape([n, 8]))
            g = R.call_dps_packed(
                "tvm_infer.matmul_add", (flat, w, R.prim_value(0), h), out_ty=R.Tensor((1, n, 8), "bfloat16")
            )
            third = R.call_dps_packed(
                "tvm_infer.matmul", (g, w, R.prim_value(1)), out_ty=R.Tensor((1, n, 8), "bfloat16")
            )
            biased = R.add(third, bias)
            logits = R.call_dps_packed(
                "tvm_infer.matmul", (biased, v, R.prim_value(0)), out_ty=R.Tensor((n, 5), "float32")
            )
            R.output(logits)
        return logits


def test_before_and_after():
    dispatch = DispatchMatmul("cuda")
    tvm.ir.assert_structural_equal(dispatch(Residual), ResidualOnCuda)
    assert [item.folded for item in dispatch.report.dispatched] == ["add", "add", "", "cast"]
    assert str(dispatch.report).splitlines() == [
        "4 matmul(s) to tvm_infer.matmul, 0 left to TVM (cuBLASLt)",
        "2 of them with the addition that followed (tvm_infer.matmul_add)",
        "1 of them with the cast to float32 that followed",
        "     1 x  [n, 8] x [8, 8]^T + [n, 8]",
        "     1 x  [n, 8] x [8, 8] + [n, 8]",
        "     1 x  [n, 8] x [8, 8]^T",
        "     1 x  [n, 8] x [8, 5] to float32",
    ]


def test_what_follows_stays_where_told():
    dispatch = DispatchMatmul("cuda", fold=False)
    text = dispatch(Residual).script()
    assert "matmul_add" not in text and text.count("R.add(") == 3 and text.count("R.astype(") == 1
    assert {item.folded for item in dispatch.report.dispatched} == {""} and "of them" not in str(dispatch.report)


def test_products_that_stay_with_tvm_keep_what_follows():
    dispatch = DispatchMatmul("cuda", gemv_max_rows=4)
    mod = built(lambda b, x, w, c: b.emit(relax.op.add(b.emit(relax.op.matmul(x, w)), c)), rows=3)
    tvm.ir.assert_structural_equal(dispatch(mod), mod)


def test_of_two_products_one_takes_in_the_other():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((3, 8), "float16"), w: R.Tensor((8, 8), "float16")):
            with R.dataflow():
                a = R.matmul(x, w)
                b = R.matmul(a, w)
                d = R.matmul(b, w)
                e = R.add(b, d)
                f = R.matmul(e, w)
                g = R.matmul(x, w)
                s = R.add(f, g)
                R.output(s)
            return s

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((3, 8), "float16"), w: R.Tensor((8, 8), "float16")):
            with R.dataflow():
                a = R.call_dps_packed("tvm_infer.matmul", (x, w, R.prim_value(0)), out_ty=R.Tensor((3, 8), "float16"))
                b = R.call_dps_packed("tvm_infer.matmul", (a, w, R.prim_value(0)), out_ty=R.Tensor((3, 8), "float16"))
                e = R.call_dps_packed(
                    "tvm_infer.matmul_add", (b, w, R.prim_value(0), b), out_ty=R.Tensor((3, 8), "float16")
                )
                g = R.call_dps_packed("tvm_infer.matmul", (x, w, R.prim_value(0)), out_ty=R.Tensor((3, 8), "float16"))
                s = R.call_dps_packed(
                    "tvm_infer.matmul_add", (e, w, R.prim_value(0), g), out_ty=R.Tensor((3, 8), "float16")
                )
                R.output(s)
            return s

    dispatch = DispatchMatmul("cuda")
    tvm.ir.assert_structural_equal(dispatch(Before), Expected)
    assert [item.folded for item in dispatch.report.dispatched] == ["", "", "add", "add", ""]


def built(follow, *, rows=None, dtype="bfloat16", result_dtype=None, is_dataflow=True):
    """A module of x [rows, 8], w [8, 8] and c [rows, 8], and what `follow` makes of them."""
    n = tvm.tirx.Var("n", "int64") if rows is None else rows
    builder = relax.BlockBuilder()
    shapes = {"x": ((n, 8), dtype), "w": ((8, 8), dtype), "c": ((n, 8), result_dtype or dtype)}
    params = [relax.Var(name, relax.TensorType(*described)) for name, described in shapes.items()]
    with builder.function("main", params):
        if is_dataflow:
            with builder.dataflow():
                out = builder.emit_output(follow(builder, *params))
        else:
            out = follow(builder, *params)
        builder.emit_func_output(out)
    return builder.finalize()


def product(b, x, w, **kwargs):
    return b.emit(relax.op.matmul(x, w, **kwargs))


def read_twice(b, x, w, c):
    y = product(b, x, w)
    return b.emit(relax.Tuple([y, b.emit(relax.op.add(y, c))]))


def added_to_itself(b, x, w, c):
    y = product(b, x, w)
    return b.emit(relax.op.add(y, y))


def reshaped_and_read(b, x, w, c):
    y = product(b, x, w)
    return b.emit(relax.Tuple([b.emit(relax.op.reshape(y, (1, *c.ty.shape.values))), b.emit(relax.op.add(y, c))]))


def other_columns(b, x, w, c):
    heads = (c.ty.shape.values[0], 2, 4)
    return b.emit(relax.op.add(b.emit(relax.op.reshape(product(b, x, w), heads)), b.emit(relax.op.reshape(c, heads))))


def a_vector(b, x, w, c):
    """Of one row: the call takes matrices."""
    flat = [b.emit(relax.op.reshape(t, (8,))) for t in (product(b, x, w), c)]
    return b.emit(relax.op.add(*flat))


def one_row(b, x, w, c):
    return b.emit(relax.op.add(product(b, x, w), relax.const(np.ones((1, 8), "float16"))))


def broadcast_product(b, x, w, c):
    """The sum has the product's shape no longer."""
    wide = b.emit(relax.op.broadcast_to(b.emit(relax.op.reshape(c, (1, 3, 8))), (2, 3, 8)))
    return b.emit(relax.op.add(product(b, x, w), wide))


def subtracted(b, x, w, c):
    return b.emit(relax.op.subtract(c, product(b, x, w)))


def to_another_type(b, x, w, c):
    return b.emit(relax.op.astype(product(b, x, w), "float16" if c.ty.dtype == "bfloat16" else "bfloat16"))


def is_float32(b, x, w, c):
    return b.emit(relax.op.astype(product(b, x, w, out_dtype="float32"), "float32"))


def computed_on(b, x, w, c):
    """A gate in float32: TVM computes the cast within the activation's kernel."""
    y = b.emit(relax.op.astype(product(b, x, w), "float32"))
    return b.emit(relax.op.astype(b.emit(relax.op.multiply(y, b.emit(relax.op.sigmoid(y)))), "bfloat16"))


KEPT = [
    (computed_on, {}),
    (read_twice, {}),
    (added_to_itself, {}),
    (reshaped_and_read, {}),
    (other_columns, {}),
    (a_vector, {"rows": 1}),
    (one_row, {"rows": 3, "dtype": "float16"}),
    (broadcast_product, {"rows": 3}),
    (subtracted, {}),
    (to_another_type, {}),
    (is_float32, {}),
    (lambda b, x, w, c: b.emit(relax.op.add(product(b, x, w), c)), {"is_dataflow": False}),
]


@pytest.mark.parametrize(("follow", "options"), KEPT, ids=[row[0].__name__ for row in KEPT])
def test_what_is_not_folded(follow, options):
    mod = built(follow, **options)
    dispatch = DispatchMatmul("cuda")
    after = dispatch(mod)
    assert [item.folded for item in dispatch.report.dispatched] == [""]
    assert "matmul_add" not in after.script()
    tvm.ir.assert_structural_equal(after, DispatchMatmul("cuda", fold=False)(mod))


def test_readers_in_branches_count():
    @I.ir_module
    class Branches:
        @R.function
        def main(
            x: R.Tensor((3, 8), "float16"),
            w: R.Tensor((8, 8), "float16"),
            c: R.Tensor((3, 8), "float16"),
            flag: R.Tensor((), "bool"),
        ):
            with R.dataflow():
                y = R.matmul(x, w)
                s = R.add(y, c)
                R.output(y, s)
            if flag:  # noqa: SIM108 (TVMScript)
                out = R.multiply(s, c)
            else:
                out = R.multiply(y, c)
            return out

    assert "matmul_add" not in DispatchMatmul("cuda")(Branches).script()


def test_float32_sums_of_16_bit_operands():
    """c has the product's type, which is not that of its operands."""
    mod = built(
        lambda b, x, w, c: b.emit(relax.op.add(c, product(b, x, w, out_dtype="float32"))), result_dtype="float32"
    )
    dispatch = DispatchMatmul("cuda")
    assert dispatch(mod).script().count("matmul_add") == 1 and dispatch.report.dispatched[0].folded == "add"


def test_casts_that_are_returned_among_others():
    """As a decode function returns logits, in their rows, and the index of the largest."""

    def follow(b, x, w, c):
        logits = b.emit(relax.op.astype(product(b, x, w), "float32"))
        tokens = b.emit(relax.op.argmax(logits, axis=-1))
        return b.emit(relax.Tuple([b.emit(relax.op.reshape(logits, (1, *c.ty.shape.values))), tokens]))

    dispatch = DispatchMatmul("cuda")
    assert "astype" not in dispatch(built(follow)).script()
    assert [item.folded for item in dispatch.report.dispatched] == ["cast"]


def test_the_cpu_does_not_cast():
    mod = built(lambda b, x, w, c: b.emit(relax.op.astype(product(b, x, w), "float16")), dtype="float32")
    dispatch = DispatchMatmul()
    dispatch(mod)
    assert [item.folded for item in dispatch.report.dispatched] == [""]


@pytest.mark.parametrize("rows", [1, 5])
def test_numbers_on_the_cpu(rows):
    """Both orders, reshapes on the way, a sum of two products: what plain numpy gives, with no addition left to TVM."""

    def follow(b, x, w, c):
        n = c.ty.shape.values[0]
        h = b.emit(relax.op.add(c, product(b, x, b.emit(relax.op.permute_dims(w)))))
        wide = b.emit(relax.op.reshape(product(b, h, w), (1, n, 8)))
        g = b.emit(relax.op.add(wide, b.emit(relax.op.reshape(h, (1, n, 8)))))
        return b.emit(relax.op.add(product(b, g, w), b.emit(relax.op.matmul(wide_of(b, x, n), w))))

    def wide_of(b, x, n):
        return b.emit(relax.op.reshape(x, (1, n, 8)))

    mod = built(follow, dtype="float32")
    dispatch = DispatchMatmul()
    dispatched = dispatch(mod)
    assert [item.folded for item in dispatch.report.dispatched] == ["add", "add", "add", ""]
    assert "R.add(" not in dispatched.script()
    blas.ensure_blas()
    vm = relax.VirtualMachine(pipeline.lower_cpu(dispatched, pipeline.host_target()), tvm.cpu())
    rng = np.random.default_rng(0)
    x, w, c = (rng.standard_normal(shape, dtype=np.float32) for shape in ((rows, 8), (8, 8), (rows, 8)))
    got = vm["main"](*(tvm.runtime.tensor(t) for t in (x, w, c))).numpy()
    x, w, c = (t.astype(np.float64) for t in (x, w, c))
    h = c + x @ w.T
    np.testing.assert_allclose(got[0], (h @ w + h) @ w + x @ w, rtol=1e-5, atol=1e-4)
