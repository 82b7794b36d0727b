"""Run by test_fake_cublas.py in a process whose libcuda.so.1 and libcublasLt.so.13 are fake_libcuda.cc and fake_libcublaslt.cc."""

from __future__ import annotations

import ctypes
import os
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import tvm_ffi

import tvm_infer
from tvm_infer import _ffi, errors

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from fake_tensors import CPU, CUDA, ROCM, Driver, addresses, alias, tensor

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}  # cudaDataType
WORKSPACE = 32 << 20


class Cublas:
    """The fake libcublasLt.so.13 of this process."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(os.environ["TVM_INFER_CUBLASLT"])
        self.library.fake_cublas_log.restype = ctypes.c_char_p

    def calls(self, name: str) -> list[dict[str, list[int]]]:
        """The arguments of the calls of a function since clear(), by name."""
        lines = [line.split(" ") for line in self.library.fake_cublas_log().decode().splitlines()]
        split = [[word.split("=") for word in words[1:]] for words in lines if words[0] == name]
        return [{key: [int(number) for number in text.split(",")] for key, text in words} for words in split]

    def queries(self):
        return self.calls("cublasLtMatmulAlgoGetHeuristic")

    def workspaces(self) -> list[int]:
        """Of each product since clear()."""
        return [call["workspace"][0] for call in self.calls("cublasLtMatmul")]

    def fail(self, function: str, status: int) -> None:
        self.library.fake_cublas_fail(function.encode(), status)


@pytest.fixture
def driver():
    _ffi.library()
    made = Driver()
    made.clear()
    yield made
    made.clear()
    assert made.current_device() == -1  # no call leaves a context behind


@pytest.fixture
def cublas(driver):
    """With products of a few rows on it, too (what runs those else: with_fake_gemv.py)."""
    made = Cublas()
    made.library.fake_cublas_clear()
    former = _ffi.func("set_matmul_gemv")(False)
    yield made
    _ffi.func("set_matmul_gemv")(former)


def matrix(values, dtype="bfloat16", pad=0, **kwargs):
    """A device tensor whose rows stand `pad` elements apart, with NaN between them."""
    rows, cols = values.shape
    whole = np.full((rows, cols + pad), np.nan, NUMPY[dtype])
    whole[:, :cols] = values
    return tensor((rows, cols), dtype, strides=(cols + pad, 1), data=whole, **kwargs)


def read(x, dtype, rows, stride):
    """The memory of a tensor's rows, what lies between them included; the last row's rest is not."""
    cols = x.shape[1]
    count = (rows - 1) * stride + cols
    raw = ctypes.string_at(addresses[id(x)], count * np.dtype(NUMPY[dtype]).itemsize)
    flat = np.full(rows * stride, np.nan)
    flat[:count] = np.frombuffer(raw, NUMPY[dtype]).astype(np.float64)
    return flat.reshape(rows, stride)


def integers(seed, *shape):
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float64)


def multiply(m=3, k=4, n=5, *, dtype="bfloat16", out_dtype=None, transpose_b=True, stream=0, device=0, **changes):
    """A product of small matrices; returns its tensors, in the order of the call."""
    there = {"device": (CUDA, device)}
    made = {
        "a": tensor((m, k), dtype, **there),
        "b": tensor((n, k) if transpose_b else (k, n), dtype, **there),
        "transpose_b": int(transpose_b),
        "out": tensor((m, n), out_dtype or dtype, **there),
        **changes,
    }
    with tvm_ffi.use_raw_stream(tvm_ffi.device(f"cuda:{device}"), stream):
        _ffi.func("matmul")(*made.values())
    return made


def multiply_add(m=3, k=4, n=5, *, dtype="bfloat16", out_dtype=None, transpose_b=True, stream=0, **changes):
    """The same with c; returns its tensors, in the order of the call. c="out": in place."""
    made = {
        "a": tensor((m, k), dtype),
        "b": tensor((n, k) if transpose_b else (k, n), dtype),
        "transpose_b": int(transpose_b),
        "c": tensor((m, n), out_dtype or dtype),
        "out": tensor((m, n), out_dtype or dtype),
        **changes,
    }
    made["c"] = made["out"] if isinstance(made["c"], str) else made["c"]
    with tvm_ffi.use_raw_stream(tvm_ffi.device("cuda:0"), stream):
        _ffi.func("matmul_add")(*made.values())
    return made


@pytest.mark.parametrize("pads", [(0, 0, 0), (3, 1, 2), (8, 8, 8)])
@pytest.mark.parametrize("transpose_b", [True, False])
@pytest.mark.parametrize(("dtype", "out_dtype"), [(d, o) for d in TYPES for o in {d, "float32"}])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 7, 5), (4, 1, 3), (5, 9, 1), (1, 1, 1), (6, 16, 8)])
def test_layouts(cublas, m, k, n, dtype, out_dtype, transpose_b, pads):
    """The fake multiplies what the descriptors say: any swapped dimension, stride or transposition shows."""
    a, b = integers(1, m, k), integers(2, k, n)
    out = matrix(np.full((m, n), np.nan), out_dtype, pads[2], offset=4)
    _ffi.func("matmul")(
        matrix(a, dtype, pads[0], offset=8), matrix(b.T if transpose_b else b, dtype, pads[1]), int(transpose_b), out
    )
    got = read(out, out_dtype, m, n + pads[2])
    np.testing.assert_array_equal(got[:, :n], (a @ b).astype(NUMPY[out_dtype]).astype(np.float64))
    assert np.isnan(got[:, n:]).all()


@pytest.mark.parametrize("pads", [(0, 0), (3, 3), (0, 5), (8, 1)])
@pytest.mark.parametrize("transpose_b", [True, False])
@pytest.mark.parametrize(("dtype", "out_dtype"), [(d, o) for d in TYPES for o in {d, "float32"}])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 7, 5), (4, 1, 3), (6, 16, 8)])
def test_layouts_of_an_addend(cublas, m, k, n, dtype, out_dtype, transpose_b, pads):
    """Out of place, with any two row strides, and in place. The fake refuses two layouts for one matrix."""
    a, b, c = integers(1, m, k), integers(2, k, n), integers(3, m, n) * 100
    addend = matrix(c, out_dtype, pads[0], offset=8)
    out = matrix(np.full((m, n), np.nan), out_dtype, pads[1], offset=4)
    first, second = matrix(a, dtype), matrix(b.T if transpose_b else b, dtype)
    expected = (a @ b + c).astype(np.float32).astype(NUMPY[out_dtype]).astype(np.float64)  # one rounding
    for to, pad in ((out, pads[1]), (addend, pads[0])):
        _ffi.func("matmul_add")(first, second, int(transpose_b), addend, to)
        got = read(to, out_dtype, m, n + pad)
        np.testing.assert_array_equal(got[:, :n], expected)
        assert np.isnan(got[:, n:]).all()
    assert [call["beta"] for call in cublas.calls("cublasLtMatmul")] == [[1], [1]]


def test_the_sum_is_rounded_once(cublas):
    """257 + 1: bfloat16 has 256 and 258. A product that is rounded first is 256, and 257 is 256 once more."""
    out = tensor((1, 1))
    a, b = np.array([[1.0, 0.5]]), np.array([[256.0], [2.0]])
    _ffi.func("matmul_add")(matrix(a), matrix(b), 0, matrix(np.array([[1.0]])), out)
    assert read(out, "bfloat16", 1, 1)[0, 0] == 258


@pytest.mark.parametrize("dtype", list(TYPES))
def test_what_the_heuristic_is_asked_with_an_addend(cublas, dtype):
    t, size = TYPES[dtype], np.dtype(NUMPY[dtype]).itemsize
    c = matrix(integers(1, 3, 50), dtype, 6, offset=size)
    multiply_add(3, 40, 50, dtype=dtype, c=c)
    multiply_add(3, 40, 50, dtype=dtype, c="out", out=c)
    apart, in_place = cublas.queries()
    assert (apart["c"], apart["d"]) == ([t, 50, 3, 56], [t, 50, 3, 50]) and apart["alignment"] == [16, 16, size, 16]
    assert in_place["c"] == in_place["d"] == [t, 50, 3, 56] and in_place["alignment"] == [16, 16, size, size]


def test_an_addend_makes_another_problem(cublas):
    """Where it lies, in place among it, does not: the same kernel gives the same bits."""
    for _ in range(2):
        multiply(29, 48, 16)
        multiply_add(29, 48, 16)
        multiply_add(29, 48, 16, c="out")
        multiply_add(29, 48, 16, c=tensor((29, 16), offset=32))
        multiply_add(29, 48, 16, c=matrix(integers(1, 29, 16), pad=8))
        multiply_add(29, 48, 16, c=tensor((29, 16), offset=4))
    assert len(cublas.queries()) == 4
    assert [call["beta"][0] for call in cublas.calls("cublasLtMatmul")] == [0, 1, 1, 1, 1, 1] * 2


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
def test_no_summands_give_the_addend(cublas, driver, out_dtype):
    c, out = integers(1, 3, 5), matrix(np.full((3, 5), np.nan), out_dtype, 2)
    multiply_add(3, 0, 5, out=out, c=matrix(c, out_dtype, 1), stream=64)
    got = read(out, out_dtype, 3, 7)
    assert (got[:, :5] == c).all() and np.isnan(got[:, 5:]).all()
    multiply_add(3, 0, 5, out=out, c="out", stream=64)
    assert (read(out, out_dtype, 3, 7)[:, :5] == c).all()
    assert driver.calls("cuMemcpy2DAsync") == ["64"] and driver.calls("cuMemsetD2D8Async") == []
    assert cublas.calls("cublasLtMatmul") == []


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 4, 0), (0, 0, 0), (0, 0, 5)])
def test_nothing_to_add_to(cublas, driver, shape):
    multiply_add(*shape)
    assert cublas.calls("cublasLtMatmul") == [] and driver.calls("cuMemcpy2DAsync") == []


def test_a_failed_copy_has_a_name(cublas, driver):
    driver.fail("cuMemcpy2DAsync", 1)
    with pytest.raises(errors.DeviceError, match="cuMemcpy2DAsync"):
        multiply_add(3, 0, 5)


@pytest.mark.parametrize("dtype", list(TYPES))
def test_what_the_heuristic_is_asked(cublas, dtype):
    """[3, 40] x [50, 40]^T: column-major out^T [50, 3] = ([40, 50])^T [40, 3]."""
    size = np.dtype(NUMPY[dtype]).itemsize
    there = {"a": matrix(integers(1, 3, 40), dtype, 8), "b": matrix(integers(2, 50, 40), dtype, offset=size)}
    multiply(3, 40, 50, dtype=dtype, out_dtype="float32", **there)
    (query,) = cublas.queries()
    t = TYPES[dtype]
    assert query == {
        "compute": [68, 0, 1],  # CUBLAS_COMPUTE_32F: no TF32; op(A) is a transpose
        "a": [t, 40, 50, 40],
        "b": [t, 40, 3, 48],
        "c": [0, 50, 3, 50],
        "d": [0, 50, 3, 50],
        "preference": [WORKSPACE, 2],  # partial sums in the compute type alone
        "alignment": [size, 16, 16, 16],
    }


def test_without_transposition(cublas):
    """[3, 40] x [40, 50]: column-major out^T [50, 3] = [50, 40] [40, 3]."""
    multiply(3, 40, 50, transpose_b=False)
    (query,) = cublas.queries()
    assert (query["compute"], query["a"], query["b"]) == ([68, 0, 0], [14, 50, 40, 50], [14, 40, 3, 40])


def test_one_query_a_problem(cublas):
    sizes = [(7, 64, 24), (8, 64, 24), (7, 72, 24), (7, 64, 32)]
    for _ in range(3):
        for m, k, n in sizes:
            multiply(m, k, n)
            multiply(m, k, n, transpose_b=False)
            multiply(m, k, n, out_dtype="float32")
            multiply(m, k, n, dtype="float16")
            multiply(m, k, n, a=matrix(integers(1, m, k), pad=8))
    assert len(cublas.queries()) == 5 * len(sizes) and len(cublas.calls("cublasLtMatmul")) == 15 * len(sizes)


def test_only_boundaries_below_16_bytes_tell_problems_apart(cublas):
    """A buffer's place in memory must not choose the algorithm: that would make two runs differ."""
    for offset in (0, 16, 32, 48):
        multiply(9, 24, 40, a=matrix(integers(1, 9, 24), offset=offset), out=tensor((9, 40), offset=offset))
    assert len(cublas.queries()) == 1
    for offset, times in ((8, 2), (4, 3), (2, 4), (6, 4)):
        multiply(9, 24, 40, a=matrix(integers(1, 9, 24), offset=offset))
        assert len(cublas.queries()) == times


