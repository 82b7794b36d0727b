"""Run by test_fake_cublas.py, where libcuda.so.1 and libcublasLt.so.13 are fakes: which products run on our kernel, and with what."""

from __future__ import annotations

import ctypes
import pathlib
import sys

import pytest
import tvm_ffi

import tvm_infer
from tvm_infer import _ffi, errors
from tvm_infer.jit import headers

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from fake_tensors import CUDA, Driver, addresses, tensor
from with_fake_cublas import Cublas

ABI, THREADS, SHARED = headers.kernel_abi(), 288, 232448
FIXED = 2 * 8 * 8 * 16 * 4 + 2 * 16 * 8  # bytes: two groups' sums of eight warps, and the barriers of 16 stages
STAGE = 16 * 512 * 2


class GemvParams(ctypes.Structure):
    """cuda/params.h, GemvParams."""

    _fields_ = [
        *[field for x in ("a", "b", "c", "out") for field in ((x, ctypes.c_void_p), (f"ld_{x}", ctypes.c_int64))],
        *[(n, ctypes.c_int32) for n in ("m", "n", "k", "a_shared_bytes", "num_stages", "out_is_fp32", "b_is_constant")],
    ]


_ffi.library()  # registers the real one, which this replaces


@tvm_ffi.register_global_func("tvm_infer.jit_cubin", override=True)
def jit_cubin(name, arch):
    return f"{name} {ABI} {THREADS} {SHARED} 1".encode() + b"\0"


@pytest.fixture
def cublas():
    made = Cublas()
    made.library.fake_cublas_clear()
    return made


@pytest.fixture
def driver(cublas):
    made = Driver()
    made.clear()
    yield made
    made.clear()
    assert made.current_device() == -1  # no call leaves a context behind


def padded(rows, cols, dtype="bfloat16", *, pad=0, offset=0, device=0):
    """[rows, cols], its rows `pad` elements apart, beginning `offset` bytes behind a boundary of 64."""
    return tensor((rows, cols), dtype, strides=(cols + pad, 1), offset=offset, device=(CUDA, device))


def multiply(m=4, k=64, n=256, *, dtype="bfloat16", out_dtype=None, transpose_b=True, device=0, stream=0, **changes):
    """One product, by tvm_infer.linear or matmul and their sums; returns its tensors. c: True, a tensor, or "out" (in place)."""
    linear, c = changes.pop("linear", False), changes.pop("c", None)
    made = {
        "a": padded(m, k, dtype, device=device),
        "b": padded(*((n, k) if transpose_b else (k, n)), dtype, device=device),
        "out": padded(m, n, out_dtype or dtype, device=device),
        **changes,
    }
    if c is not None:
        made["c"] = {"out": made["out"], True: padded(m, n, out_dtype or dtype, device=device)}.get(c, c)
    arguments = [made["a"], made["b"], *([] if linear else [int(transpose_b)]), *([made["c"]] if c is not None else [])]
    name = ("linear" if linear else "matmul") + ("" if c is None else "_add")
    with tvm_ffi.use_raw_stream(tvm_ffi.device(f"cuda:{device}"), stream):
        _ffi.func(name)(*arguments, made["out"])
    return made


# What runs where. The limit of k is that of shared memory: [m, k] lies there, beside four stages at least.
ON_GEMV = {
    "one row": {"m": 1},
    "eight rows": {"m": 8},
    "one column": {"n": 1},
    "odd columns": {"n": 257},
    "511 columns of 8192": {"k": 8192, "n": 511},
    "512 columns of more": {"k": 8200, "n": 512},
    "eight summands": {"k": 8},
    "136 summands": {"k": 136},
    "fp16": {"dtype": "float16"},
    "fp32 out": {"out_dtype": "float32"},
    "fp32 out of fp16": {"dtype": "float16", "out_dtype": "float32"},
    "rows apart": {"a": padded(4, 64, pad=8), "b": padded(256, 64, pad=16), "out": padded(4, 256, pad=3)},
    "behind a boundary": {"a": padded(4, 64, offset=16), "b": padded(256, 64, offset=48)},
    "out anywhere": {"out": padded(4, 256, offset=2, pad=1), "c": padded(4, 256, offset=6, pad=5)},
    "one row of any stride": {"m": 1, "a": tensor((1, 64), strides=(67, 1))},
    "leading dimensions": {"a": tensor((2, 1, 4, 64)), "out": tensor((2, 1, 4, 256))},
    "k at its limit of eight rows": {"m": 8, "k": 9904, "n": 512},
    "k at its limit of one row": {"m": 1, "k": 79232, "n": 512},
}
ON_CUBLAS = {
    "nine rows": {"m": 9},
    "511 columns of more than 8192": {"k": 8200, "n": 511},
    "k of 4": {"k": 4},
    "k of 12": {"k": 12},
    "fp32": {"dtype": "float32"},
    "not transposed": {"transpose_b": False},
    "a misaligned": {"a": padded(4, 64, offset=8)},
    "b misaligned": {"b": padded(256, 64, offset=2)},
    "stride of a": {"a": padded(4, 64, pad=4)},
    "stride of b": {"b": padded(256, 64, pad=1)},
    "nine rows in three dimensions": {"a": tensor((3, 3, 64)), "out": tensor((3, 3, 256))},
    "k above its limit of eight rows": {"m": 8, "k": 9912, "n": 512},
    "k above its limit of one row": {"m": 1, "k": 79240, "n": 512},
    "a device without kernels of ours": {"device": 2},
}


