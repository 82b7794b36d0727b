"""tvm_infer.matmul_add against float64: over every way the work is cut, in place, beside other columns, and its errors."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matrices import CORES, f32, operands, reference

import tvm_infer
from tvm_infer import errors


def addend(rng, m, n, pad=0):
    """[m, n], its rows `pad` elements apart, NaN between them. Large beside the products: leaving it out, or adding it twice, shows."""
    whole = np.full((m, n + pad), np.nan, np.float32)
    whole[:, :n] = 100 + rng.standard_normal((m, n))
    return whole[:, :n]


def error(out, a, b, transpose_b, c):
    """Largest error in units of fp32 rounding of the sum of |products| and |c|."""
    scale = np.abs(a).astype(np.float64) @ np.abs(b.T if transpose_b else b).astype(np.float64) + np.abs(c)
    return float((np.abs(out - reference(a, b, transpose_b) - c) / scale).max(initial=0.0)) * 2**23


def check(m, k, n, transpose_b, pad=0, c_pad=0):
    rng = np.random.default_rng(m * 7 + k * 3 + n)
    a, b, out = operands(rng, m, k, n, transpose_b, pad)
    c = addend(rng, m, n, c_pad)
    kept = c.copy()
    assert tvm_infer.matmul_add(a, b, transpose_b=transpose_b, c=c, out=out) is out
    assert error(out, a, b, transpose_b, c) < 4 + np.sqrt(k)
    np.testing.assert_array_equal(c, kept)
    if pad and m > 1:
        assert np.isnan(out.base[:, n:]).all()
    if pad == c_pad:  # in place
        tvm_infer.matmul_add(a, b, transpose_b=transpose_b, c=c, out=c)
        np.testing.assert_array_equal(c, out)
        assert np.isnan(c.base[:, n:]).all()


@given(
    m=st.integers(1, 80),
    k=st.integers(1, 300),
    n=st.integers(1, 300),
    transpose_b=st.booleans(),
    pad=st.integers(0, 5),
    c_pad=st.integers(0, 5),
)
def test_any_shape(m, k, n, transpose_b, pad, c_pad):
    check(m, k, n, transpose_b, pad, c_pad)


@pytest.mark.parametrize("transpose_b", [True, False])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(4, 576, 1536), (5, 1536, 577), (33, 576, 3072), (300, 64, 31), (2, 70000, 40)]
)
def test_shapes_of_models(m, k, n, transpose_b):
    check(m, k, n, transpose_b)


@pytest.mark.parametrize("core", CORES)
def test_every_kernel_family(core):
    """In a fresh process, because OpenBLAS chooses its kernels once."""
    code = """
import test_matmul_add as t, tvm_infer
print(tvm_infer.set_blas())
for m, k, n in [(1, 576, 100), (3, 65, 1000), (4, 576, 500), (8, 129, 700), (40, 200, 300)]:
    for transpose_b in (True, False):
        for pads in ((0, 0), (3, 3), (2, 5)):
            t.check(m, k, n, transpose_b, *pads)
"""
    folders = [str(pathlib.Path(__file__).parent), str(pathlib.Path(tvm_infer.__file__).parents[1])]
    env = {**os.environ, "OPENBLAS_CORETYPE": core, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != core:
        pytest.skip(f"this processor runs {done.stdout.strip()}, not {core}")


def test_leading_dimensions_are_rows():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 1, 3, 40), dtype=np.float32), rng.standard_normal((50, 40), dtype=np.float32)
    c = rng.standard_normal((6, 50), dtype=np.float32)
    out = tvm_infer.matmul_add(a, b, transpose_b=True, c=c)
    assert out.shape == (2, 1, 3, 50)
    np.testing.assert_allclose(out.reshape(6, 50), a.reshape(6, 40) @ b.T + c, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("m", "k", "n"), [(0, 4, 5), (3, 0, 5), (3, 4, 0)])
def test_empty(m, k, n):
    """Without summands the sum is c, also where out is c, and between the rows nothing is written."""
    rng = np.random.default_rng(0)
    a, b, out = operands(rng, m, k, n, False, pad=2)
    c = addend(rng, m, n, pad=1)
    kept = c.copy()
    tvm_infer.matmul_add(a, b, c=c, out=out)
    np.testing.assert_array_equal(out, kept)
    assert np.isnan(out.base[:, n:]).all()
    tvm_infer.matmul_add(a, b, c=c, out=c)
    np.testing.assert_array_equal(c, kept)


# What c may share with out


def halves(rows=4):
    """Two halves of a buffer's columns, and what is added and multiplied there."""
    buffer = np.zeros((rows, 10), np.float32)
    buffer[:, 5:] = np.arange(rows * 5).reshape(rows, 5)
    return buffer, np.ones((rows, 3), np.float32), np.ones((5, 3), np.float32)