def test_devices_have_handles_of_their_own(cublas, driver):
    for device in (0, 1, 2, 2, 1):
        multiply(11, 12, 13, device=device)
    assert len(cublas.queries()) == 3 and len(set(cublas.workspaces())) == 3
    assert _ffi.func("matmul_workspace_bytes")(2) == WORKSPACE


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 4, 0), (0, 0, 0), (0, 0, 5)])
def test_nothing_to_write(cublas, driver, shape):
    multiply(*shape)
    assert cublas.calls("cublasLtMatmul") == [] and driver.calls("cuMemsetD2D8Async") == []


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
def test_no_summands_give_zeros(cublas, driver, out_dtype):
    out = matrix(np.full((3, 5), np.nan), out_dtype, 2)
    multiply(3, 0, 5, out=out, stream=64)
    got = read(out, out_dtype, 3, 7)
    assert (got[:, :5] == 0).all() and np.isnan(got[:, 5:]).all()
    assert cublas.calls("cublasLtMatmul") == [] and driver.calls("cuMemsetD2D8Async") == ["64"]


def test_leading_dimensions_are_rows(cublas):
    multiply(a=tensor((2, 1, 3, 4)), out=tensor((2, 1, 3, 5)))
    assert cublas.calls("cublasLtMatmul")