@pytest.mark.parametrize("changes", ON_GEMV.values(), ids=list(ON_GEMV))
@pytest.mark.parametrize("linear", [False, True], ids=["matmul", "linear"])
def test_products_of_a_few_rows_run_on_our_kernel(driver, cublas, linear, changes):
    multiply(linear=linear, **changes)
    (launch,) = driver.launches()
    assert launch["name"] == {"bfloat16": "gemv_bf16", "float16": "gemv_fp16"}[changes.get("dtype", "bfloat16")]
    assert cublas.queries() == [] and cublas.calls("cublasLtMatmul") == []
    assert 4 <= driver.gemv_params(GemvParams).num_stages <= 13


@pytest.mark.parametrize("changes", ON_CUBLAS.values(), ids=list(ON_CUBLAS))
def test_others_run_on_cublaslt(driver, cublas, changes):
    kinds = (False, True) if changes.get("transpose_b", True) else (False,)  # a linear's weight is transposed
    for linear in kinds:
        multiply(linear=linear, **changes)
    assert driver.launches() == [] and len(cublas.calls("cublasLtMatmul")) == len(kinds)


@pytest.mark.parametrize("shape", [(0, 64, 256), (4, 64, 0), (4, 0, 256)])
def test_nothing_to_multiply_is_no_launch(driver, cublas, shape):
    for linear in (False, True):
        multiply(*shape, linear=linear)
        multiply(*shape, linear=linear, c=True)
    assert driver.launches() == [] and cublas.calls("cublasLtMatmul") == []


def test_all_goes_to_cublaslt_when_told(driver, cublas):
    exchange = _ffi.func("set_matmul_gemv")
    assert exchange(False) is True
    try:
        for linear in (False, True):
            multiply(linear=linear)
            multiply(linear=linear, c=True)
        assert driver.launches() == [] and len(cublas.calls("cublasLtMatmul")) == 4
    finally:
        assert exchange(True) is False
    multiply()
    assert len(driver.launches()) == 1


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("linear", [False, True], ids=["matmul", "linear"])
def test_what_the_kernel_is_given(driver, linear, out_dtype):
    made = multiply(
        3,
        136,
        1000,
        out_dtype=out_dtype,
        linear=linear,
        a=padded(3, 136, pad=8, offset=16),
        b=padded(1000, 136, pad=24, offset=32),
        c=padded(3, 1000, out_dtype, pad=5, offset=4),
        out=padded(3, 1000, out_dtype, pad=7, offset=12),
        stream=64,
    )
    (launch,) = driver.launches()
    assert launch == {
        "name": "gemv_bf16",
        "grid": "63,1,1",  # groups of 16 rows of b
        "block": f"{THREADS},1,1",
        "shared": str(SHARED),
        "stream": "64",
        "attributes": "1,6,1",  # programmatic dependent launch
        "device": "0",
    }
    p = driver.gemv_params(GemvParams)
    for name in ("a", "b", "c", "out"):
        assert getattr(p, name) == addresses[id(made[name])], name
    assert (p.ld_a, p.ld_b, p.ld_c, p.ld_out) == (144, 160, 1005, 1007)
    assert (p.m, p.n, p.k) == (3, 1000, 136)
    assert (p.a_shared_bytes, p.num_stages) == (3 * 136 * 2, 13)
    assert (p.out_is_fp32, p.b_is_constant) == (out_dtype == "float32", linear)


@pytest.mark.parametrize("linear", [False, True], ids=["matmul", "linear"])
def test_nothing_is_added_and_in_place(driver, linear):
    multiply(linear=linear)
    p = driver.gemv_params(GemvParams)
    assert p.c is None and (p.ld_a, p.ld_b, p.ld_out) == (64, 64, 256)
    made = multiply(linear=linear, c="out", out=padded(4, 256, pad=9))
    p = driver.gemv_params(GemvParams)
    assert p.c == p.out == addresses[id(made["out"])] and p.ld_c == p.ld_out == 265


