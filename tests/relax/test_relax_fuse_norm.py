"""FuseRMSNorm: what counts as a norm, what does not and why, as before / expected modules; the error beside torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from tvm import relax, tirx
from tvm.relax import op
from tvm.script import ir as I
from tvm.script import relax as R

from tvm_infer.relax import FuseRMSNorm, from_torch

N = tirx.Var("n", "int64")
FP32, BF16, FP16 = "float32", "bfloat16", "float16"


@I.ir_module
class HuggingFace:
    """Rounded before the weight and after it; x is read by the residual, too."""

    @R.function
    def main(x: R.Tensor((1, "n", 48), "bfloat16"), w: R.Tensor((48,), "bfloat16")):
        with R.dataflow():
            wide = R.astype(x, "float32")
            squares = R.power(wide, R.const(2.0, "float32"))
            mean = R.mean(squares, axis=[-1], keepdims=True)
            shifted = R.add(mean, R.const(0.125, "float32"))
            root = R.rsqrt(shifted)
            scaled = R.multiply(wide, root)
            rounded = R.astype(scaled, "bfloat16")
            y = R.multiply(w, rounded)
            out = R.add(y, x)
            R.output(out)
        return out


@I.ir_module
class Expected:
    @R.function
    def main(x: R.Tensor((1, "n", 48), "bfloat16"), w: R.Tensor((48,), "bfloat16")):
        with R.dataflow():
            y = R.nn.rms_norm(x, w, axes=[-1], epsilon=0.125)
            out = R.add(y, x)
            R.output(out)
        return out


def test_before_and_after():
    fuse = FuseRMSNorm()
    before = HuggingFace.clone()
    tvm.ir.assert_structural_equal(fuse(HuggingFace), Expected)
    tvm.ir.assert_structural_equal(HuggingFace, before)
    (norm,) = fuse.report.fused
    assert (norm.location.variable, norm.width, norm.epsilon, norm.dtype, norm.weight) == ("y", "48", 0.125, BF16, "w")
    assert str(fuse.report).splitlines() == [
        "1 RMSNorm(s) to nn.rms_norm, 0 left as written",
        "     1 x  [.., 48] bfloat16, epsilon 0.125",
    ]


def const(value, dtype=FP32):
    return relax.const(value, dtype)


def build(write, x=((1, N, 48), FP32), w=((48,), FP32), extra=((1, N, 48), FP32)):
    """A module whose main(x, w, extra) returns what write(emit, x, w, extra) does."""
    builder = relax.BlockBuilder()
    params = [
        relax.Var(name, relax.TensorType(list(shape), dtype))
        for name, (shape, dtype) in zip("xwe", (x, w, extra), strict=True)
    ]
    with builder.function("main", params):
        with builder.dataflow():
            y = builder.emit_output(write(builder.emit, *params))
        builder.emit_func_output(y)
    return builder.finalize()


def norm(
    emit,
    x,
    w,
    *,
    square=lambda v: op.multiply(v, v),
    mean=lambda v: op.mean(v, axis=[-1], keepdims=True),
    shift=lambda v: op.add(v, const(1e-5)),
    scale=lambda emit, v, s: op.multiply(v, emit(op.rsqrt(s))),
    weigh=lambda emit, v, w: op.multiply(v, w),
):
    """A norm with some of its steps written another way."""
    scaled = emit(scale(emit, x, emit(shift(emit(mean(emit(square(x))))))))
    return emit(weigh(emit, scaled, w))


def wide(emit, x):
    return emit(op.astype(x, FP32))


FORMS = {
    "square": {"square": op.square},
    "power": {"square": lambda v: op.power(v, const(2.0))},
    "third axis by number": {"mean": lambda v: op.mean(v, axis=[2], keepdims=True)},
    "epsilon first": {"shift": lambda v: op.add(const(1e-5), v)},
    "root first": {"scale": lambda emit, v, s: op.multiply(emit(op.rsqrt(s)), v)},
    "1 / sqrt": {"scale": lambda emit, v, s: op.multiply(v, emit(op.divide(const(1.0), emit(op.sqrt(s)))))},
    "x / sqrt": {"scale": lambda emit, v, s: op.divide(v, emit(op.sqrt(s)))},
    "weight first": {"weigh": lambda emit, v, w: op.multiply(w, v)},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms(form):
    fuse = FuseRMSNorm()
    mod = fuse(build(lambda emit, x, w, _: norm(emit, x, w, **form)))
    expected = build(lambda emit, x, w, _: emit(op.nn.rms_norm(x, w, axes=[-1], epsilon=float(np.float32(1e-5)))))
    tvm.ir.assert_structural_equal(mod, expected)
    assert not fuse.report.left


def rms(x, w):
    return op.nn.rms_norm(x, w, axes=[-1], epsilon=float(np.float32(1e-5)))


TYPES = {
    "torch.nn.RMSNorm": (
        (BF16, BF16),
        lambda emit, x, w: emit(op.astype(norm(emit, wide(emit, x), wide(emit, w)), BF16)),
        lambda emit, x, w: emit(rms(x, w)),
    ),
    "a float32 weight": (
        (BF16, FP32),
        lambda emit, x, w: norm(emit, wide(emit, x), w),
        lambda emit, x, w: emit(rms(wide(emit, x), w)),
    ),
    "a float32 weight, rounded after it": (
        (FP16, FP32),
        lambda emit, x, w: emit(op.astype(norm(emit, wide(emit, x), w), FP16)),
        lambda emit, x, w: emit(op.astype(emit(rms(wide(emit, x), w)), FP16)),
    ),
    "1 + weight": (
        (BF16, BF16),
        lambda emit, x, w: norm(emit, wide(emit, x), emit(op.add(wide(emit, w), const(1.0)))),
        lambda emit, x, w: emit(rms(wide(emit, x), emit(op.add(wide(emit, w), const(1.0))))),
    ),
    "rounded and widened before the weight": (
        (BF16, FP32),
        lambda emit, x, w: norm(
            emit, wide(emit, x), w, weigh=lambda emit, v, w: op.multiply(wide(emit, emit(op.astype(v, BF16))), w)
        ),
        lambda emit, x, w: emit(rms(wide(emit, x), w)),
    ),
    "x widened twice": (
        (BF16, BF16),
        lambda emit, x, w: norm(
            emit,
            wide(emit, x),
            w,
            scale=lambda emit, v, s: op.multiply(wide(emit, x), emit(op.rsqrt(s))),
            weigh=lambda emit, v, w: op.multiply(emit(op.astype(v, BF16)), w),
        ),
        lambda emit, x, w: emit(rms(x, w)),
    ),
}


@pytest.mark.parametrize(("dtypes", "before", "after"), TYPES.values(), ids=TYPES)
def test_types(dtypes, before, after):
    """nn.rms_norm has one type for input, weight and result: the narrowest that all three have, rounded once."""
    x, w = ((1, N, 48), dtypes[0]), ((48,), dtypes[1])
    fuse = FuseRMSNorm()
    mod = fuse(build(lambda emit, x, w, _: before(emit, x, w), x, w))
    tvm.ir.assert_structural_equal(mod, build(lambda emit, x, w, _: after(emit, x, w), x, w))
    assert not fuse.report.left


def two_readers(emit, x, w, _):
    root = []

    def scale(emit, v, s):
        root.append(emit(op.rsqrt(s)))
        return op.multiply(v, root[0])

    return emit(op.multiply(norm(emit, x, w, scale=scale), root[0]))


def returned_too(emit, x, w, _):
    squares = emit(op.multiply(x, x))
    scaled = emit(
        op.multiply(x, emit(op.rsqrt(emit(op.add(emit(op.mean(squares, axis=[-1], keepdims=True)), const(1e-5))))))
    )
    return emit(op.add(emit(op.multiply(scaled, w)), squares))


def with_(**steps):
    return lambda emit, x, w, _: norm(emit, x, w, **steps)


X, W = ((1, N, 48), FP32), ((48,), FP32)
LEFT = {
    "axis": (
        with_(mean=lambda v: op.mean(v, axis=[1], keepdims=True)),
        X,
        W,
        "its mean is over axes [1]; a norm's is over the last (2) alone",
    ),
    "two axes": (with_(mean=lambda v: op.mean(v, axis=[1, 2], keepdims=True)), X, W, "its mean is over axes [1, 2]"),
    "all axes": (with_(mean=lambda v: op.mean(v, keepdims=True)), X, W, "its mean is over all axes"),
    "vector": (with_(), ((48,), FP32), W, "it is a vector"),
    "dropped axis": (
        with_(mean=lambda v: op.mean(v, axis=[-1])),
        ((48, 48), FP32),
        W,
        "its mean drops the axis",
    ),
    "another x": (
        lambda emit, x, w, e: norm(emit, x, w, scale=lambda emit, v, s: op.multiply(e, emit(op.rsqrt(s)))),
        X,
        W,
        "e is scaled, x was squared",
    ),
    "another x divided": (
        lambda emit, x, w, e: norm(emit, x, w, scale=lambda emit, v, s: op.divide(e, emit(op.sqrt(s)))),
        X,
        W,
        "e is scaled, x was squared",
    ),
    "no epsilon": (with_(shift=op.negative), X, W, "negative follows the mean of squares; a norm adds epsilon"),
    "epsilon of a parameter": (
        lambda emit, x, w, e: norm(emit, x, w, shift=lambda v: op.add(v, e)),
        X,
        W,
        "epsilon is not a constant scalar",
    ),
    "epsilon by element": (
        with_(shift=lambda v: op.add(v, const(np.ones(48, FP32)))),
        X,
        W,
        "epsilon is not a constant scalar",
    ),
    "epsilon 0": (with_(shift=lambda v: op.add(v, const(0.0))), X, W, "epsilon is 0.0; it must be positive and finite"),
    "epsilon nan": (with_(shift=lambda v: op.add(v, const(float("nan")))), X, W, "epsilon is nan; it must be"),
    "another root": (
        with_(scale=lambda emit, v, s: op.multiply(v, emit(op.exp(s)))),
        X,
        W,
        "exp follows the mean of squares",
    ),
    "sqrt times x": (
        with_(scale=lambda emit, v, s: op.multiply(v, emit(op.sqrt(s)))),
        X,
        W,
        "sqrt follows the mean of squares",
    ),
    "2 / sqrt": (
        with_(scale=lambda emit, v, s: op.multiply(v, emit(op.divide(const(2.0), emit(op.sqrt(s)))))),
        X,
        W,
        "a constant is scaled, x was squared",
    ),
    "root added": (with_(scale=lambda emit, v, s: op.add(v, emit(op.rsqrt(s)))), X, W, "add follows the root"),
    "no weight": (
        with_(weigh=lambda emit, v, w: op.add(v, w)),
        X,
        W,
        "add follows the norm where nn.rms_norm has a product with a weight",
    ),
    "squared norm": (with_(weigh=lambda emit, v, w: op.multiply(v, v)), X, W, "multiply follows the norm"),
    "weight of rank 2": (with_(), X, ((1, 48), FP32), "the weight must be a vector [48]"),
    "weight of one element": (with_(), X, ((1,), FP32), "the weight must be a vector [48]"),
    "float16 arithmetic": (
        with_(shift=lambda v: op.add(v, const(1e-3, FP16))),
        ((1, N, 48), FP16),
        ((48,), FP16),
        "it squares float16; nn.rms_norm computes in float32",
    ),
    "float64": (
        with_(shift=lambda v: op.add(v, const(1e-5, "float64"))),
        ((1, N, 48), "float64"),
        ((48,), "float64"),
        "it squares float64",
    ),
    "float8 inside": (
        with_(weigh=lambda emit, v, w: op.multiply(wide(emit, emit(op.astype(v, "float8_e4m3fn"))), w)),
        X,
        W,
        "it is cast to float8_e4m3fn before its weight",
    ),
    "a narrow weight": (
        with_(weigh=lambda emit, v, w: op.multiply(emit(op.astype(v, BF16)), w)),
        X,
        ((48,), BF16),
        "input, weight and result have different types",
    ),
    "the root is read elsewhere": (two_readers, X, W, "lies inside the norm and is read by"),
    "the squares are read elsewhere": (returned_too, X, W, "lies inside the norm and is read by"),
}


@pytest.mark.parametrize(("write", "x", "w", "why"), LEFT.values(), ids=LEFT)
def test_left_as_written(write, x, w, why):
    extra = ((1, N, 48), x[1])
    mod = build(write, x, w, extra)
    fuse = FuseRMSNorm()
    tvm.ir.assert_structural_equal(fuse(mod), mod)
    (reason,) = fuse.report.left
    assert why in reason.why and reason.fix and reason.location.operator == "relax.mean"
    assert not fuse.report.fused and "0 RMSNorm(s)" in str(fuse.report) and "fix:" in str(fuse.report)


def test_a_reader_in_a_branch_counts():
    """The squares are also read where only one branch of an If sees them."""

    @I.ir_module
    class Branch:
        @R.function
        def main(x: R.Tensor((4, 48), "float32"), w: R.Tensor((48,), "float32"), c: R.Tensor((), "bool")):
            squares = R.multiply(x, x)
            mean = R.mean(squares, axis=[-1], keepdims=True)
            shifted = R.add(mean, R.const(0.125, "float32"))
            root = R.rsqrt(shifted)
            scaled = R.multiply(x, root)
            y = R.multiply(scaled, w)
            if c:  # noqa: SIM108
                out = R.add(y, squares)
            else:
                out = R.add(y, y)
            return out

    fuse = FuseRMSNorm()
    tvm.ir.assert_structural_equal(fuse(Branch), Branch)
    assert "squares lies inside the norm" in fuse.report.left[0].why


def test_what_a_block_keeps_to_itself_stays_there():
    """The 16-bit sum is local to the first block, so a norm behind it cannot read it; its float32 copy is not."""

    @I.ir_module
    class Blocks:
        @R.function
        def main(x: R.Tensor((4, 48), "bfloat16"), w: R.Tensor((48,), "bfloat16")):
            with R.dataflow():
                total = R.add(x, x)
                wide = R.astype(total, "float32")
                R.output(wide)
            squares = R.multiply(wide, wide)
            mean = R.mean(squares, axis=[-1], keepdims=True)
            shifted = R.add(mean, R.const(0.125, "float32"))
            root = R.rsqrt(shifted)
            scaled = R.multiply(wide, root)
            rounded = R.astype(scaled, "bfloat16")
            y = R.multiply(rounded, w)
            return y

    fuse = FuseRMSNorm()
    tvm.ir.assert_structural_equal(fuse(Blocks), Blocks)
    assert "different types" in fuse.report.left[0].why


def test_other_means_are_not_mentioned():
    """A mean of anything but a square is no norm, and a module without one is left alone."""
    mod = build(lambda emit, x, w, _: emit(op.mean(x, axis=[-1], keepdims=True)))
    fuse = FuseRMSNorm()
    assert fuse(mod) is mod
    assert str(fuse.report) == "0 RMSNorm(s) to nn.rms_norm, 0 left as written"


class OneNorm(torch.nn.Module):
    def __init__(self, kind, dtype):
        super().__init__()
        self.norm = kind
        torch.manual_seed(0)
        with torch.no_grad():
            self.norm.weight.copy_(torch.rand(48) + 0.5)
        self.norm.weight.data = self.norm.weight.data.to(dtype)

    def forward(self, x):
        return self.norm(x)


def llama_norm():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return LlamaRMSNorm(48, eps=1e-5)


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [lambda: torch.nn.RMSNorm(48, eps=1e-5), llama_norm], ids=["torch", "hf"])
def test_no_less_exact_than_torch(kind, dtype, rows):
    """Rows of very different sizes, down to where epsilon decides and to none at all, against float64."""
    module = OneNorm(kind(), dtype)
    n = torch.export.Dim("n", min=2, max=64)
    program = torch.export.export(module, (torch.ones(1, 5, 48, dtype=dtype),), dynamic_shapes={"x": {1: n}})
    fuse = FuseRMSNorm()
    mod = fuse(from_torch(program).mod)
    assert len(fuse.report.fused) == 1 and not fuse.report.left
    sizes = torch.logspace(-4, 3, 7)[:rows, None]
    x = (torch.randn(1, rows, 48, generator=torch.Generator().manual_seed(1)) * sizes).to(dtype)
    vm = relax.VirtualMachine(tvm.compile(mod, target="llvm"), tvm.cpu())
    out = torch.from_dlpack(vm["main"](tvm.runtime.from_dlpack(x), tvm.runtime.from_dlpack(module.norm.weight.data))[0])
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.norm.weight.double()
    plain = module(x)
    assert out.dtype == plain.dtype and out.shape == plain.shape
    for row in range(rows):
        error, torchs = ((y[0, row].double() - exact[0, row]).norm() / exact[0, row].norm() for y in (out, plain))
        assert error <= max(1.05 * torchs, 3e-7)