def in_a_new_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_stream_keeps_its_workspace(cublas, driver):
    for stream in (100, 101, 100, 101, 101, 100):
        multiply(stream=stream)
    first, second = cublas.workspaces()[:2]
    assert first != second and cublas.workspaces() == [first, second, first, second, second, first]
    in_a_new_thread(lambda: multiply(stream=101))
    assert cublas.workspaces()[-1] == second
    assert driver.calls("cuMemAlloc") == [str(WORKSPACE)] * 2
    assert [call["stream"] for call in cublas.calls("cublasLtMatmul")][:2] == [[100], [101]]


def test_a_captured_product_takes_the_workspace_of_the_threads_last_product(cublas, driver):
    """TVM's way: a region runs on a stream, is captured on another, and is replayed on the first."""
    multiply(stream=100)
    multiply(stream=101)
    (of_100, of_101), before = cublas.workspaces(), _ffi.func("matmul_workspace_bytes")(0)
    driver.clear()
    for warm_up, expected in ((100, of_100), (101, of_101)):
        driver.capture(False)
        multiply(stream=warm_up)
        driver.capture_stream(500)
        multiply(stream=500)
        multiply(12, 20, stream=500)  # a problem that is new
        assert cublas.workspaces()[-2:] == [expected] * 2
    for name in ("cuMemAlloc", "cuStreamSynchronize"):
        assert driver.calls(name) == []
    assert _ffi.func("matmul_workspace_bytes")(0) == before