@pytest.mark.parametrize(
    ("m", "k", "stages"),
    [
        (1, 8, 13),
        (1, 4096, 13),
        (1, 5504, 13),  # 13 stages to the byte
        (1, 5512, 12),
        (8, 4096, 9),
        (4, 14336, 6),
        (5, 14336, 4),
        (8, 9904, 4),
        (1, 79232, 4),
    ],
)
def test_stages_fill_what_a_leaves_of_shared_memory(driver, m, k, stages):
    multiply(m, k, 512)
    p = driver.gemv_params(GemvParams)
    assert (p.a_shared_bytes, p.num_stages) == (m * k * 2, stages)
    used = FIXED + p.a_shared_bytes + p.num_stages * STAGE
    assert used <= SHARED and (stages == 13 or used + STAGE > SHARED)


@pytest.mark.parametrize(
    ("n", "ctas"),
    [
        (1, 1),
        (16, 1),
        (256, 16),
        (257, 17),
        (272, 17),
        (131 * 16, 131),
        (132 * 16, 132),
        (132 * 16 + 1, 132),
        (6144, 132),
    ],
)
def test_a_cta_for_each_sixteen_rows_of_the_matrix_up_to_one_an_sm(driver, n, ctas):
    multiply(1, 64, n)
    assert driver.launches()[0]["grid"] == f"{ctas},1,1"


def test_in_a_capture(driver, cublas):
    """The kernel is loaded by a call before; the workspace of cuBLASLt is not needed."""
    there = {"device": 1, "dtype": "float16"}  # no other test loads this kernel there
    driver.capture(True)
    with pytest.raises(errors.DeviceError, match=r"`gemv_fp16` is not loaded.*captured.*once before"):
        multiply(**there)
    assert driver.launches() == [] and driver.calls("cuLibraryLoadData") == []
    driver.capture(False)
    multiply(**there)
    driver.clear()
    driver.capture(True)
    multiply(**there, linear=True, c="out")
    (launch,) = driver.launches()
    assert (launch["name"], launch["device"]) == ("gemv_fp16", "1")
    for name in ("cuStreamSynchronize", "cuMemcpyDtoH", "cuLibraryLoadData", "cuMemAlloc"):
        assert driver.calls(name) == []
    assert cublas.calls("cublasLtMatmul") == []


def test_a_failed_launch_has_a_name(driver):
    driver.fail("cuLaunchKernelEx", 700)
    with pytest.raises(errors.DeviceError, match=r"cuLaunchKernelEx of `gemv_bf16` failed: CUDA_ERROR_ILLEGAL_ADDRESS"):
        multiply()
    multiply()


ERRORS = [
    (errors.ArgumentError, r"`b` is on cuda:1, `a` on cuda:0", lambda: {"b": padded(256, 64, device=1)}),
    (errors.DTypeError, r"`b` has dtype float16; it must be bfloat16", lambda: {"b": padded(256, 64, "float16")}),
    (errors.DTypeError, r"`out` has dtype float16", lambda: {"out": padded(4, 256, "float16")}),
    (errors.ArgumentError, r"`b` has shape \[256, 72\]; dimension 1 must be 64", lambda: {"b": padded(256, 72)}),
    (errors.ArgumentError, r"`out` has shape \[4, 264\]; dimension 1 must be 256", lambda: {"out": padded(4, 264)}),
    (errors.ArgumentError, r"`out`.*has 5 rows; `a`", lambda: {"out": padded(5, 256)}),
    (errors.ArgumentError, r"`b`.*rows must not overlap", lambda: {"b": tensor((256, 64), strides=(32, 1))}),
    (errors.ArgumentError, r"`c`.*has 1 rows; `out`.*not broadcast", lambda: {"c": padded(1, 256)}),
    (errors.DTypeError, r"`c` has dtype float32; it must be bfloat16", lambda: {"c": padded(4, 256, "float32")}),
]


@pytest.mark.parametrize(("kind", "words", "changes"), ERRORS, ids=[row[1] for row in ERRORS])
def test_a_linears_bad_arguments_are_refused_before_any_launch(driver, kind, words, changes):
    with pytest.raises(kind, match=words):
        multiply(linear=True, **changes())
    assert driver.launches() == []


def test_python_takes_and_adds_in_place(driver):
    x, weight, out = padded(4, 64), padded(256, 64), padded(4, 256)
    assert tvm_infer.linear(x, weight, out=out) is out
    p = driver.gemv_params(GemvParams)
    assert (p.c, p.out, p.b_is_constant) == (None, addresses[id(out)], 1)
    assert tvm_infer.linear(x, weight, c=out, out=out) is out
    p = driver.gemv_params(GemvParams)
    assert p.c == p.out == addresses[id(out)]
    with pytest.raises(errors.ArgumentError, match=r"shapes \[4, 64\], \[256\]"):
        tvm_infer.linear(x, tensor((256,)))
