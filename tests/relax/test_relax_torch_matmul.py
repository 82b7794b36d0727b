"""Matrix products of torch programs: torch's types and torch's values, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from tvm import relax

from tvm_infer.relax import from_torch
from tvm_infer.relax.nodes import bindings_of, op_name
from tvm_infer.relax.wide_sums import sum_in_float32

DTYPES = [torch.float32, torch.bfloat16]


class Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def tensors_of(shapes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def to_tvm(tensor):
    return tvm.runtime.from_dlpack(tensor.detach().contiguous())


def run(function, tensors):
    """(result of the imported and compiled program, its module). Nothing is decomposed, so that every operator meets its converter."""
    program = torch.export.export(Call(function), tuple(tensors), strict=False)
    mod = from_torch(program, keep_attention=True).mod
    vm = relax.VirtualMachine(tvm.compile(sum_in_float32(mod), "llvm"), tvm.cpu())
    result = vm["main"](*[to_tvm(t) for t in tensors])
    while not hasattr(result, "shape"):
        result = result[0]
    return torch.from_dlpack(result), mod


def error_of(result, exact):
    return ((result.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def check(function, shapes, dtype, seed=0):
    tensors = tensors_of(shapes, dtype, seed)
    ours, mod = run(function, tensors)
    torch_own, exact = function(*tensors), function(*[t.double() for t in tensors])
    assert ours.shape == torch_own.shape and ours.dtype == dtype
    # twice what torch loses; a few roundings of the type where torch is nearly exact
    assert error_of(ours, exact) <= 2 * max(error_of(torch_own, exact), torch.finfo(dtype).eps / 2)
    products = [b.value for b in bindings_of(mod["main"]) if op_name(b.value) == "relax.matmul"]
    assert all(str(call.ty.dtype) == str(dtype).removeprefix("torch.") for call in products)
    return mod, products


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (torch.matmul, [(5, 7), (7, 3)]),
        (torch.matmul, [(2, 5, 7), (7, 3)]),
        (torch.matmul, [(2, 1, 5, 7), (3, 7, 4)]),
        (torch.matmul, [(5, 7), (7,)]),
        (torch.mm, [(1, 33), (33, 1)]),
        (torch.bmm, [(3, 5, 7), (3, 7, 2)]),
        (torch.nn.functional.linear, [(2, 5, 7), (3, 7)]),
        (torch.nn.functional.linear, [(5, 7), (3, 7), (3,)]),
        (lambda x, w, b: torch.nn.functional.linear(x, w, bias=b), [(1, 5, 7), (3, 7), (3,)]),
    ],
    ids=["2d", "batch", "broadcast", "vector", "mm", "bmm", "linear", "bias", "bias by name"],
)
def test_products_have_torchs_type_and_values(function, shapes, dtype):
    _, products = check(function, shapes, dtype)
    assert len(products) == (shapes[1] != (7,))  # torch decomposes a product with a vector


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [1, 0.3, -2, 0])
@pytest.mark.parametrize("beta", [1, 0.3, -2, 0])
def test_addmm(alpha, beta, dtype):
    """beta * bias + alpha * (a @ b); a factor of 0 leaves its term out."""
    _, products = check(
        lambda bias, a, b: torch.addmm(bias, a, b, alpha=alpha, beta=beta), [(3,), (5, 7), (7, 3)], dtype
    )
    assert len(products) == (alpha != 0)


def test_addmm_of_a_matrix_and_of_a_column():
    for bias in ((5, 3), (5, 1)):
        check(lambda c, a, b: torch.addmm(c, a, b, alpha=0.5), [bias, (5, 7), (7, 3)], torch.float32)


def test_a_bias_times_0_is_not_read():
    """As in torch: not a number times 0 would be one."""
    bias, a, b = tensors_of([(3,), (5, 7), (7, 3)], torch.float32)
    ours, _ = run(lambda bias, a, b: torch.addmm(bias, a, b, beta=0), [torch.full_like(bias, np.nan), a, b])
    torch.testing.assert_close(ours, a @ b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_long_sums_do_not_stand_still(dtype):
    """4096 products near 1: in bfloat16 a running sum stops at 256, where adding 1 changes nothing."""
    a, b = (1 + t / 8 for t in tensors_of([(2, 4096), (4096, 3)], dtype))
    ours, _ = run(torch.mm, [a, b])
    exact = a.double() @ b.double()
    assert error_of(ours, exact) <= torch.finfo(dtype).eps


def test_only_16_bit_products_are_widened():
    from tvm.script import ir as I
    from tvm.script import relax as R

    @I.ir_module
    class Before:
        @R.function
        def main(
            a: R.Tensor((2, 8), "float16"), b: R.Tensor((8, 4), "float16"), c: R.Tensor((4, 4), "float32")
        ) -> R.Tensor((2, 4), "float32"):
            with R.dataflow():
                narrow = R.matmul(a, b)
                wide = R.matmul(a, b, out_dtype="float32")
                out = R.matmul(R.add(R.astype(narrow, "float32"), wide), c)
                R.output(out)
            return out

    @I.ir_module
    class Expected:
        @R.function
        def main(
            a: R.Tensor((2, 8), "float16"), b: R.Tensor((8, 4), "float16"), c: R.Tensor((4, 4), "float32")
        ) -> R.Tensor((2, 4), "float32"):
            with R.dataflow():
                product = R.matmul(a, b, out_dtype="float32")
                narrow = R.astype(product, "float16")
                wide = R.matmul(a, b, out_dtype="float32")
                out = R.matmul(R.add(R.astype(narrow, "float32"), wide), c)
                R.output(out)
            return out

    tvm.ir.assert_structural_equal(sum_in_float32(Before), Expected)