def test_a_capture_on_the_streams_own_workspace(cublas, driver):
    multiply(stream=100)
    multiply(stream=101)
    driver.capture_stream(100)
    multiply(stream=100)
    assert cublas.workspaces()[2] == cublas.workspaces()[0]


def test_a_capture_without_a_product_before(cublas, driver):
    """Another thread's products say nothing of what this graph will be in order with."""
    multiply(stream=100)
    driver.capture_stream(501)
    with pytest.raises(errors.WorkspaceError, match=r"captured.*before this thread ran a product.*33554432.*once"):
        in_a_new_thread(lambda: multiply(stream=501))
    assert driver.calls("cuMemAlloc") == [] and len(cublas.workspaces()) == 1


def test_another_threads_capture_does_not_matter(cublas, driver):
    """It is in the mode "global", in which the driver refuses to allocate; and it is not broken by it."""
    driver.capture_stream(502)
    in_a_new_thread(lambda: multiply(stream=102))
    assert driver.calls("cuMemAlloc") == [str(WORKSPACE)]


def test_the_stream_of_each_thread_is_not_one_stream(cublas):
    """cudaStreamPerThread: one handle, 2, for a stream a thread."""
    multiply(stream=2)
    in_a_new_thread(lambda: multiply(stream=2))
    multiply(stream=2)
    first, second, third = cublas.workspaces()
    assert first == third != second