def test_columns_beside_each_other():
    """Their ranges of memory meet, their elements do not."""
    buffer, a, b = halves()
    kept = buffer[:, 5:].copy()
    tvm_infer.matmul_add(a, b, transpose_b=True, c=buffer[:, 5:], out=buffer[:, :5])
    np.testing.assert_array_equal(buffer[:, :5], kept + 3)
    np.testing.assert_array_equal(buffer[:, 5:], kept)


@pytest.mark.parametrize(
    "views",
    [
        lambda x: (x[:, 1:6], x[:, :5]),  # columns in common
        lambda x: (x[:, :5], x[:, 4:9]),
        lambda x: (x.reshape(-1)[8 : 8 + 38].reshape(-1), x[:, :5]),  # row i ends in row i + 1
        lambda x: (x[1:, :5], x[:-1, :5]),  # a row later
        lambda x: (x.reshape(-1)[:20].reshape(4, 5), x[:4, :5]),  # another row stride
    ],
    ids=["right", "left", "wrapped", "row", "stride"],
)
def test_other_overlaps_are_refused(views):
    buffer = np.zeros((5, 10), np.float32)
    c, out = views(buffer)
    if c.ndim == 1:
        c = np.lib.stride_tricks.as_strided(c, (4, 5), (40, 4))
        out = out[:4]
    rows = min(len(c), len(out))
    with pytest.raises(errors.ArgumentError, match=r"`c`.*overlaps `out`.*out itself.*Copy c first"):
        tvm_infer.matmul_add(np.ones((rows, 3), np.float32), f32(5, 3), transpose_b=True, c=c[:rows], out=out[:rows])
    assert (buffer == 0).all()


def test_one_row_in_place():
    """A row has no stride to speak of: a slice of a wide buffer is itself."""
    buffer, a, b = halves(1)
    out = buffer[:, 5:]
    tvm_infer.matmul_add(a, b, transpose_b=True, c=out[0][None], out=out)
    np.testing.assert_array_equal(buffer[0, 5:], np.arange(5) + 3)


@pytest.mark.parametrize(
    ("c", "kind", "message"),
    [
        (f32(2, 4), errors.ArgumentError, r"`c` has shape \[2, 4\]; dimension 1 must be 5"),
        (f32(1, 5), errors.ArgumentError, r"`c`.*has 1 rows; `out`, shape \[2, 5\], has 2.*not broadcast"),
        (f32(3, 5), errors.ArgumentError, r"`c`.*has 3 rows"),
        (f32(5), errors.ArgumentError, "`c` has rank 1"),
        (f32(5, 2).T, errors.ArgumentError, "`c` has stride 2 in its last dimension"),
        (np.lib.stride_tricks.as_strided(f32(5), (2, 5), (0, 4)), errors.ArgumentError, "`c`.*must not overlap"),
        (np.zeros((2, 5)), errors.DTypeError, "`c` has dtype float64; it must be float32"),
        (f32(2, 5).astype(ml_dtypes.bfloat16), errors.DTypeError, "`c` has dtype bfloat16"),
    ],
)
def test_errors_name_the_argument(c, kind, message):
    out = np.full((2, 5), np.nan, np.float32)
    with pytest.raises(kind, match=message):
        tvm_infer.matmul_add(f32(2, 3), f32(5, 3), transpose_b=True, c=c, out=out)
    assert np.isnan(out).all()


def test_errors_of_the_product_stay():
    with pytest.raises(errors.ArgumentError, match=r"`b` has shape \[5, 4\]; dimension 1 must be 3"):
        tvm_infer.matmul_add(f32(2, 3), f32(5, 4), transpose_b=True, c=f32(2, 5), out=f32(2, 5))
    with pytest.raises(errors.ArgumentError, match=r"shapes \[2, 3\], \[3\]"):
        tvm_infer.matmul_add(f32(2, 3), f32(3), c=f32(2, 5))