def test_streams_are_bounded(cublas, driver):
    for stream in range(1000, 1016):
        multiply(stream=stream, device=1) if _ffi.func("matmul_workspace_bytes")(1) < 16 * WORKSPACE else None
    assert _ffi.func("matmul_workspace_bytes")(1) == 16 * WORKSPACE
    with pytest.raises(errors.WorkspaceError, match=r"more than 16 streams of cuda device 1.*use them again"):
        multiply(stream=2000, device=1)
    multiply(stream=1003, device=1)


def test_no_memory_for_the_workspace(cublas, driver):
    driver.fail("cuMemAlloc", 2)
    with pytest.raises(errors.DeviceError, match="cuMemAlloc of the 32 MiB workspace of matmul failed"):
        multiply(stream=103)
    multiply(stream=103)


@pytest.mark.parametrize(
    ("function", "status", "words"),
    [
        (
            "cublasLtMatmul",
            13,
            r"cublasLtMatmul of \[3, 4\].*bf16 to bf16.*CUBLAS_STATUS_EXECUTION_FAILED \(13\).*130100",
        ),
        (
            "cublasLtMatmulAlgoGetHeuristic",
            15,
            r"Heuristic for \[3, 4\].*\[5, 4\]\^T.*CUBLAS_STATUS_NOT_SUPPORTED \(15\)",
        ),
    ],
)
def test_statuses_have_names(cublas, function, status, words):
    shift = {"a": matrix(integers(1, 3, 4), pad=status)}  # a problem of its own
    before = cublas.library.fake_cublas_descriptors()
    cublas.fail(function, status)
    with pytest.raises(errors.DeviceError, match=words):
        multiply(**shift)
    if function != "cublasLtMatmul":
        assert cublas.library.fake_cublas_descriptors() == before
    multiply(**shift)
    assert cublas.library.fake_cublas_descriptors() == before + 4  # desc and three layouts


def test_no_algorithm(cublas):
    cublas.library.fake_cublas_results(0)
    with pytest.raises(errors.DeviceError, match=r"CUBLAS_STATUS_NOT_SUPPORTED.*libcublasLt"):
        multiply(77, 76, 75)


def test_tf32_is_asked_for(cublas):
    exchange = _ffi.func("set_matmul_tf32")
    assert exchange(True) is False
    try:
        for dtype in ("float32", "bfloat16"):
            multiply(21, 22, 23, dtype=dtype)
    finally:
        assert exchange(False) is True
    multiply(21, 22, 23, dtype="float32")
    assert [query["compute"][0] for query in cublas.queries()] == [77, 68, 68]


def test_a_library_in_use_stays(cublas, tmp_path):
    multiply()
    path = _ffi.func("cublas_path")()
    assert path == os.environ["TVM_INFER_CUBLASLT"] and tvm_infer.set_cublas(path) == "13.1.0"
    with pytest.raises(errors.ArgumentError, match=r"`path` is .*no\.so, which cannot be opened.*nvidia-cublas"):
        tvm_infer.set_cublas(tmp_path / "no.so")
    other = tmp_path / "libother.so"
    other.write_bytes(pathlib.Path(path).read_bytes())
    with pytest.raises(errors.ArgumentError, match=r"runs its products on .* already.*before the first product"):
        tvm_infer.set_cublas(other)
    assert _ffi.func("cublas_path")() == path


ERRORS = [
    (errors.ArgumentError, r"`b` is on cpu, `a` on cuda:0", lambda: {"b": tensor((5, 4), device=(CPU, 0))}),
    (errors.ArgumentError, r"`b` is on cuda:1, `a` on cuda:0", lambda: {"b": tensor((5, 4), device=(CUDA, 1))}),
    (errors.ArgumentError, r"`out` is on cuda:1", lambda: {"out": tensor((3, 5), device=(CUDA, 1))}),
    (errors.ExecutorError, r"`b` is on cuda:0.*host", lambda: {"a": tensor((3, 4), "float32", device=(CPU, 0))}),
    (errors.ExecutorError, r"`a` is on .*no executor", lambda: {"a": tensor((3, 4), device=(ROCM, 0))}),
    (errors.DTypeError, r"`a` has dtype int32.*float32, float16 or bfloat16", lambda: {"a": tensor((3, 4), "int32")}),
    (errors.DTypeError, r"`b` has dtype float16; it must be bfloat16", lambda: {"b": tensor((5, 4), "float16")}),
    (errors.DTypeError, r"`out` has dtype float16;.*bfloat16 or float32", lambda: {"out": tensor((3, 5), "float16")}),
    (errors.DTypeError, r"`out` has dtype int32", lambda: {"out": tensor((3, 5), "int32")}),
    (errors.ArgumentError, r"`b` has shape \[5, 6\]; dimension 1 must be 4", lambda: {"b": tensor((5, 6))}),
    (errors.ArgumentError, r"`out` has shape \[3, 6\]; dimension 1 must be 5", lambda: {"out": tensor((3, 6))}),
    (errors.ArgumentError, r"`out`.*has 4 rows; `a`", lambda: {"out": tensor((4, 5))}),
    (errors.ArgumentError, r"`a` has rank 1", lambda: {"a": tensor((4,))}),
    (errors.ArgumentError, r"`b` has rank 3", lambda: {"b": tensor((1, 5, 4))}),
    (errors.ArgumentError, r"`a` has stride 3 in its last", lambda: {"a": tensor((3, 4), strides=(1, 3))}),
    (errors.ArgumentError, r"`b`.*row stride 2; rows must not overlap", lambda: {"b": tensor((5, 4), strides=(2, 1))}),
    (
        errors.ArgumentError,
        r"evenly spaced",
        lambda: {"a": tensor((3, 2, 4), strides=(24, 4, 1)), "out": tensor((3, 2, 5))},
    ),
    (
        errors.ArgumentError,
        r"`a`.*row stride 4294967296.*at most 2147483647.*in parts",
        lambda: {"a": tensor((2, 4), strides=(1 << 32, 1)), "out": tensor((2, 5))},
    ),
    (
        errors.ArgumentError,
        r"`a`, shape \[3, 2147483648\].*at most 2147483647",
        lambda: {"b": tensor((5, 1 << 31)), "a": tensor((3, 1 << 31))},
    ),
]


@pytest.mark.parametrize(("kind", "words", "changes"), ERRORS, ids=[row[1] for row in ERRORS])
def test_bad_arguments_are_refused_before_any_call(cublas, kind, words, changes):
    with pytest.raises(kind, match=words):
        multiply(**changes())
    assert cublas.queries() == [] and cublas.calls("cublasLtMatmul") == []


def sharing(shift, stride):
    """c begins `shift` elements behind out, whose rows are 8 elements apart, in the same memory; its own are `stride` apart."""
    out = tensor((3, 5), strides=(8, 1))
    return {"c": alias(out, (3, 5), "bfloat16", strides=(stride, 1), offset=2 * shift), "out": out}


ADDENDS = [
    (errors.ArgumentError, r"`c` is on cpu, `a` on cuda:0", lambda: {"c": tensor((3, 5), device=(CPU, 0))}),
    (errors.ArgumentError, r"`c` is on cuda:1, `a` on cuda:0", lambda: {"c": tensor((3, 5), device=(CUDA, 1))}),
    (errors.DTypeError, r"`c` has dtype float32; it must be bfloat16", lambda: {"c": tensor((3, 5), "float32")}),
    (
        errors.DTypeError,
        r"`c` has dtype bfloat16; it must be float32",
        lambda: {"out": tensor((3, 5), "float32"), "c": tensor((3, 5))},
    ),
    (errors.ArgumentError, r"`c` has shape \[3, 6\]; dimension 1 must be 5", lambda: {"c": tensor((3, 6))}),
    (errors.ArgumentError, r"`c`.*has 1 rows; `out`.*not broadcast", lambda: {"c": tensor((1, 5))}),
    (errors.ArgumentError, r"`c` has rank 1", lambda: {"c": tensor((5,))}),
    (errors.ArgumentError, r"`c` has stride 3 in its last", lambda: {"c": tensor((3, 5), strides=(1, 3))}),
    (errors.ArgumentError, r"`c`.*rows must not overlap", lambda: {"c": tensor((3, 5), strides=(0, 1))}),
    (errors.ArgumentError, r"`c`, shape \[3, 5\], row stride 8, overlaps `out`, row stride 8", lambda: sharing(1, 8)),
    (errors.ArgumentError, r"`c`.*overlaps `out`.*Copy c first", lambda: sharing(8, 8)),
    (errors.ArgumentError, r"`c`.*row stride 9, overlaps `out`, row stride 8", lambda: sharing(0, 9)),
]


@pytest.mark.parametrize(("kind", "words", "changes"), ADDENDS, ids=[row[1] for row in ADDENDS])
def test_bad_addends_are_refused_before_any_call(cublas, kind, words, changes):
    with pytest.raises(kind, match=words):
        multiply_add(**changes())
    assert cublas.queries() == [] and cublas.calls("cublasLtMatmul") == []


def test_python_adds(cublas):
    a, b, c = matrix(integers(1, 3, 4)), matrix(integers(2, 5, 4)), matrix(integers(3, 3, 5))
    assert tvm_infer.matmul_add(a, b, transpose_b=True, c=c, out=c) is c
    assert (read(c, "bfloat16", 3, 5) == integers(1, 3, 4) @ integers(2, 5, 4).T + integers(3, 3, 5)).all()


def test_python_takes_and_makes_outputs(cublas):
    a, b = matrix(integers(1, 3, 4)), matrix(integers(2, 5, 4))
    out = tensor((3, 5))
    assert tvm_infer.matmul(a, b, transpose_b=True, out=out) is out
    with pytest.raises(errors.ArgumentError, match=r"shapes \[3, 4\], \[4\]"):
        tvm_infer.matmul(a, tensor((4,)))
